"""`darkmatter run decomposition`: the dark matter of the SAEs of one site, measured on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.measurement import family, many_saes, many_saes_config
from darkmatter_ext.measurement.family import AnyConfig, FamilyConfig, FamilySite, family_result
from darkmatter_ext.measurement.many_saes import Measured
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.selection import UNUSED
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages

SHOWN_HIGH_NORM_TOKENS = 8


@dataclass(frozen=True)
class DecompositionConfig(FamilyConfig):
    """Measure linear and nonlinear SAE error at one site of a language model."""


DEMO = DecompositionConfig()
PRESETS: dict[str, AnyConfig] = {"demo": DEMO, **many_saes_config.PRESETS}


def plan(config: AnyConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    return family.plan(config)


def _high_norm_tokens(model: str, site: FamilySite) -> list[dict[str, Any]]:
    """The tokens of largest norm, whatever rule they fell under: nothing is left out unseen."""
    cache, selection = site.cache, site.selection
    norms, tokens = cache.column("norms"), cache.column("tokens")
    tokenizer = load_tokenizer(model)
    shown = []
    for flat in norms.flatten().topk(min(SHOWN_HIGH_NORM_TOKENS, norms.numel())).indices.tolist():
        context, position = divmod(flat, cache.context_length)
        shown.append(
            {
                "token": tokenizer.decode([int(tokens[context, position])]),
                "position": position,
                "norm_over_median": norms[context, position].item() / selection.median_norm,
                "left_out": int(selection.roles[context, position]) == UNUSED,
            }
        )
    return shown


def _from_predictors(measured: Measured, sae: str) -> dict[str, float]:
    """R2 of each predictor, and of all together, for error, linear and nonlinear error."""
    site, numbers = measured.site_of(sae), {}
    sets = {name: [name] for name in measured.predictors}
    if len(sets) > 1:
        sets["all predictors"] = measured.predictors
    for name, used in sets.items():
        for part in ("error", "linear", "nonlinear"):
            numbers[f"{sae}/r2_from/{name}/{part}"] = site.part_fit(used, sae, part).r2
    return numbers


def run(config: AnyConfig, stages: Stages) -> Result:
    """Measure; see the module of the same name one level up for the method.

    Raises ValueError for bad settings, a missing SAE, text too short; RuntimeError for a damaged cache or checkpoint.
    """
    more: dict[str, float] = {}
    series: dict[str, Any] = {}
    if isinstance(config, ManySaesConfig):
        found = many_saes.measured(config, stages)
    else:
        sites = family.family_sites(config, [config.hook], stages)
        found = family.measured_family(config, stages, sites=sites)
        more = sites[config.hook].selection.numbers()
        series["largest_norm_tokens"] = _high_norm_tokens(config.model, sites[config.hook])
    # Left-out tokens are counted over the whole text; of the others what was measured counts, not what was selected.
    measured = {name: found.numbers[f"tokens/{name}"] for name in ("fit", "norm_fit", "held_out")}
    numbers = more | {f"tokens/{name}": count for name, count in measured.items()} | found.sae_numbers()
    for sae in found.saes:
        numbers |= _from_predictors(found, sae["name"])
    series["excerpt"] = many_saes.excerpt(found)
    series["per_token"] = {hook: str(site.per_token) for hook, site in found.sites.items()}
    return family_result("decomposition", found, stages, numbers, series=series)
