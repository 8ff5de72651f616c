"""Quantities of SAEs over width and L0: filled contours where the points form a triangle, else the points alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from darkmatter_ext.report.style import WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def contour_panels(x: list[float], y: list[float], quantities: dict[str, list[float]]) -> Figure:
    """Four panels, one a title: values at x (log2 of the latents) and y (log2 of L0)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, quantities.items(), strict=True):
        if _spread(x, y):
            shown = axes.tricontourf(x, y, values, levels=10, cmap="viridis")
            figure.colorbar(shown, ax=axes, format="%.3f")
            axes.scatter(x, y, c=values, cmap=shown.cmap, norm=shown.norm, edgecolors="black", s=16)
        else:  # all SAEs on one line: nothing to interpolate between
            shown = axes.scatter(x, y, c=values, cmap="viridis", edgecolors="black")
            figure.colorbar(shown, ax=axes, format="%.3f")
        axes.set_title(title)
        _log2_ticks(axes, x, y)
    return figure


def _log2_ticks(axes: Axes, x: list[float], y: list[float]) -> None:
    for axis, values in ((axes.xaxis, x), (axes.yaxis, y)):
        powers = range(math.floor(min(values)), math.ceil(max(values)) + 1)
        axis.set_ticks(list(powers), [str(2**power) if power < 14 else f"{2 ** (power - 10)}k" for power in powers])
    axes.set_xlim(min(x) - 0.2, max(x) + 0.2)
    axes.set_ylim(min(y) - 0.2, max(y) + 0.2)
    axes.set_xlabel("latents")
    axes.set_ylabel("L0")


def _spread(x: list[float], y: list[float]) -> bool:
    """Whether three of the points form a triangle wide enough to interpolate in."""
    import numpy as np

    if len(x) < 3:
        return False
    points = np.stack([x, y], axis=1)
    return bool(np.linalg.svd(points - points.mean(0), compute_uv=False)[1] > 0.1)
