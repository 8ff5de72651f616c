"""Figures of `pathology`: Sae(x) against null models by layer, and the per-token gap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREY,
    ORANGE,
    SERIES,
    interval_bars,
    legend_beside,
    new_panels,
    row_bars,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "random": "random direction",
    "same_angle": "same angle to x",
    "error_covariance": "covariance of the errors",
    "mixture": "mixture of activations",
    "shuffled": "another token's error",
    "norm_only": "norm alone (nearer)",
}


def ratios(result: Result) -> Figure:
    """How many times each null's KL, and CE increase, that of Sae(x) is; a line at 1, where the error is ordinary."""
    saes = result.series["saes"]
    figure, panels = new_panels(3.3, 2)
    step = 0.09
    titles = {"kl_ratio": "KL of Sae(x) / KL of ...", "ce_increase_ratio": "CE increase of Sae(x) / of ..."}
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for number, null in enumerate(name for name in result.series["nulls"] if name != "norm_only"):
            places = [place + (number - 2) * step for place in range(len(saes))]
            values, errors = interval_bars(result, [f"{sae['name']}/{null}/{quantity}" for sae in saes])
            axes.errorbar(
                places, values, yerr=errors, fmt="o", markersize=3.5, linewidth=1, color=SERIES[number],
                label=_LABELS[null],
            )  # fmt: skip
        axes.set_xticks(range(len(saes)), [_sae_label(result, sae) for sae in saes])
        axes.set_ylim(bottom=0)
        axes.set_title(title)
    panels[0].set_ylabel("times")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _sae_label(result: Result, sae: dict[str, Any]) -> str:
    several = len({entry["d_sae"] for entry in result.series["saes"]}) > 1
    return f"block {sae['layer']}" + (f"\n{sae['d_sae']}" if several else "")


def gap(result: Result) -> Figure:
    """KL(Sae) less KL(random) by frequency of the token and by position, one line an SAE, with counts."""
    figure, panels = new_panels(3.3, 2, sharey=True)
    for axes, table, label in zip(
        panels,
        ("frequency", "position"),
        ("times the token occurs in the text", "position in the context"),
        strict=True,
    ):
        groups = {row["label"]: row["count"] for gaps in result.series["gaps"].values() for row in gaps[table]}
        names = sorted(groups, key=lambda name: int(name.split(" ")[0]))
        for number, sae in enumerate(result.series["saes"]):
            rows = {row["label"]: row for row in result.series["gaps"][sae["name"]][table]}
            shift = (number - (len(result.series["saes"]) - 1) / 2) * 0.08
            shown = [(place + shift, rows[name]) for place, name in enumerate(names) if name in rows]
            _gap_line(axes, shown, SERIES[number % len(SERIES)], _sae_label(result, sae))
        axes.axhline(0, color="black", linewidth=0.6)
        labels = [f"{name} (n {groups[name]})" for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_xlabel(label)
    panels[0].set_ylabel("KL(Sae) − KL(random), nats")
    legend_beside(panels[1])
    return figure


def _gap_line(axes: Axes, shown: list[tuple[float, dict[str, Any]]], colour: str, label: str) -> None:
    places, rows = [place for place, _ in shown], [row for _, row in shown]
    values, errors = [row["value"] for row in rows], row_bars(rows)
    axes.errorbar(places, values, yerr=errors, fmt="o-", markersize=3, linewidth=1, color=colour, label=label)


def gap_by_token(result: Result) -> Figure:
    """The tokens with the largest and the smallest gap, for the first SAE and the last, with counts and intervals."""
    saes = result.series["saes"]
    chosen = [saes[0]] if len(saes) == 1 else [saes[0], saes[-1]]
    rows = [result.series["gaps"][sae["name"]]["token"] for sae in chosen]
    figure, panels = new_panels(1.2 + 0.14 * max(map(len, rows)), len(chosen))
    for axes, sae, own in zip(panels, chosen, rows, strict=True):
        for place, row in enumerate(own):
            colour = ORANGE if row["value"] > 0 else BLUE
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1)
            axes.plot(row["value"], place, "o", color=colour, markersize=3)
        axes.set_yticks(
            range(len(own)), [f"{visible(row['label'], strip=False)}  ({row['count']})" for row in own], fontsize=7
        )
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.set_title(f"{_sae_label(result, sae)}: token (count)".replace("\n", ", "))
        axes.set_xlabel("KL(Sae) − KL(random), nats")
    return figure
