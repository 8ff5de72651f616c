"""What predicts the norm of the error: a linear probe, token mean, loss, L0 or the norm of x?

What, other than a linear map of x, knows how large the error is? (figure 13)

The squared norms of the error and of its linear and nonlinear parts are predicted, on held-out tokens, from x (the norm
prediction test, a probe) and from what comes for free: the mean over the token's occurrences, the model's loss at the token,
its number of active latents, the norm of x. All regressions are fitted on the same fit tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, r2_interval
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Regressions, Settings, replaced
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import GREY, SERIES, interval_bars, new_panels
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
class BaselinesSettings(Settings):
    """Predict the norm of the error from x, and from the token, the loss, L0 and the norm of x."""


PRESETS = presets(
    BaselinesSettings,
    {"layers": (5, 10, 15, 20), "widths": (2048,)},
    loss=True,
    token_means=True,
    table_contexts=0,
)
# The SAEs of GPT-2 ask for weights processed by TransformerLens, which give no loss.
PRESETS["gpt2-small"] = replaced(PRESETS["gpt2-small"], loss=False)


SCRIPT = Regressions()  # compare_norm_prediction_to_baselines.py: a column of ones beside x


def plan(settings: BaselinesSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [*plan_lines(settings), *(f"predict   by {about}" for about in PREDICTORS.values())]


def scalar_sets(sae: str, *, loss: bool) -> dict[str, list[str]]:
    """Predictor -> the per-token scalars it consists of; without the loss if that is not measured."""
    single = {"x_norm": ["x_norm"], "x": ["x"], **({"loss": ["loss"]} if loss else {}), "l0": [f"{sae}/l0"]}
    return {"scalars": [name for own in single.values() for name in own], **single}


def random_means(y: Tensor, counts: Tensor, *, seed: int) -> Tensor:
    """[V] for each token id the mean of counts [V] values drawn from y [n]: a token mean that knows nothing about the token.

    Its expected R2 is -1 / counts, averaged over the tokens it is scored on: the noise of the means.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = y[torch.randint(len(y), (int(counts.sum()),), generator=generator)]
    ids = torch.arange(len(counts)).repeat_interleave(counts)
    sums = torch.zeros(len(counts), dtype=y.dtype).index_add_(0, ids, drawn)
    return torch.where(counts > 0, sums / counts.clamp(min=1), y.mean())


def token_mean_numbers(site: SiteMeasurement, sae: str, *, seed: int) -> dict[str, float]:
    """`PART/token_mean` and `PART/random_mean`: R2 on the held-out tokens in the table, by its groups of contexts."""
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
    """The number in a hook point's name, even if it is a cache's own name; 0 if there is none."""
    number = re.search(r"\d+", hook)
    return int(number[0]) if number else 0


def run(settings: BaselinesSettings, stages: Stages) -> Result:
    """Measure, then predict the norms from everything.

    Raises ValueError for bad settings, an SAE of another model; RuntimeError for a damaged cache or checkpoint.
    """
    found = measured(prepare(settings, stages), stages, released=SCRIPT)
    saes = [sae | {"layer": _layer(sae["hook"])} for sae in found.saes]
    numbers: dict[str, float] = {}
    with stages.stage("predict the norms", len(saes)) as advance:
        for sae in saes:
            name = str(sae["name"])
            site = found.site_of(name)
            numbers[f"{name}/l0"] = site.l0(name)
            own = sae_numbers(site, name, seed=settings.seed)
            numbers |= {f"{name}/{key}": value for key, value in own.items()}
            if settings.measure.released:
                in_sample = site.token_mean_r2(in_sample=True)
                for part in PARTS if in_sample else ():
                    found_here = Interval(in_sample[f"{name}/{part}"], math.nan, math.nan)
                    numbers |= {
                        f"{name}/{key}": value for key, value in found_here.numbers(f"{part}/token_mean").items()
                    }
            advance(1)
    shown = [name for name in PREDICTORS if f"{saes[0]['name']}/error/{name}" in numbers]
    notes = [
        "Targets are squared norms on held-out tokens. The token mean is over the token's fit occurrences, for a token without "
        "any the overall mean, scored on the table of held-out tokens; its control takes as many random tokens instead."
    ]
    if settings.measure.released:
        notes.append(
            "As the released code: the token mean is over all tokens and scored on the same, which flatters it."
        )
    series = {"saes": saes, "predictors": {name: PREDICTORS[name] for name in shown}}
    return measured_result("baselines", found, stages, numbers, series=series, notes=notes)


NOTHING = 0.01  # an R2 too small to mention
_HEADINGS = {
    "probe": "linear map of x",
    "token_mean": "token mean",
    "scalars": "all scalars",
    "x_norm": "norm of x",
    "x": "squared norm",
    "loss": "loss",
    "l0": "L0",
    "random_mean": "random tokens",
}


def table(result: Result) -> Table:
    """One row per SAE and part of its error: R2 of its squared norm from every predictor."""
    predictors, several = result.series["predictors"], len(result.series["saes"]) > 1
    rows = []
    for sae in result.series["saes"]:
        for part in PARTS:
            keys = [f"{sae['name']}/{part}/{predictor}" for predictor in predictors]
            label = f"block {sae['layer']}, {part}" if several else part
            rows.append([label, *(with_interval(result.numbers, key, "{:.2f}") for key in keys)])
    return Table(
        title=f"baselines: {result.config['model']}, held-out R² of the squared norm of the error and its parts",
        headings=("block, part", *(_HEADINGS[name] for name in predictors)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """The probe against every baseline, part by part, across SAEs."""
    numbers, names = result.numbers, [sae["name"] for sae in result.series["saes"]]
    baselines = [name for name in result.series["predictors"] if name not in ("probe", "random_mean")]

    def span(key: str) -> str:
        values = sorted(numbers[f"{name}/{key}"] for name in names)
        low, high = shown(values[0], "{:.2f}"), shown(values[-1], "{:.2f}")
        return low if low == high else f"{low} to {high}"

    lines = []
    for part in PARTS:
        ahead = sum(
            all(numbers[f"{name}/{part}/probe/low"] > numbers[f"{name}/{part}/{other}/high"] for other in baselines)
            for name in names
        )
        others = ", ".join(f"{_HEADINGS[other]} {span(f'{part}/{other}')}" for other in baselines)
        what = "error" if part == "error" else f"{part} error"
        lines.append(
            f"Squared norm of the {what}: a linear map of x has R² {span(f'{part}/probe')}; {others}. The map is ahead of all "
            f"of these, intervals apart, for {ahead} of {len(names)} SAEs."
        )
    if "random_mean" in result.series["predictors"]:
        lines.append(
            f"Control: the mean over as many random tokens has R² {span('error/random_mean')} for the error; "
            f"{span('random_mean_expected')} is what the noise of means over few tokens makes of nothing."
        )
    if (fixed := sum(abs(numbers[f"{name}/error/l0"]) < NOTHING for name in names)) > 0:
        lines.append(
            f"L0 explains less than {NOTHING} for {fixed} of {len(names)} SAEs: in a TopK SAE it is all but constant."
        )
    return lines


_LABELS = {  # predictor -> name, marker
    "probe": ("linear map of x", "o"),
    "token_mean": ("token mean", "s"),
    "scalars": ("all of the next four", "D"),
    "x_norm": ("norm of x", "^"),
    "x": ("squared norm of x", "v"),
    "loss": ("model's loss", "P"),
    "l0": ("L0", "X"),
    "random_mean": ("control: random tokens' mean", "."),
}
_TITLES = {"error": "error", "linear": "linear error", "nonlinear": "nonlinear error"}
_COLOURS = (*SERIES, "black", GREY)
_LABELLED = 8  # number of SAEs whose labels fit below a panel


def r2_by_layer(result: Result) -> Figure:
    """Held-out R2 of the squared norm of each part of the error from every predictor, by layer, with intervals."""
    saes = sorted(result.series["saes"], key=lambda sae: sae["layer"])
    figure, panels = new_panels(3.5, len(_TITLES), sharey=True)
    for axes, (part, title) in zip(panels, _TITLES.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.6)
        for number, predictor in enumerate(result.series["predictors"]):
            label, marker = _LABELS[predictor]
            places = [place + (number - 3.5) * 0.07 for place in range(len(saes))]
            values, errors = interval_bars(result, [f"{sae['name']}/{part}/{predictor}" for sae in saes])
            axes.errorbar(
                places, values, yerr=errors, fmt=marker, markersize=3.5, linewidth=0.9, color=_COLOURS[number], label=label
            )  # fmt: skip
        axes.set_xticks(*_ticks(saes), fontsize=8)
        axes.set_xlabel("block")
        axes.set_title(f"norm² of the {title}", fontsize=9)
    panels[0].set_ylabel("held-out R²")
    panels[0].set_ylim(top=1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _ticks(saes: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Positions and labels: blocks, with the width if widths differ; only every few if there are many."""
    several = len({sae["d_sae"] for sae in saes}) > 1
    places = list(range(0, len(saes), 1 + (len(saes) - 1) // _LABELLED))
    return places, [str(saes[at]["layer"]) + (f"\n{saes[at]['d_sae']}" if several else "") for at in places]


FIGURES = {"r2": r2_by_layer}
