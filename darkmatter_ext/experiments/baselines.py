"""`darkmatter run baselines`: what else than a linear map of x knows how large the error is? (figure 13)

The squared norms of the error, of its linear and of its nonlinear part are predicted, on held-out tokens, from x (the norm
prediction test, a probe) and from what costs nothing: the mean over the token's occurrences, the model's loss at the token, its
number of active latents, the norm of x. All regressions are fitted on the same fit tokens.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import r2_interval
from darkmatter_ext.measurement import family, many_saes, many_saes_config
from darkmatter_ext.measurement.family import FamilyConfig, family_result, given_hooks, measured_family
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.progress import Stages

PARTS = ("error", "linear", "nonlinear")
PREDICTORS = {
    "probe": "a linear map of x",
    "token_mean": "the mean over the token's occurrences",
    "scalars": "all single numbers below together",
    "x_norm": "the norm of x",
    "x": "the squared norm of x",
    "loss": "the model's loss",
    "l0": "the number of active latents",
    "random_mean": "the mean over as many random tokens, a control",
}


@dataclass(frozen=True)
class BaselinesConfig(FamilyConfig):
    """Predict the norm of the error from x, and from the token, the loss, the L0 and the norm of x."""

    layers: tuple[int, ...] = ()
    """blocks whose residual stream is measured, instead of --hook (with --sae: the sites of the SAEs)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, default=0) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"--layers: must be different numbers of at least 0, got {list(self.layers)}")

    @property
    def hooks(self) -> list[str]:
        """The sites. Raises ValueError for an SAE that cannot be loaded."""
        named = list(given_hooks(self)) or [f"blocks.{layer}.hook_resid_post" for layer in self.layers]
        return named or [self.hook]


PRESETS: dict[str, BaselinesConfig | ManySaesConfig] = {
    "demo": BaselinesConfig(layers=(5, 10, 15, 20), widths=(2048,)),
    **{
        # TransformerLens' processed weights, which the SAEs of GPT-2 ask for, give no loss.
        name: dataclasses.replace(config, loss=name != "gpt2-small", token_means=True, table_contexts=0)
        for name, config in many_saes_config.PRESETS.items()
    },
}


def plan(config: BaselinesConfig | ManySaesConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    hooks = [] if isinstance(config, ManySaesConfig) else config.hooks
    return [*family.plan(config, hooks), *(f"predict   by {about}" for about in PREDICTORS.values())]


def scalar_sets(sae: str, *, loss: bool) -> dict[str, list[str]]:
    """Predictor -> the per-token scalars it is made of; without the loss where that is not measured."""
    single = {"x_norm": ["x_norm"], "x": ["x"], **({"loss": ["loss"]} if loss else {}), "l0": [f"{sae}/l0"]}
    return {"scalars": [name for own in single.values() for name in own], **single}


def random_means(y: Tensor, counts: Tensor, *, seed: int) -> Tensor:
    """[V] for each token id the mean over counts [V] values drawn from y [n]: a token mean that knows nothing of the token.

    Its R2 is expected at -1 / counts, averaged over the tokens it is scored on: the noise of the means.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = y[torch.randint(len(y), (int(counts.sum()),), generator=generator)]
    ids = torch.arange(len(counts)).repeat_interleave(counts)
    sums = torch.zeros(len(counts), dtype=y.dtype).index_add_(0, ids, drawn)
    return torch.where(counts > 0, sums / counts.clamp(min=1), y.mean())


def token_mean_numbers(site: SiteMeasurement, sae: str, *, seed: int) -> dict[str, float]:
    """`PART/token_mean` and `PART/random_mean`: R2 on the held-out tokens of the table, by its groups of contexts."""
    table = read_tokens(site.per_token, ["token", "group", *(f"{sae}/{part}" for part in PARTS)])
    ids, group = (torch.tensor(table[name].to_pylist()) for name in ("token", "group"))
    numbers: dict[str, float] = {}
    for part in PARTS:
        y = torch.tensor(table[f"{sae}/{part}"].to_pylist(), dtype=torch.float64)
        mean, counts = site.token_mean(f"{sae}/{part}")
        numbers |= r2_interval(y, mean[ids], group).numbers(f"{part}/token_mean")
        numbers |= r2_interval(y, random_means(y, counts, seed=seed)[ids], group).numbers(f"{part}/random_mean")
        noise = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)[ids].mean().item()
        numbers["random_mean_expected"] = -noise  # the same for all parts
    return numbers


def sae_numbers(site: SiteMeasurement, sae: str, *, seed: int) -> dict[str, float]:
    """`PART/PREDICTOR`: held-out R2 for the squared norm of each part of the error, with intervals."""
    probe, numbers = site.intervals(sae), {}
    sets = scalar_sets(sae, loss=site.has_loss)
    for part in PARTS:
        numbers |= probe[f"r2_norm/{part}"].numbers(f"{part}/probe")
        for name, used in sets.items():
            numbers |= site.scalar_interval(used, f"{sae}/{part}").numbers(f"{part}/{name}")
    return numbers | (token_mean_numbers(site, sae, seed=seed) if site.has_token_means else {})


def _layer(hook: str) -> int:
    """The number in a hook point's name, of a cache too whatever it is called; 0 without one."""
    number = re.search(r"\d+", hook)
    return int(number[0]) if number else 0


def run(config: BaselinesConfig | ManySaesConfig, stages: Stages) -> Result:
    """Measure, then predict the norms from everything.

    Raises ValueError for bad settings, an SAE of another model; RuntimeError for a damaged cache or checkpoint.
    """
    if isinstance(config, ManySaesConfig):
        found = many_saes.measured(config, stages)
    else:
        found = measured_family(config, stages, hooks=config.hooks, loss=True, token_means=True)
    saes = [sae | {"layer": _layer(sae["hook"])} for sae in found.saes]
    numbers: dict[str, float] = {}
    with stages.stage("predict the norms", len(saes)) as advance:
        for sae in saes:
            name = str(sae["name"])
            site = found.site_of(name)
            numbers[f"{name}/l0"] = site.l0(name)
            own = sae_numbers(site, name, seed=config.seed)
            numbers |= {f"{name}/{key}": value for key, value in own.items()}
            advance(1)
    shown = [name for name in PREDICTORS if f"{saes[0]['name']}/error/{name}" in numbers]
    notes = [
        "Targets are squared norms on held-out tokens. The token mean is over the token's fit occurrences, for a token without "
        "any the overall mean, scored on the table of held-out tokens; its control takes as many random tokens instead."
    ]
    series = {"saes": saes, "predictors": {name: PREDICTORS[name] for name in shown}}
    return family_result("baselines", found, stages, numbers, series=series, notes=notes)
