"""`darkmatter run pursuit`: is the encoder to blame? The SAE's own latents, pursuit from zero, and a refit, side by side.

Engels et al. ask whether nonlinear error is what a better encoder would remove: the dictionary is kept, the codes are
chosen by pursuit at the SAE's own L0, token by token (figure 10a: over widths). The refit keeps the encoder's choice of
latents too and only improves their values (non-negative least squares).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from darkmatter_ext.measurement import family, many_saes_config
from darkmatter_ext.measurement.family import FamilyConfig, family_result
from darkmatter_ext.measurement.many_saes import Encoders
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.ops.pursuit import METHODS
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder, pursuit_encoder, refit_encoder

VARIANTS = {"encoder": "the SAE itself", "pursuit": "pursuit from zero", "refit": "the encoder's latents, refitted"}


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"--method: must be one of {', '.join(METHODS)}, got {method!r}")


@dataclass(frozen=True)
class PursuitConfig(FamilyConfig):
    """Compare SAEs' encoders with pursuit over their dictionaries at the same L0, token by token."""

    method: str = "gradient"
    """gradient, matching or orthogonal (non-negative)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method(self.method)


@dataclass(frozen=True)
class ManyPursuitConfig(ManySaesConfig):
    """Compare the encoders of SAEs that exist with pursuit over their dictionaries at the same L0, token by token."""

    method: str = "gradient"
    """gradient, matching or orthogonal (non-negative)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method(self.method)


AnyPursuitConfig = PursuitConfig | ManyPursuitConfig
PRESETS: dict[str, AnyPursuitConfig] = {
    "demo": PursuitConfig(widths=(512, 1024, 2048)),
    **{name: many_saes_config.extended(config, ManyPursuitConfig) for name, config in many_saes_config.PRESETS.items()},
}


def plan(config: AnyPursuitConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    return [
        *family.plan(config),
        *(f"variant   {about}" for about in VARIANTS.values()),
        f"pursuit   {config.method}",
    ]


def encoders(method: str) -> Encoders:
    """The three ways to use an SAE, by the names of VARIANTS."""
    return {
        "encoder": as_encoder,
        "pursuit": functools.partial(pursuit_encoder, method=method),
        "refit": refit_encoder,
    }


def run(config: AnyPursuitConfig, stages: Stages) -> Result:
    """Measure FVU, FVU_nonlinear, R2 and L0 of every SAE with every encoder.

    Raises ValueError for bad settings, an SAE with maps pursuit knows nothing of; RuntimeError for a damaged cache.
    """
    found = family.measured(config, stages, encoders(config.method))
    numbers = found.sae_numbers()
    notes = [f"Pursuit ({config.method}) takes as many steps at each token as the encoder has active latents there."]
    return family_result("pursuit", found, stages, numbers, notes=notes)
