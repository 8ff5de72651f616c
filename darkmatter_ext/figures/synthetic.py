"""Figures of `synthetic` (the paper's figure 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, SKY, WIDTH, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def noise_grid(result: Result) -> Figure:
    """Estimated linear and nonlinear error over the two noises, nothing ablated; one row of panels an SAE."""
    from matplotlib.figure import Figure

    saes, levels = result.series["saes"], result.config["levels"]
    figure = Figure(figsize=(WIDTH, 2.9 * len(saes)), layout="constrained")
    panels = figure.subplots(len(saes), 2, squeeze=False, sharey=True)
    for row, sae in zip(panels, saes, strict=True):
        cells = result.series["grids"][sae["name"]]["estimated"]
        top = max(max(entry[0]) for line in cells for entry in line)
        for axes, (which, title) in zip(row, enumerate(("linear", "nonlinear")), strict=True):
            values = [[cells[a][r][0][which] for r in range(len(levels))] for a in range(len(levels))]
            axes.imshow(values, origin="lower", cmap="cividis", vmin=0, vmax=top, aspect="auto")
            for a, line in enumerate(values):
                for r, value in enumerate(line):
                    colour = "black" if value > 0.5 * top else "white"
                    axes.annotate(f"{value:.1f}", (r, a), ha="center", va="center", fontsize=8, color=colour)
            ticks = [f"{level:g}" for level in levels]
            axes.set_xticks(range(len(levels)), ticks)
            axes.set_yticks(range(len(levels)), ticks)
            axes.set_xlabel("noise on the reconstruction, std")
            axes.set_title(f"Estimated {title} error" + (f", {sae['d_sae']} latents" if len(saes) > 1 else ""))
        row[0].set_ylabel("noise on the activation, std")
    return figure


def ablation(result: Result) -> Figure:
    """Estimated error without noise against the energy of the ablated latents, which it adds up to."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.7, len(saes), sharey=True)
    for axes, sae in zip(panels, saes, strict=True):
        grid = result.series["grids"][sae["name"]]
        shares = [100 * share for share in result.config["ablations"]]
        linear, nonlinear = ([cell[which] for cell in grid["estimated"][0][0]] for which in (0, 1))
        axes.stackplot(
            shares, nonlinear, linear, colors=(BLUE, SKY), labels=("estimated nonlinear", "estimated linear")
        )
        axes.plot(
            shares, [cell[2] for cell in grid["planted"][0][0]], "ko--", markersize=3, linewidth=1, label="planted"
        )
        axes.set_xlabel("weakest active latents ablated, %")
        axes.set_title(f"Ablation without noise, {sae['d_sae']} latents")
    panels[0].set_ylabel("error, units of noise level 1")
    panels[0].legend(loc="upper left")
    return figure
