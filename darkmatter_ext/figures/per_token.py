"""Figures of `per-token` (the paper's figures 5 and 6)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import SERIES, new_panels, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOMY = 4  # cells a row that have room for an interval
_TITLES = {"r2": "R² of the error norm", "gain": "gain from the nonlinear norm, %"}


def matrices(result: Result) -> Figure:
    """R2 of a larger SAE's error norm from a smaller one's, and the gain when the nonlinear norm joins, with intervals."""
    saes = result.series["saes"]
    figure, panels = new_panels(min(6.0, 1.2 + 0.48 * len(saes)), 2)
    for axes, (quantity, title) in zip(panels, _TITLES.items(), strict=True):
        _matrix(axes, result, quantity, "{:.3f}" if quantity == "r2" else "{:.1f}")
        axes.set_title(title)
        axes.set_xlabel("SAE predicted, latents")
    panels[0].set_ylabel("from the SAE with latents")
    return figure


def _matrix(axes: Axes, result: Result, quantity: str, form: str) -> None:
    """The upper triangle: row predicts column; text dark on light cells and light on dark ones."""
    saes, last = result.series["saes"], len(result.series["saes"]) - 1
    names = [sae["name"] for sae in saes]
    values = [
        [result.numbers[f"{quantity}/{first}/{second}"] if j > i else math.nan for j, second in enumerate(names) if j]
        for i, first in enumerate(names[:-1])
    ]
    axes.imshow(values, cmap="Blues", aspect="auto")
    finite = [value for row in values for value in row if math.isfinite(value)]
    dark = min(finite, default=0.0) + 0.55 * (max(finite, default=0.0) - min(finite, default=0.0))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isfinite(value):
                continue
            key = f"{quantity}/{names[i]}/{names[j + 1]}"
            colour = "white" if value > dark else "black"
            axes.text(j, i - 0.1, form.format(value), ha="center", va="center", color=colour, fontsize=9)
            low, high = (result.numbers[f"{key}/{end}"] for end in ("low", "high"))
            if last <= _ROOMY and math.isfinite(low):
                interval = f"{form.format(low)} to {form.format(high)}"
                axes.text(j, i + 0.25, interval, ha="center", va="center", color=colour, fontsize=6)
    labels = _labels(saes)
    axes.set_xticks(range(last), labels[1:], fontsize=8)
    axes.set_yticks(range(last), labels[:-1], fontsize=8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _labels(saes: list[dict[str, Any]]) -> list[str]:
    """Widths, or names where SAEs share one."""
    widths = [str(sae["d_sae"]) for sae in saes]
    return widths if len(set(widths)) == len(widths) else [sae["name"] for sae in saes]


def curves(result: Result) -> Figure:
    """Norms of the error and of the nonlinear error of every SAE over a piece of held-out text, token by token."""
    excerpt, saes = result.series["excerpt"], result.series["saes"]
    figure, panels = new_panels(4.6, 1, rows=2, sharex=True, sharey=True)
    for axes, part in zip(panels, ("error", "nonlinear"), strict=True):
        for number, (sae, label) in enumerate(zip(saes, _labels(saes), strict=True)):
            norms = [math.sqrt(square) for square in excerpt["squared_norms"][sae["name"]][part]]
            axes.plot(norms, color=SERIES[number % len(SERIES)], linewidth=1.1, label=label)
        axes.set_ylabel(f"norm of the\n{part} error" if part != "error" else "norm of the error")
        token_axis(axes, excerpt["tokens"])
    panels[0].set_title("A token's error in SAEs of every width")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(saes)), title="latents")
    return figure
