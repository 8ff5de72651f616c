"""Figure of `earlier-layers` (the paper's figure 10b)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, ORANGE, interval_bars, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {"error": ("SaeError(x)", BLUE), "linear": ("linear error", GREEN), "nonlinear": ("nonlinear error", ORANGE)}


def parts(result: Result) -> Figure:
    """R2 of each predictor for the error and its two parts, with intervals: a panel a part, a bar a predictor."""
    saes, predictors = result.series["saes"], list(result.series["predictors"])
    figure, panels = new_panels(0.9 + 0.26 * len(predictors), len(_PARTS), sharey=True)
    height = 0.8 / len(saes)
    for axes, (part, (title, colour)) in zip(panels, _PARTS.items(), strict=True):
        for number, sae in enumerate(saes):
            names = [f"{sae['name']}/r2_from/{predictor}/{part}" for predictor in predictors]
            lengths, errors = interval_bars(result, names)
            where = [place + (number - (len(saes) - 1) / 2) * height for place in range(len(predictors))]
            axes.barh(where, lengths, height, xerr=errors, color=colour, alpha=0.9, error_kw={"linewidth": 0.8})
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlim(min(0, axes.get_xlim()[0]), 1)
        axes.set_title(title)
    labels = [_label(name, about) for name, about in result.series["predictors"].items()]
    panels[0].set_yticks(range(len(predictors)), labels)
    panels[0].invert_yaxis()
    panels[1].set_xlabel("held-out R²" + (", SAEs from top to bottom as in the table" if len(saes) > 1 else ""))
    return figure


def _label(name: str, about: str) -> str:
    own = f"control: {name}" if about.startswith("control") else name
    return own if len(own) <= 28 else "…" + own[-27:]
