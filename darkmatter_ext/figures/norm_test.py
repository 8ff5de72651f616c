"""Figures of `norm-test` (the paper's figure 7)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, GREY, ORANGE, interval_bars, legend_beside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "x": "x",
    "sae": "Sae(x)",
    "error": "SaeError(x)",
    "linear": "linear\nerror",
    "nonlinear": "nonlinear\nerror",
    "sae_plus_nonlinear": "Sae(x) +\nnonlinear",
}
_COLOURS = {"error": BLUE, "linear": GREEN, "nonlinear": ORANGE}


def _layers(saes: list[dict[str, Any]]) -> list[int]:
    """The layer of each SAE; the number of its site where hook points have other names."""
    try:
        return [parse_hook_point(sae["hook"]).layer for sae in saes]
    except ValueError:
        hooks = list(dict.fromkeys(sae["hook"] for sae in saes))
        return [hooks.index(sae["hook"]) for sae in saes]


def violins(result: Result) -> Figure:
    """R2 of the six norms over all SAEs: violins, and every SAE as a point, coloured by width (by layer, of many sites)."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    saes, numbers = result.series["saes"], result.numbers
    many_sites = len({sae["hook"] for sae in saes}) > 1
    values = _layers(saes) if many_sites else [sae["d_sae"] for sae in saes]
    norm = (Normalize if many_sites else LogNorm)(min(values), max(values) + (min(values) == max(values)))
    figure, axes = new_figure(3.2)
    l0s = [numbers[f"{sae['name']}/l0"] for sae in saes]
    ranks = [sorted(l0s).index(l0) for l0 in l0s]  # SAEs lie side by side in the order of their L0
    across = [0.5 * (rank / max(1, len(saes) - 1) - 0.5) for rank in ranks]
    points: Any = None
    for place, target in enumerate(LABELS):
        heights = [numbers[f"{sae['name']}/r2_norm/{target}"] for sae in saes]
        finite = [height for height in heights if math.isfinite(height)]  # a norm that does not vary has no R2
        if result.series["violins"] and finite:
            _violin(axes, finite, place)
        where = [place + offset for offset in across]
        points = axes.scatter(where, heights, c=values, norm=norm, cmap="viridis", s=14, zorder=3, linewidths=0)
        if target != "x":
            baseline = numbers[f"over_saes/r2_from_norm_of_x/{target}/median"]
            label = r"from $\|x\|^2$ alone (median)" if target == "sae" else "_"
            axes.hlines(baseline, place - 0.35, place + 0.35, colors="black", linestyles=":", label=label)
    axes.axhline(numbers["noise_floor"], color=GREY, linewidth=0.8, linestyle="--", label="noise floor")
    axes.set_xticks(range(len(LABELS)), list(LABELS.values()))
    axes.set_xlabel("squared norm of (points from left to right: by L0)")
    axes.set_ylabel("held-out R²")
    axes.set_title(f"Linear prediction of squared norms from x, {len(saes)} SAE{'s' if len(saes) > 1 else ''}")
    axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
    bar = figure.colorbar(points, ax=axes, pad=0.02, label="layer" if many_sites else "latents")
    if many_sites:
        bar.locator = MaxNLocator(integer=True)
    else:
        bar.set_ticks(sorted(set(values)), labels=[str(value) for value in sorted(set(values))])
        bar.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _violin(axes: Axes, heights: list[float], place: int) -> None:
    shape: Any = axes.violinplot([heights], positions=[place], widths=0.8, showextrema=False, showmedians=True)
    for body in shape["bodies"]:
        body.set(facecolor=GREY, alpha=0.25)
    shape["cmedians"].set(color="black", linewidth=1)


def by_sae(result: Result) -> Figure:
    """R2 of the norms of the error and its parts, SAE by SAE, with intervals."""
    saes = sorted(result.series["saes"], key=lambda sae: (sae["d_sae"], result.numbers[f"{sae['name']}/l0"]))
    figure, axes = new_figure(3.2)
    for number, (target, colour) in enumerate(_COLOURS.items()):
        heights, errors = interval_bars(result, [f"{sae['name']}/r2_norm/{target}" for sae in saes])
        where = [place + 0.2 * (number - 1) for place in range(len(saes))]
        label = LABELS[target].replace("\n", " ")
        axes.errorbar(where, heights, yerr=errors, fmt="o", color=colour, markersize=3, linewidth=1, label=label)
    if len(saes) <= 24:
        l0s = [result.numbers[f"{sae['name']}/l0"] for sae in saes]
        axes.set_xticks(range(len(saes)), [f"{sae['d_sae']}\n{l0:.0f}" for sae, l0 in zip(saes, l0s, strict=True)])
        axes.tick_params(axis="x", labelsize=6.5)
        axes.set_xlabel("SAE: latents, and below L0")
    else:
        axes.set_xlabel("SAEs in the order of their width, then L0")
    axes.set_ylabel("held-out R² of the squared norm")
    axes.set_title("The norms of the error and its parts, SAE by SAE")
    legend_beside(axes)
    return figure
