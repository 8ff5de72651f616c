"""Table and reading of `synthetic` (the paper's table 1)."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, with_interval


def table(result: Result) -> Table:
    """One row an SAE and planted quantity: where its energy went, and Pearson's r over the cells."""
    rows = []
    for sae in result.series["saes"]:
        for planted in result.series["planted"]:
            cells = [
                with_interval(result.numbers, f"{sae['name']}/{planted}/{kind}/{estimate}", "{:.2f}")
                for kind in ("share_as", "correlation")
                for estimate in result.series["estimated"]
            ]
            rows.append([f"{sae['name']}: {planted.replace('_', ' ')}", *cells])
    return Table(
        title=f"synthetic: {result.config['model']}, {result.config['hook']}, Sae(x) as the activation",
        headings=("planted", "estimated as linear", "as nonlinear", "r with linear", "r with nonlinear"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Where a unit of each planted energy is found, and how much of it is overfitting."""
    lines = []
    for sae_name in (sae["name"] for sae in result.series["saes"]):
        kinds = result.series["estimated"]
        noise, reconstruction, ablation = (
            [f"{result.numbers[f'{sae_name}/{planted}/share_as/{kind}']:.0%}" for kind in kinds]
            for planted in result.series["planted"]
        )
        lines.append(
            f"{sae_name}: noise in the activation is estimated as linear error to {noise[0]} and as nonlinear to "
            f"{noise[1]}; noise in the reconstruction {reconstruction[0]} and {reconstruction[1]} (planted: 0% and 100%); "
            f"ablated latents {ablation[0]} and {ablation[1]}."
        )
    return lines
