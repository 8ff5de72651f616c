"""`darkmatter run per-token`: is a token hard for every SAE? Error norms of several widths, token by token (figures 5, 6).

Over held-out tokens the (unsquared) norm of one SAE's error is predicted from that of another by a regression on one number,
for every pair; a smaller SAE predicting a larger one is what the figures show. The gain is the share of what stays
unexplained, (R2' - R2) / (1 - R2), when the norm of the smaller SAE's nonlinear error joins as a second predictor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, r2_interval
from darkmatter_ext.estimators.least_squares import fit_linear
from darkmatter_ext.measurement import family, many_saes, many_saes_config
from darkmatter_ext.measurement.family import AnyConfig, FamilyConfig, family_result, given_hooks, measured_family
from darkmatter_ext.measurement.many_saes import excerpt
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.catalogue import SAE_SETS


@dataclass(frozen=True)
class PerTokenConfig(FamilyConfig):
    """Predict the norm of one SAE's error, token by token, from that of an SAE of another width."""

    widths: tuple[int, ...] = family.WIDTHS
    """latents of the SAEs to train, two widths or more"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sae) == 1:
            raise ValueError(f"--sae: must name at least two SAEs, one predicts the other, got {self.sae[0]}")
        if not self.sae and len(self.widths) < 2:
            raise ValueError(
                f"--widths: must name at least two widths, one predicts the other, got {list(self.widths)}"
            )


PRESETS: dict[str, AnyConfig] = {
    "demo": PerTokenConfig(),
    **{name: config for name, config in many_saes_config.PRESETS.items() if name != "gemma-2-9b-all-layers"},
}
_NEAR_60 = tuple(sae.spec for sae in SAE_SETS["gemma-2-9b-l20-near-60"])
PRESETS["gemma-2-9b-l20"] = dataclasses.replace(many_saes_config.PRESETS["gemma-2-9b-l20"], sae=_NEAR_60)


def plan(config: AnyConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    hooks = [] if isinstance(config, ManySaesConfig) else list(given_hooks(config))
    return [*family.plan(config, hooks), "regress   the error norm of every SAE on that of every other, token by token"]


def _one_site(config: AnyConfig) -> str:
    """Where the SAEs are. Raises ValueError for fewer than two of them, or several sites."""
    if isinstance(config, ManySaesConfig):
        if len(config.sae) < 2:
            raise ValueError(
                f"--sae: must name at least two SAEs, one predicts the other, got {' '.join(config.sae) or 'none'}"
            )
        hooks = many_saes.sae_sites(config)
    else:
        hooks = list(given_hooks(config)) or [config.hook]
    if len(hooks) > 1:
        raise ValueError(
            f"--sae: must be of one site, errors of several are not on one scale, got {' and '.join(hooks)}"
        )
    return hooks[0]


def pair_numbers(site: SiteMeasurement, first: str, second: str) -> dict[str, float]:
    """How the error norm of the SAE `first` predicts that of `second`: R2, and what two further predictors gain, percent."""
    norm, target, pair = [f"{first}/error_norm"], f"{second}/error_norm", f"{first}/{second}"
    return {
        **site.scalar_interval(norm, target).numbers(f"r2/{pair}"),
        **site.scalar_gain(norm, [f"{first}/nonlinear_norm"], target).numbers(f"gain/{pair}"),
        **site.scalar_gain(norm, ["x_norm"], target).numbers(f"gain_from_x/{pair}"),
    }


def shuffled_r2(norms: Tensor, contexts: Tensor, *, seed: int) -> Interval:
    """R2 of the same regression from another token's norm to a token's own: 0 but for chance (from its own: 1).

    Fitted on every other context and scored on the rest, always with a bias: without one the known value is not 0.

    Args:
        norms: [n], of one SAE's error.
        contexts: [n] int64.
    """
    other = norms[other_tokens(len(norms), torch.Generator().manual_seed(seed))]
    fit = contexts.unique(return_inverse=True)[1] % 2 == 0
    predicted = fit_linear(other[:, None], norms[:, None], train=fit).map(other[:, None])[:, 0]
    return r2_interval(norms[~fit], predicted[~fit], contexts[~fit])


def _controls(site: SiteMeasurement, names: list[str], *, seed: int) -> dict[str, float]:
    """For each SAE's error norm: R2 from the norm of x alone, and from another token's error norm."""
    table = read_tokens(site.per_token, [f"{name}/error" for name in names])
    contexts, numbers = torch.tensor(table["context"].to_pylist()), {}
    for name in names:
        norms = torch.tensor(table[f"{name}/error"].to_pylist(), dtype=torch.float64).sqrt()
        numbers |= site.scalar_interval(["x_norm"], f"{name}/error_norm").numbers(f"x_norm/{name}")
        numbers |= shuffled_r2(norms, contexts, seed=seed).numbers(f"shuffled/{name}")
    return numbers


def run(config: AnyConfig, stages: Stages) -> Result:
    """Measure all SAEs, then regress every pair.

    Raises ValueError for bad settings, fewer than two SAEs, SAEs of several sites; RuntimeError for a damaged cache or
    checkpoint.
    """
    hook = _one_site(config)
    if isinstance(config, ManySaesConfig):
        found = many_saes.measured(config, stages)
    else:
        found = measured_family(config, stages, hooks=[hook])
    (site,) = found.sites.values()
    saes: list[dict[str, Any]] = sorted(found.saes, key=lambda sae: sae["d_sae"])
    names = [sae["name"] for sae in saes]
    numbers: dict[str, float] = {}
    with stages.stage("regress error norms", len(names) ** 2) as advance:
        for first in names:
            decomposition = site.decomposition(first)
            numbers |= {f"{first}/l0": decomposition.l0, f"{first}/fvu": decomposition.fvu}
            for second in names:
                numbers |= pair_numbers(site, first, second) if second != first else {}
                advance(1)
        numbers |= _controls(site, names, seed=config.seed)
    notes = [
        "Another token's error norm: a seeded shuffle, fitted on every other held-out context and scored on the rest."
    ]
    if config.parity == "released-code":
        notes.append("The released code shuffles without a seed; splits and shuffles here have one.")
    series = {"saes": saes, "excerpt": excerpt(found)}
    return family_result("per-token", found, stages, numbers, series=series, notes=notes)
