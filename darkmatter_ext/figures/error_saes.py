"""Figures of `error-saes` (the paper's figure 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    interval_bars,
    legend_beside,
    new_figure,
    row_bars,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_JUDGED = {"linear": (SKY, "o"), "nonlinear": (BLUE, "s"), "activation": (GREEN, "^"), "random": (GREY, "x")}


def fvu(result: Result) -> Figure:
    """FVU of the SAEs trained on each part of the error, with intervals over seeds, and their controls."""
    figure, axes = new_figure(2.7)
    targets = ("linear", "nonlinear")
    values, errors = interval_bars(result, [f"{target}/fvu" for target in targets])
    axes.bar([0, 1], values, yerr=errors, width=0.5, color=[SKY, BLUE], error_kw={"linewidth": 0.8})
    for place, (value, above) in enumerate(zip(values, errors[1], strict=True)):
        axes.annotate(
            f"{value:.3f}", (place, value + above), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom"
        )
    for key, colour, label in (
        ("random_dictionary", GREY, "random dictionary, pursuit"),
        ("shuffled_decoder", ORANGE, "decoder rows permuted"),
    ):
        heights = [result.numbers[f"{target}/fvu_{key}"] for target in targets]
        for place, height in enumerate(heights):
            axes.plot(
                [place - 0.3, place + 0.3], [height] * 2, color=colour, linewidth=1.5, label=None if place else label
            )
    axes.set_xticks([0, 1], ["SAE on the\nlinear error", "SAE on the\nnonlinear error"])
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("Equal latents, L0, tokens and steps")
    legend_beside(axes)
    return figure


def detection(result: Result) -> Figure:
    """Detection accuracy per decile of activation, with intervals over latents."""
    figure, axes = new_figure(2.9)
    for number, (name, judged) in enumerate(result.series["judged"].items()):
        colour, marker = _JUDGED[name]
        rows = judged["deciles"]
        places = [place + 1 + (number - 1.5) * 0.1 for place in range(len(rows))]
        axes.errorbar(
            places, [row["value"] for row in rows], yerr=row_bars(rows), fmt=f"{marker}-", color=colour, markersize=4,
            linewidth=1, label=result.series["about"][name].replace(": ", ":\n"),
        )  # fmt: skip
    if not result.series["judged"]:
        axes.annotate("no latents were judged (--latents 0)", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return figure
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("decile of activation, weakest to strongest")
    axes.set_ylabel("balanced detection accuracy")
    axes.set_title("Can one tell from the explanation where a latent is active?")
    legend_beside(axes)
    return figure
