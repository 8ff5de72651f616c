"""How much of an SAE's error is linear in the activation (vector and norm tests, FVU)?

The dark matter of the SAEs of one site, measured on held-out text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.measurement.core_numbers import core_numbers
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.excerpt import excerpt
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.run import Inputs, Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.measurement.tokens import UNUSED
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.sae_table import sae_rows, sae_table
from darkmatter_ext.report.style import BLUE, GREY, SERIES, SKY, legend_beside, new_figure, token_axis
from darkmatter_ext.report.table import Table
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_HIGH_NORM_TOKENS = 8


@dataclass(frozen=True)
class DecompositionSettings(Settings):
    """Measure the linear and nonlinear error of a language model's SAEs."""


PRESETS = presets(DecompositionSettings, {})


def plan(settings: DecompositionSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return plan_lines(settings)


def _high_norm_tokens(inputs: Inputs) -> list[dict[str, Any]]:
    """The stored tokens of largest norm, whichever rule took them, so that nothing is left out unseen."""
    (tokens,) = inputs.stored.values()
    norms, ids = tokens.cache.column("norms"), tokens.cache.column("tokens")
    tokenizer = load_tokenizer(inputs.model)
    shown = []
    for flat in norms.flatten().topk(min(SHOWN_HIGH_NORM_TOKENS, norms.numel())).indices.tolist():
        context, position = divmod(flat, tokens.cache.context_length)
        shown.append(
            {
                "token": tokenizer.decode([int(ids[context, position])]),
                "position": position,
                "norm_over_median": norms[context, position].item() / tokens.typical_norm,
                "left_out": int(tokens.roles[context, position]) == UNUSED,
            }
        )
    return shown


def _from_predictors(measured: Measurement, sae: str) -> dict[str, float]:
    """R2 of each predictor, and of all together, for the error and its linear and nonlinear parts."""
    site, numbers = measured.site_of(sae), {}
    sets = {name: [name] for name in measured.predictors}
    if len(sets) > 1:
        sets["all predictors"] = measured.predictors
    for name, used in sets.items():
        for part in ("error", "linear", "nonlinear"):
            numbers[f"{sae}/r2_from/{name}/{part}"] = site.part_fit(used, sae, part).r2
    return numbers


def run(settings: DecompositionSettings, stages: Stages) -> Result:
    """Measure every SAE.

    Raises InputError for settings, SAEs or a text that do not fit; StateError for a damaged cache or checkpoint.
    """
    inputs = prepare(settings, stages, transcoders=True)
    found = measured(inputs, stages)
    numbers = found.sae_numbers()
    series: dict[str, Any] = {}
    if len(inputs.stored) == 1:
        series["largest_norm_tokens"] = _high_norm_tokens(inputs)
    for sae in found.saes:
        name, site = sae["name"], found.site_of(sae["name"])
        numbers |= _from_predictors(found, name)
        core = core_numbers(site, name, inputs.sae(name).load())
        numbers |= {f"{name}/{key}": value for key, value in core.items()}
        if site.transcodes:
            numbers[f"{name}/r2_written"] = site.written_fit().r2
    series["excerpt"] = excerpt(found)
    series["per_token"] = {hook: str(site.per_token) for hook, site in found.sites.items()}
    exploration = explored(inputs, found, stages)
    return measured_result("decomposition", found, stages, numbers, series=series, exploration=exploration)


# What the paper reports for Gemma 2 9B, layer 20 (abstract and figures 3, 4); printed beside our numbers, never mixed in.
PAPER_R2_VEC = "about 0.5"
PAPER_R2_NORM = "above 0.9"


CORE_COLUMNS = (  # (key, heading, format)
    ("explained_variance", "EV", "{:.3f}"),
    ("saebench/explained_variance", "EV, SAEBench's", "{:.3f}"),
    ("alive_share", "alive", "{:.0%}"),
    ("max_decoder_cosine", "decoder cosine", "{:.2f}"),
)


def table(result: Result) -> Table:
    """One row per SAE: the headline numbers, and SAEBench's core numbers (absent from results of earlier versions)."""
    return sae_table(result, CORE_COLUMNS)


def reading(result: Result) -> list[str]:
    """How much of the error is linear, and how well norms are predicted."""
    rows = sae_rows(result)

    def span(key: str, form: str) -> str:
        values = [row[key] for row in rows]
        low, high = form.format(min(values)), form.format(max(values))
        return low if low == high else f"{low} to {high}"

    lines = [
        f"A linear map of the activation explains {span('linear_share', '{:.0%}')} of the SAE error's energy on held-out text "
        f"(R² of the error vector {span('r2_vec', '{:.2f}')}; the paper, Gemma 2 9B: {PAPER_R2_VEC}).",
        f"The squared norm of the error is predicted with R² {span('r2_norm/error', '{:.2f}')} (the paper: {PAPER_R2_NORM}); "
        f"the squared norm of x itself, the baseline, with {span('r2_norm/x', '{:.2f}')}; "
        f"of the nonlinear error with {span('r2_norm/nonlinear', '{:.2f}')}.",
    ]
    if all("without_top_8/fvu" in row for row in rows):
        lines.append(
            f"Without the 8 directions in which x varies most, FVU is {span('without_top_8/fvu', '{:.3f}')} (with them "
            f"{span('fvu', '{:.3f}')}), and {span('without_top_8/linear_share', '{:.0%}')} of that error is linear."
        )
    if len(rows) > 1:
        narrow, wide = min(rows, key=lambda row: row["d_sae"]), max(rows, key=lambda row: row["d_sae"])
        lines.append(
            f"From {narrow['d_sae']} to {wide['d_sae']} latents FVU goes from {narrow['fvu']:.3f} to {wide['fvu']:.3f}, "
            f"FVU nonlinear from {narrow['fvu_nonlinear']:.3f} to {wide['fvu_nonlinear']:.3f}."
        )
    return lines


_ROOMY = 4  # number of bars whose labels fit side by side at full size
_MOST_LABELLED = 7  # more bars than this carry no numbers, and their names are turned sideways
NORM_TARGET_LABELS = {
    "x": "x",
    "sae": "Sae(x)",
    "error": "SaeError",
    "linear": "linear\nerror",
    "nonlinear": "nonlinear\nerror",
    "sae_plus_nonlinear": "Sae(x) +\nnonlinear",
}


def fvu_by_width(result: Result) -> Figure:
    """FVU of each SAE, split into the part that is linear in the activation and the nonlinear part."""
    saes = result.series["saes"]
    crowded = len(saes) > _MOST_LABELLED
    figure, axes = new_figure(3.8 if crowded else 2.8)
    for place, sae in enumerate(saes):
        fvu, nonlinear = (result.numbers[f"{sae['name']}/{key}"] for key in ("fvu", "fvu_nonlinear"))
        axes.bar(place, nonlinear, width=0.6, color=BLUE, label="nonlinear error" if place == 0 else None)
        axes.bar(
            place, fvu - nonlinear, width=0.6, bottom=nonlinear, color=SKY, label="linear error" if place == 0 else None
        )
        if crowded:
            continue
        axes.annotate(f"{fvu:.3f}", (place, fvu), ha="center", va="bottom", xytext=(0, 1), textcoords="offset points")
        share = result.numbers[f"{sae['name']}/linear_share"]
        text = f"{share:.0%}" if len(saes) > _ROOMY else f"{share:.0%} linear"
        axes.annotate(text, (place, (fvu + nonlinear) / 2), ha="center", va="center", fontsize=8)
        axes.annotate(f"{nonlinear:.3f}", (place, nonlinear / 2), ha="center", va="center", color="white")
    labels = [f"{sae['d_sae']} latents\nL0 {result.numbers[sae['name'] + '/l0']:.1f}" for sae in saes]
    if crowded:
        labels = [label.replace("\n", ", ") for label in labels]
    axes.set_xticks(range(len(saes)), labels, fontsize=9 if len(saes) <= _ROOMY else 7, rotation=90 if crowded else 0)
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("SAE error on held-out text, by what a linear map of x explains")
    axes.margins(y=0.12)
    legend_beside(axes)
    return figure


def norm_test(result: Result) -> Figure:
    """Norm prediction test: R2 of a linear map from x to the squared norm of six vectors, one bar per SAE."""
    saes = result.series["saes"]
    figure, axes = new_figure(2.9)
    width = 0.8 / len(saes)
    lowest = 0.0
    for number, sae in enumerate(saes):
        heights = [result.numbers[f"{sae['name']}/r2_norm/{target}"] for target in NORM_TARGETS]
        lowest = min([lowest, *(height for height in heights if math.isfinite(height))])
        places = [place + (number - (len(saes) - 1) / 2) * width for place in range(len(NORM_TARGETS))]
        axes.bar(places, heights, width=width, color=SERIES[number % len(SERIES)], label=f"{sae['d_sae']} latents")
    axes.set_xticks(range(len(NORM_TARGETS)), [NORM_TARGET_LABELS[target] for target in NORM_TARGETS])
    axes.set_ylabel("held-out R²")
    axes.set_ylim(lowest, 1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("How well a linear map of x predicts the squared norm of ...")
    legend_beside(axes)
    return figure


def per_token_error(result: Result) -> Figure | None:
    """Error of every SAE over a piece of held-out text, token by token, with the nonlinear error of the widest SAE.

    None for SAEs of several sites: their errors have no common scale.
    """
    if not (excerpt := result.series.get("excerpt")):
        return None
    tokens, norms = excerpt["tokens"], excerpt["squared_norm_x"]
    figure, axes = new_figure(3.2)
    places = range(len(tokens))
    names = [sae["name"] for sae in result.series["saes"]]
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    for number, name in enumerate(names):
        share = [error / norm for error, norm in zip(excerpt["squared_norms"][name]["error"], norms, strict=True)]
        colour = SERIES[number % len(SERIES)]
        axes.plot(places, share, color=colour, linewidth=1.2, label=f"error, {widths[name]} latents")
    last = names[-1]
    nonlinear = [part / norm for part, norm in zip(excerpt["squared_norms"][last]["nonlinear"], norms, strict=True)]
    axes.plot(
        places, nonlinear, color=GREY, linewidth=1, linestyle="--", label=f"nonlinear error,\n{widths[last]} latents"
    )
    token_axis(axes, tokens)
    axes.set_ylabel("squared norm / squared norm of x")
    axes.set_title("The same tokens are hard for every width")
    legend_beside(axes)
    return figure


FIGURES = {"fvu": fvu_by_width, "norm_test": norm_test, "per_token": per_token_error}
