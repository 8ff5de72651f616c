"""`darkmatter run scaling`: how FVU, its nonlinear part and both prediction tests go with width and L0 (figures 1 to 4).

At a fixed L0 the FVU follows c + a W^m in the width W, while FVU_nonlinear hardly changes. With that, error comes apart
(figure 1): what more latents would remove, curve - c; linear error that no width removes, c - mean FVU_nonlinear; what a
better encoder removes, mean FVU_nonlinear - FVU_nonlinear under pursuit at the same L0; and the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from darkmatter_ext.estimators.intervals import Interval
from darkmatter_ext.estimators.power_law import MINIMUM_WIDTHS, PowerLaw, fit_power_law
from darkmatter_ext.measurement import family, many_saes, many_saes_config
from darkmatter_ext.measurement.family import KS, WIDTHS, FamilyConfig, family_result
from darkmatter_ext.measurement.many_saes import Measured
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.metadata import narrowed
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import as_encoder, pursuit_encoder, random_directions, shuffled_sae
from darkmatter_ext.saes.loading import describe_sae

L0_TOLERANCE = (
    1.3  # an SAE is at the L0 of the law if it is off by no more than this factor (the paper: 48 to 64 for 60)
)
CONTROLS = {
    "shuffled decoder": "control: the widest SAE with its decoder rows permuted",
    "random directions": "control: as many random directions, TopK of the tied encoder",
}
PURSUIT = "pursuit"


@dataclass(frozen=True)
class ScalingConfig(FamilyConfig):
    """Train SAEs of every width and k, and see how FVU and its linear and nonlinear part go with width and L0."""

    l0: float = 32.0
    """L0 of the power law: at each width the SAE nearest to it counts, if it is off by a factor of 1.3 at most"""
    with_pursuit: bool = False
    """also measure gradient pursuit over these SAEs' dictionaries: what a better encoder would remove (minutes)"""

    def __post_init__(self) -> None:
        if not self.sae and len(self.widths) < 2:
            raise ValueError(f"--widths: must name at least 2 widths to see how error scales, got {list(self.widths)}")
        _check_l0(self.l0)
        super().__post_init__()


@dataclass(frozen=True)
class ManyScalingConfig(ManySaesConfig):
    """See how FVU and its linear and nonlinear part go with the width and L0 of SAEs that exist."""

    l0: float = 60.0
    """L0 of the power law: at each width the SAE nearest to it counts, if it is off by a factor of 1.3 at most"""
    with_pursuit: bool = False
    """also measure gradient pursuit over these SAEs' dictionaries: what a better encoder would remove"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_l0(self.l0)


def _check_l0(l0: float) -> None:
    if not l0 > 0:
        raise ValueError(f"--l0: must be above 0, got {l0}")


AnyScalingConfig = ScalingConfig | ManyScalingConfig
PRESETS: dict[str, AnyScalingConfig] = {
    "demo": ScalingConfig(widths=WIDTHS, ks=KS),
    **{name: many_saes_config.extended(config, ManyScalingConfig) for name, config in many_saes_config.PRESETS.items()},
}


def plan(config: AnyScalingConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    pursued = ["pursuit   gradient, over the dictionaries of these SAEs"] if config.with_pursuit else []
    return [
        *family.plan(config),
        f"law       c + a W^m at L0 about {config.l0:g}, from {MINIMUM_WIDTHS} widths on",
        *pursued,
        *(f"          {about}" for about in CONTROLS.values()),
    ]


def at_fixed_l0(saes: list[dict[str, Any]], numbers: dict[str, float], l0: float) -> list[dict[str, Any]]:
    """At each width the SAE whose measured L0 is nearest to `l0`, by width; those off by more than L0_TOLERANCE left out."""

    def distance(sae: dict[str, Any]) -> float:
        own = numbers[f"{sae['name']}/l0"]
        return abs(math.log(own / l0)) if own > 0 else math.inf

    nearest: dict[int, dict[str, Any]] = {}
    for sae in sorted(saes, key=distance, reverse=True):
        nearest[sae["d_sae"]] = sae
    kept = [sae for sae in nearest.values() if distance(sae) <= math.log(L0_TOLERANCE)]
    return sorted(kept, key=lambda sae: sae["d_sae"])


def _candidates(config: AnyScalingConfig, saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The SAEs that the law may be made of: of a family trained with several k, those of the k nearest to --l0."""
    if isinstance(config, ManySaesConfig) or config.sae or len(config.ks) < 2:
        return saes
    return [sae for sae in saes if sae["name"].endswith(f"-k{_k(config, config.l0)}")]


def _k(config: FamilyConfig, l0: float) -> int:
    return min(config.widths_by_k, key=lambda k: abs(k - l0))


def breakdown(
    law: PowerLaw, saes: list[dict[str, Any]], numbers: dict[str, float], *, pursued: bool
) -> dict[str, float]:
    """The four parts of FVU at each width of the law; the constant one with the interval of c.

    `SAE/breakdown/absent`: what more latents would remove; `breakdown/linear`: linear error at any width;
    `SAE/breakdown/encoder`: what pursuit removes (0 without it); `SAE/breakdown/rest`: nonlinear error that stays.
    """
    nonlinear = {sae["name"]: numbers[f"{sae['name']}/fvu_nonlinear"] for sae in saes}
    mean = fmean(nonlinear.values())
    found = Interval(*(end - mean for end in (law.c.value, law.c.low, law.c.high))).numbers("breakdown/linear")
    found |= {"breakdown/nonlinear": mean}
    for name, sae in zip(nonlinear, saes, strict=True):
        rest = numbers[f"{name} {PURSUIT}/fvu_nonlinear"] if pursued else mean
        found |= {
            f"{name}/breakdown/absent": law(sae["d_sae"]) - law.c.value,
            f"{name}/breakdown/encoder": mean - rest,
            f"{name}/breakdown/rest": rest,
        }
    return found


def _restricted(config: AnyScalingConfig, saes: list[dict[str, Any]]) -> family.AnyConfig:
    """The same measurement of some of the SAEs of the law."""
    base = ManySaesConfig if isinstance(config, ManySaesConfig) else FamilyConfig
    plain = base(**{own.name: getattr(config, own.name) for own in dataclasses.fields(base)})
    if isinstance(plain, ManySaesConfig) or plain.sae:
        return narrowed(plain, [sae["folder"] for sae in saes])
    widths = tuple(sae["d_sae"] for sae in saes)
    return dataclasses.replace(plain, widths=widths, ks=(), k=_k(plain, config.l0))


def _controls(
    config: AnyScalingConfig, saes: list[dict[str, Any]], numbers: dict[str, float], stages: Stages
) -> Measured:
    """The controls of the widest SAE, measured as it was."""
    l0 = max(1, round(numbers[f"{saes[-1]['name']}/l0"]))
    controls: many_saes.Encoders = {
        "shuffled decoder": lambda sae: as_encoder(shuffled_sae(sae, seed=config.seed)),
        "random directions": functools.partial(random_directions, l0=l0, seed=config.seed),
    }
    return family.measured(_restricted(config, saes[-1:]), stages, controls)


def _check_widths(config: AnyScalingConfig) -> None:
    """Raises ValueError for given SAEs of one width only."""
    widths = {describe_sae(spec).d_sae for spec in config.sae}
    if len(widths) == 1:
        raise ValueError(f"--sae: must be SAEs of at least 2 widths to see how error scales, got {sorted(widths)}")


def run(config: AnyScalingConfig, stages: Stages) -> Result:
    """Measure all SAEs, fit the power law at --l0, and take the error apart.

    Raises ValueError for bad settings, SAEs of one width only or of several sites; RuntimeError for damaged files.
    """
    if config.parity == "released-code":  # its scaling script leaves out the first position and the last
        config = dataclasses.replace(config, drop_positions=1)
    _check_widths(config)
    found = family.measured(config, stages)
    if len(found.sites) > 1:
        raise ValueError(f"--sae: must be of one site to see how error scales, got {', '.join(found.sites)}")
    numbers = found.sae_numbers()
    chosen = at_fixed_l0(_candidates(config, found.saes), numbers, config.l0)
    notes: list[str] = []
    series: dict[str, Any] = {"law": [], "controls": [], "about": CONTROLS, "with_pursuit": config.with_pursuit}
    if chosen:
        if config.with_pursuit:
            own = _restricted(config, chosen)
            pursued = family.measured(own, stages, {PURSUIT: pursuit_encoder})
            numbers |= _renamed(pursued, chosen)
        controls = _controls(config, chosen, numbers, stages)
        numbers |= controls.sae_numbers()
        series["controls"] = controls.saes
    if len(chosen) < MINIMUM_WIDTHS:
        notes.append(
            f"No power law: it needs {MINIMUM_WIDTHS} widths at L0 about {config.l0:g}, there are {len(chosen)} "
            f"(of {len({sae['d_sae'] for sae in found.saes})} measured)."
        )
    else:
        law = fit_power_law([sae["d_sae"] for sae in chosen], [numbers[f"{sae['name']}/fvu"] for sae in chosen])
        numbers |= law.numbers("law") | breakdown(law, chosen, numbers, pursued=config.with_pursuit)
        series["law"] = [sae["name"] for sae in chosen]
        notes.append(
            f"Power law from {len(chosen)} widths with {len(chosen) - 3} residuals to spare; its intervals are profiles of "
            "the likelihood, NaN where the points set no bound."
        )
    return family_result("scaling", found, stages, numbers, series=series, notes=notes)


def _renamed(pursued: Measured, chosen: list[dict[str, Any]]) -> dict[str, float]:
    """Numbers of pursuit under the names the SAEs have in the whole family."""
    own = {sae["d_sae"]: sae["name"] for sae in chosen}
    names = {sae["name"]: f"{own[sae['d_sae']]} {PURSUIT}" for sae in pursued.saes}
    found = {}
    for key, value in pursued.sae_numbers().items():
        name = next(name for name in names if key.startswith(f"{name}/"))
        found[names[name] + key.removeprefix(name)] = value
    return found
