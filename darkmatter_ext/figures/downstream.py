"""Figures of `downstream` (the paper's figure 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, SKY, interval_bars, legend_beside, new_figure, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS = {
    "sae": ("Sae(x)", GREY),
    "linear": ("+ linear error", SKY),
    "nonlinear": ("+ nonlinear error", BLUE),
    "shuffled": ("+ another token's\nlinear error", ORANGE),
}


def losses(result: Result) -> Figure:
    """CE increase and KL of every setting of every SAE, with intervals over contexts."""
    saes = result.series["saes"]
    figure, panels = new_panels(2.9, 2)
    width = 0.8 / len(_SETTINGS)
    for axes, quantity, title in zip(panels, ("ce_increase", "kl"), ("Increase in cross-entropy", "KL"), strict=True):
        for number, (setting, (label, colour)) in enumerate(_SETTINGS.items()):
            places = [place + (number - (len(_SETTINGS) - 1) / 2) * width for place in range(len(saes))]
            names = [f"{sae['name']}/{setting}/{quantity}" for sae in saes]
            heights, errors = interval_bars(result, names)
            axes.bar(places, heights, width=width, color=colour, label=label, yerr=errors, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(saes)), [f"{sae['d_sae']}\nlatents" for sae in saes])
        axes.set_title(title)
        axes.axhline(0, color="black", linewidth=0.6)
    panels[0].set_ylabel("nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_SETTINGS))
    return figure


def recovered(result: Result) -> Figure:
    """CE recovered by adding a part of the error back, against that part's share of the error."""
    figure, axes = new_figure(3.2)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--", label="in proportion")
    for setting, marker in (("linear", "o"), ("nonlinear", "s")):
        label, colour = _SETTINGS[setting]
        names = [f"{sae['name']}/{setting}" for sae in result.series["saes"]]
        heights, errors = interval_bars(result, [f"{name}/ce_recovered" for name in names])
        shares = [result.numbers[f"{name}/share_of_fvu"] for name in names]
        axes.errorbar(
            shares, heights, yerr=errors, fmt=marker, color=colour, markersize=5, linewidth=1, label=f"Sae(x) {label}"
        )
        for sae, share, height, above in zip(result.series["saes"], shares, heights, errors[1], strict=True):
            place = (share, height + above)
            axes.annotate(str(sae["d_sae"]), place, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(100, axes.get_ylim()[1]))
    axes.set_xlabel("share of the error's energy put back, %")
    axes.set_ylabel("CE increase recovered, %")
    axes.set_title("Does each part of the error cost its share?")
    legend_beside(axes)
    return figure
