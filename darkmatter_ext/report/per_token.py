"""Table and reading of `per-token`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval


def _pairs(result: Result) -> list[tuple[str, str]]:
    """Predicting and predicted SAE, the smaller one first."""
    names = [sae["name"] for sae in result.series["saes"]]
    return [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]


def table(result: Result) -> Table:
    """One row a pair: R2 of the larger SAE's error norm, what further predictors gain; below, the controls of each SAE."""
    numbers = result.numbers
    rows = [
        [
            f"{first} → {second}",
            with_interval(numbers, f"r2/{first}/{second}", "{:.3f}"),
            with_interval(numbers, f"gain/{first}/{second}", "{:.1f}%"),
            with_interval(numbers, f"gain_from_x/{first}/{second}", "{:.1f}%"),
        ]
        for first, second in _pairs(result)
    ]
    for name, label in (("x_norm", "norm of x"), ("shuffled", "another token's error norm")):
        for sae in result.series["saes"]:
            rows.append([f"{label} → {sae['name']}", with_interval(numbers, f"{name}/{sae['name']}", "{:.3f}"), "", ""])
    return Table(
        title=f"per-token: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=("error norm of → of", "R²", "gain, nonlinear norm", "gain, norm of x instead"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How well smaller SAEs know which tokens are hard for larger ones, and whether the nonlinear norm adds to it."""
    numbers, pairs, saes = result.numbers, _pairs(result), result.series["saes"]

    def span(keys: list[str], form: str) -> str:
        values = sorted(numbers[key] for key in keys)
        low, high = shown(values[0], form), shown(values[-1], form)
        return low if low == high else f"{low} to {high}"

    def of_pairs(quantity: str) -> list[str]:
        return [f"{quantity}/{first}/{second}" for first, second in pairs]

    gains = of_pairs("gain")
    above = sum(numbers[f"{key}/low"] > 0 for key in gains)
    larger = sum(numbers[key] > numbers[key.replace("gain/", "gain_from_x/", 1)] for key in gains)
    names = [sae["name"] for sae in saes]
    first, last = names[0], names[-1]
    return [
        f"The error norm of a smaller SAE predicts, token by token, that of a larger one with R² "
        f"{span(of_pairs('r2'), '{:.2f}')}; from {first} to {last} with "
        f"{with_interval(numbers, f'r2/{first}/{last}', '{:.2f}')}.",
        f"The norm of the smaller SAE's nonlinear error explains {span(gains, '{:.0f}%')} of what that leaves (beyond the "
        f"interval for {above} of {len(pairs)} pairs); the norm of x in its place {span(of_pairs('gain_from_x'), '{:.0f}%')} "
        f"(less for {larger} of {len(pairs)}).",
        f"Controls: the norm of x alone has R² {span([f'x_norm/{name}' for name in names], '{:.2f}')}, "
        f"another token's error norm {span([f'shuffled/{name}' for name in names], '{:.4f}')}.",
    ]
