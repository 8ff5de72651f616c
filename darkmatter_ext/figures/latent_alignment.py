"""Figures of `latent-alignment` (the paper's figure 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, interval_bars, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TARGETS = {"error": "a* of the error", "nonlinear": "a* of the nonlinear error", "x": "a* of x"}
_ROWS = {
    "decoder": ("decoder rows", BLUE),
    "permuted": ("rows permuted", GREY),
    "random": ("random directions", ORANGE),
}


def scatter(result: Result) -> Figure:
    """W_dec . a* against the mean active value, a point a latent that fired, of the widest SAE."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    sae = max(result.series["saes"], key=lambda sae: sae["d_sae"])
    fired = result.arrays[f"{sae['name']}/fired"]
    kept, values = fired > 0, result.arrays[f"{sae['name']}/mean_active_value"]
    figure, panels = new_panels(2.9, len(_TARGETS), sharey=True)
    norm = LogNorm(max(1.0, float(fired[kept].min())), max(2.0, float(fired.max())))
    order = fired[kept].argsort()  # frequent latents on top
    for axes, (target, title) in zip(panels, _TARGETS.items(), strict=True):
        alignment = result.arrays[f"{sae['name']}/alignment/{target}"]
        points = axes.scatter(
            alignment[kept][order],
            values[kept][order],
            c=fired[kept][order],
            norm=norm,
            cmap="viridis",
            s=4,
            linewidths=0,
            rasterized=True,
        )
        axes.axvline(0, color="black", linewidth=0.6)
        pearson = result.numbers[f"{sae['name']}/{target}/decoder/pearson"]
        axes.set_title(f"{title}\nPearson {pearson:.2f}", fontsize=8.5)
        axes.set_xlabel("W_dec · a*")
        axes.set_yscale("log")
        if target == "x":
            figure.colorbar(points, ax=axes, label="tokens where active")
    panels[0].set_ylabel("mean active value")
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    return figure


def correlations(result: Result) -> Figure:
    """Pearson and Spearman correlation of every SAE, with intervals, beside the controls."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.7, len(_TARGETS), sharey=True)
    kinds = ("pearson", "spearman")
    groups = [(sae, kind) for kind in kinds for sae in saes]
    for axes, (target, title) in zip(panels, _TARGETS.items(), strict=True):
        for number, (row, (label, colour)) in enumerate(_ROWS.items()):
            names = [f"{sae['name']}/{target}/{row}/{kind}" for sae, kind in groups]
            heights, errors = interval_bars(result, names)
            where = [place + 0.22 * (number - 1) for place in range(len(groups))]
            axes.errorbar(where, heights, yerr=errors, fmt="o", color=colour, markersize=3.5, linewidth=1, label=label)
        axes.axhline(0, color="black", linewidth=0.6)
        middles = [(len(saes) - 1) / 2 + number * len(saes) for number in range(len(kinds))]
        axes.set_xticks(middles, [kind.capitalize() for kind in kinds])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_title(title, fontsize=8.5)
        if len(saes) > 1:
            axes.axvline(len(saes) - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    panels[0].set_ylabel("correlation with\nmean active value")
    if len(saes) > 1:
        panels[1].set_xlabel("SAEs from left to right as in the table")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_ROWS))
    return figure
