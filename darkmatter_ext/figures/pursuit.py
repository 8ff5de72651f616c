"""Figures of `pursuit` (the paper's figure 10a)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, ORANGE, interval_bars, new_panels, width_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIANTS = {
    "encoder": ("the SAE's own encoder", BLUE, "o"),
    "pursuit": ("pursuit, same L0", ORANGE, "s"),
    "refit": ("the encoder's latents, refitted", GREEN, "^"),
}


def by_width(result: Result) -> Figure:
    """FVU and FVU_nonlinear over width with the encoder, with pursuit at its L0, and with its latents refitted."""
    figure, panels = new_panels(3.0, 2)
    titles = {"fvu": "FVU", "fvu_nonlinear": "FVU nonlinear"}
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for variant, (label, colour, marker) in _VARIANTS.items():
            saes = [sae for sae in result.series["saes"] if sae["variant"] == variant]
            saes.sort(key=lambda sae: sae["d_sae"])
            values, errors = interval_bars(result, [f"{sae['name']}/{quantity}" for sae in saes])
            style = f"{marker}-" if len({sae["d_sae"] for sae in saes}) == len(saes) else marker
            axes.errorbar(
                [sae["d_sae"] for sae in saes], values, yerr=errors, fmt=style, markersize=4, linewidth=1,
                color=colour, label=label,
            )  # fmt: skip
        width_axis(axes, [sae["d_sae"] for sae in result.series["saes"]])
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("fraction of variance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
