"""What all figures share: palette, sizes, and small drawing helpers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any colour vision.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#7F7F7F"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", SKY)
WIDTH = 6.4  # inches: full text width of a paper
_ENDS = {"value": "", "low": "/low", "high": "/high"}  # suffixes of an interval's numbers in a result
STYLE: Any = {  # Any, because matplotlib types the keys as literals
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.bbox": "tight",
}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of full text width with one pair of axes; `height` in inches."""
    figure, axes = new_panels(height, 1)
    return figure, axes[0]


def new_panels(height: float, columns: int, *, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of full text width with panels side by side, row by row; `options` as for `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def token_axis(axes: Axes, tokens: Sequence[str]) -> None:
    """Label the x axis with every token of a text, one position each; y starts at 0."""
    axes.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=90, fontsize=6)
    axes.set_xlim(0, len(tokens) - 1)
    axes.set_ylim(bottom=0)


def width_axis(axes: Axes, widths: Sequence[int]) -> None:
    """Dictionary widths on a logarithmic x axis, with a tick at each."""
    places = sorted(set(widths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(width) if width < 2**14 else f"{width // 2**10}k" for width in places])
    axes.minorticks_off()
    axes.set_xlabel("latents")


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def interval_bars(result: Result, names: Sequence[str]) -> tuple[list[float], list[list[float]]]:
    """Values and matplotlib error bars [below, above] for numbers that have intervals."""
    rows = [{key: result.numbers[f"{name}{end}"] for key, end in _ENDS.items()} for name in names]
    return [row["value"] for row in rows], row_bars(rows)


def row_bars(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Error bars [below, above] for rows with value, low and high; zero length if there is no interval."""

    def length(row: Mapping[str, Any], end: str, sign: int) -> float:
        known = row[end] is not None and math.isfinite(row[end])
        return max(0.0, sign * (row[end] - row["value"])) if known else 0.0

    return [[length(row, end, sign) for row in rows] for end, sign in (("low", -1), ("high", 1))]


def visible(token: str, *, strip: bool = True) -> str:
    """A token made legible on an axis: no maths mode; white space is shown, around words only if not `strip`."""
    shown = (token.strip() if strip else "") or token.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return shown.replace("$", r"\$")
