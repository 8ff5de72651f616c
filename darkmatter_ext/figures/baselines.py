"""Figures of `baselines` (the paper's figure 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import GREY, SERIES, interval_bars, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
_LABELLED = 8  # SAEs whose labels fit below a panel


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
    """Places and labels: blocks, with the width where widths differ; every few where there are many."""
    several = len({sae["d_sae"] for sae in saes}) > 1
    places = list(range(0, len(saes), 1 + (len(saes) - 1) // _LABELLED))
    return places, [str(saes[at]["layer"]) + (f"\n{saes[at]['d_sae']}" if several else "") for at in places]
