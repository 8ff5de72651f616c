"""Figures of `decomposition`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, SERIES, SKY, legend_beside, new_figure, token_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROOMY = 4  # bars whose labels fit side by side in full size
_MOST_LABELLED = 7  # more have no numbers in them, and names on their side
NORM_TARGET_LABELS = {
    "x": "x",
    "sae": "Sae(x)",
    "error": "SaeError",
    "linear": "linear\nerror",
    "nonlinear": "nonlinear\nerror",
    "sae_plus_nonlinear": "Sae(x) +\nnonlinear",
}


def fvu_by_width(result: Result) -> Figure:
    """FVU of each SAE, split into the part linear in the activation and the nonlinear part."""
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
    """Norm prediction test: R2 of a linear map from x to the squared norm of six vectors, one bar an SAE."""
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


def per_token_error(result: Result) -> Figure:
    """Error of every SAE over a piece of held-out text, token by token, with the nonlinear error of the widest."""
    excerpt = result.series["excerpt"]
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
