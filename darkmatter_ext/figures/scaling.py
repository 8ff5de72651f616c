"""Figures of `scaling` (the paper's figures 1 to 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    SKY,
    WIDTH,
    interval_bars,
    new_figure,
    new_panels,
    width_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_L0_STEP = 1.25  # SAEs whose L0 differ by less are one line
QUANTITIES = {
    "fvu": "FVU",
    "fvu_nonlinear": "FVU nonlinear",
    "r2_vec": "R² of the error vector",
    "r2_norm/error": "R² of the error's norm",
}


def _lines(result: Result) -> list[tuple[float, list[dict[str, Any]]]]:
    """SAEs grouped by about the same L0, least first, each group by width."""
    l0 = {sae["name"]: result.numbers[f"{sae['name']}/l0"] for sae in result.series["saes"]}
    groups: list[list[dict[str, Any]]] = []
    for sae in sorted(result.series["saes"], key=lambda sae: l0[sae["name"]]):
        if groups and l0[sae["name"]] <= _L0_STEP * l0[groups[-1][0]["name"]]:
            groups[-1].append(sae)
        else:
            groups.append([sae])
    mean = [math.fsum(l0[sae["name"]] for sae in group) / len(group) for group in groups]
    return [(value, sorted(group, key=lambda sae: sae["d_sae"])) for value, group in zip(mean, groups, strict=True)]


def lines(result: Result) -> Figure:
    """FVU and FVU_nonlinear over width, one line an L0, with the power law at its L0."""
    figure, panels = new_panels(3.3, 2, sharey=True)
    for axes, quantity in zip(panels, ("fvu", "fvu_nonlinear"), strict=True):
        for number, (l0, saes) in enumerate(_lines(result)):
            values, errors = interval_bars(result, [f"{sae['name']}/{quantity}" for sae in saes])
            axes.errorbar(
                [sae["d_sae"] for sae in saes], values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1,
                color=SERIES[number % len(SERIES)], label=f"L0 {l0:.0f}",
            )  # fmt: skip
        width_axis(axes, [sae["d_sae"] for sae in result.series["saes"]])
        axes.set_title(QUANTITIES[quantity])
        axes.set_ylim(bottom=0)
    if result.series["law"]:
        _draw_law(panels[0], result)
    panels[0].set_ylabel("fraction of variance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _draw_law(axes: Axes, result: Result) -> None:
    c, a, m = (result.numbers[f"law/{name}"] for name in "cam")
    widths = [sae["d_sae"] for sae in result.series["saes"]]
    low, high = math.log2(min(widths)), math.log2(max(widths))
    places = [2 ** (low + (high - low) * step / 60) for step in range(61)]
    axes.plot(
        places,
        [c + a * width**m for width in places],
        color="black",
        linewidth=1.1,
        linestyle="--",
        zorder=3,
        label="c + a Wᵐ",
    )
    axes.axhline(c, color=GREY, linewidth=0.9, linestyle=":", label="c")


def contours(result: Result) -> Figure:
    """FVU, FVU_nonlinear, R2 of the error vector and of its norm over width and L0."""
    from matplotlib.figure import Figure

    saes = result.series["saes"]
    x = [math.log2(sae["d_sae"]) for sae in saes]
    y = [math.log2(max(1e-3, result.numbers[f"{sae['name']}/l0"])) for sae in saes]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(2, 2).flat, QUANTITIES.items(), strict=True):
        values = [result.numbers[f"{sae['name']}/{quantity}"] for sae in saes]
        if _spread(x, y):
            shown = axes.tricontourf(x, y, values, levels=10, cmap="viridis")
            figure.colorbar(shown, ax=axes, format="%.3f")
            axes.plot(x, y, "o", color="white", markeredgecolor="black", markersize=4)
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
    """Whether three of the points make a triangle wide enough to interpolate in."""
    import numpy as np

    if len(x) < 3:
        return False
    points = np.stack([x, y], axis=1)
    return bool(np.linalg.svd(points - points.mean(0), compute_uv=False)[1] > 0.1)


def breakdown(result: Result) -> Figure:
    """FVU at each width of the law, stacked: absent latents, linear error, what pursuit removes, the rest (figure 1)."""
    figure, axes = new_figure(3.0)
    names = result.series["law"]
    if not names:
        axes.annotate("no power law: too few widths at one L0", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return figure
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    bottom = [0.0] * len(names)
    linear = result.numbers["breakdown/linear"]
    parts = {
        "rest": (BLUE, "nonlinear error that stays" if result.series["with_pursuit"] else "nonlinear error"),
        "encoder": (ORANGE, "removed by pursuit"),
        "linear": (SKY, "linear error at any width"),
        "absent": (GREEN, "absent latents"),
    }
    for key, (colour, label) in parts.items():
        if key == "encoder" and not result.series["with_pursuit"]:
            continue
        heights = [linear if key == "linear" else result.numbers[f"{name}/breakdown/{key}"] for name in names]
        heights = [max(0.0, height) for height in heights]
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.fill_between([widths[name] for name in names], bottom, top, color=colour, linewidth=0, label=label)
        bottom = top
    places = [widths[name] for name in names]
    axes.plot(places, [result.numbers[f"{name}/fvu"] for name in names], "o", color="black", markersize=4, label="FVU")
    values, errors = interval_bars(result, ["law/c"])
    axes.errorbar(
        [max(places) * 1.1], values, yerr=errors, fmt="D", color=GREY, markersize=4, linewidth=1, label="c, 95 %"
    )
    width_axis(axes, places)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of variance")
    l0 = [result.numbers[f"{name}/l0"] for name in names]
    axes.set_title(
        f"What the error is made of, L0 {min(l0):.0f}" + (f" to {max(l0):.0f}" if max(l0) > min(l0) + 1 else "")
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1))
    return figure
