"""Table and reading of `downstream`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

PAPER = "the nonlinear error carries a proportional share of the increase in CE"


def table(result: Result) -> Table:
    """One row a splice: what it costs, what it recovers, and the share of the error it puts back."""
    numbers = result.numbers
    rows = []
    for name in result.series["controls"]:
        rows.append([name.replace("_", " "), *_losses(result, name), "", ""])
    for sae in result.series["saes"]:
        for setting in result.series["settings"]:
            splice = f"{sae['name']}/{setting}"
            label = f"{sae['name']}" if setting == "sae" else f"{sae['name']} + {setting}"
            recovered = with_interval(numbers, f"{splice}/ce_recovered", "{:.0f}%") if setting != "sae" else ""
            share = numbers.get(f"{splice}/share_of_fvu")
            rows.append([label, *_losses(result, splice), recovered, "" if share is None else shown(share, "{:.0f}%")])
    return Table(
        title=f"downstream: {result.config['model']}, {result.config['hook']}, held-out contexts, "
        f"CE of the model {numbers['ce_original']:.3f}",
        headings=("spliced in", "CE increase, nats", "KL, nats", "CE recovered", "share of error put back"),
        rows=rows,
    )


def _losses(result: Result, name: str) -> list[str]:
    return [with_interval(result.numbers, f"{name}/{quantity}", "{:.3f}") for quantity in ("ce_increase", "kl")]


def reading(result: Result) -> list[str]:
    """Recovery against the share of the error, for each SAE, and whether the interval leaves the share out."""
    numbers, lines = result.numbers, []
    for sae in result.series["saes"]:
        parts = []
        for setting in ("linear", "nonlinear"):
            name = f"{sae['name']}/{setting}"
            share = numbers[f"{name}/share_of_fvu"]
            low, high = (numbers[f"{name}/ce_recovered/{end}"] for end in ("low", "high"))
            verdict = (
                "less than its share" if high < share else "more than its share" if low > share else "in proportion"
            )
            parts.append(
                f"the {setting} error, {share:.0f}% of FVU, recovers "
                f"{with_interval(numbers, f'{name}/ce_recovered', '{:.0f}%')} of the CE increase: {verdict}"
            )
        lines.append(f"{sae['name']}: {'; '.join(parts)}.")
    return [*lines, f"The paper, Gemma 2 9B: {PAPER}."]
