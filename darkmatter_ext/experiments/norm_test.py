"""`darkmatter run norm-test`: how much of each squared norm a linear map of x predicts, over a family of SAEs (figure 7).

For v in x, Sae(x), SaeError(x), its linear part, its nonlinear part and Sae(x) + nonlinear part: R2 on held-out tokens of
the least-squares map from x to ||v||^2. Baseline: the same with ||x||^2 alone as predictor, one number instead of d.
A target that x says nothing about would score about -d / n with n tokens to fit d slopes on: the noise floor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from darkmatter_ext.measurement import family, many_saes_config
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.family import KS, WIDTHS, AnyConfig, FamilyConfig
from darkmatter_ext.measurement.many_saes import Measured
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages

MIN_VIOLIN = 4  # SAEs: a density of fewer would be drawn from nothing


@dataclass(frozen=True)
class NormTestConfig(FamilyConfig):
    """Predict the squared norms of x, of Sae(x) and of each part of its error from x, for every SAE of a family."""


PRESETS: dict[str, AnyConfig] = {"demo": NormTestConfig(widths=WIDTHS, ks=KS), **many_saes_config.PRESETS}


def plan(config: AnyConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    return family.plan(config)


def norm_numbers(site: SiteMeasurement, sae: str) -> dict[str, float]:
    """R2 of every norm of one SAE, from x and from ||x||^2 alone, with intervals; beside it L0, FVU and the noise floor."""
    found, numbers = site.intervals(sae), {}
    for target in NORM_TARGETS:
        numbers |= found[f"r2_norm/{target}"].numbers(f"{sae}/r2_norm/{target}")
        if target != "x":  # ||x||^2 predicts itself
            numbers |= site.scalar_interval(["x"], f"{sae}/{target}").numbers(f"{sae}/r2_from_norm_of_x/{target}")
    numbers |= found["fvu"].numbers(f"{sae}/fvu") | found["r2_vec"].numbers(f"{sae}/r2_vec")
    d = len(site.maps[sae].weight)
    return numbers | {f"{sae}/l0": site.l0(sae), f"{sae}/noise_floor": -d / site.n_norm_fit}


def over_saes(numbers: dict[str, float], saes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, least and greatest over the SAEs of each R2: "over_saes/r2_norm/error/median" and so on.

    SAEs whose norm does not vary (R2 is NaN) are left out of them.
    """
    kinds = {"r2_norm": NORM_TARGETS, "r2_from_norm_of_x": NORM_TARGETS[1:]}
    found = {}
    for name in (f"{kind}/{target}" for kind, targets in kinds.items() for target in targets):
        every = [numbers[f"{sae['name']}/{name}"] for sae in saes]
        values = [value for value in every if math.isfinite(value)] or [math.nan]
        ends = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        found |= {f"over_saes/{name}/{end}": value for end, value in ends.items()}
    return found | {"noise_floor": min(numbers[f"{sae['name']}/noise_floor"] for sae in saes)}


def _notes(found: Measured, numbers: dict[str, float]) -> list[str]:
    notes = [
        f"Noise floor: a norm that has nothing to do with x would score about {numbers['noise_floor']:.3f} (d slopes "
        "fitted on n tokens cost d / n). The ranges are least and greatest over SAEs, no intervals."
    ]
    if len(found.saes) < MIN_VIOLIN:
        notes.append(f"{len(found.saes)} SAE(s): drawn as points, a violin needs {MIN_VIOLIN}.")
    if found.config["parity"] == "released-code":
        notes.append("As the released code: no bias in any regression, b* fitted on all tokens, held-out ones too.")
    return notes


def run(config: AnyConfig, stages: Stages) -> Result:
    """Measure the family and read its norm tests.

    Raises ValueError for bad settings, SAEs that do not fit; RuntimeError for damaged files.
    """
    found = family.measured(config, stages)
    numbers: dict[str, float] = {}
    with stages.stage("norm tests", len(found.saes)) as advance:
        for sae in found.saes:
            numbers |= norm_numbers(found.site_of(sae["name"]), sae["name"])
            advance(1)
    numbers |= over_saes(numbers, found.saes)
    series = {"targets": NORM_TARGETS, "violins": len(found.saes) >= MIN_VIOLIN}
    return family.family_result("norm-test", found, stages, numbers, series=series, notes=_notes(found, numbers))
