"""Table and reading of `norm-test`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

PAPER = "more than 90 % of the norm of the error is linearly predictable; R2 of 0.7 to 0.95 at middle layers"
_ENDS = ("median", "least", "greatest")


def table(result: Result) -> Table:
    """One row a norm: median and range over SAEs, from x and from its norm alone."""
    rows = []
    for target in result.series["targets"]:
        row = [target.replace("_", " ")]
        for kind in ("r2_norm", "r2_from_norm_of_x"):
            median, least, greatest = (
                shown(result.numbers.get(f"over_saes/{kind}/{target}/{end}", float("nan")), "{:.3f}") for end in _ENDS
            )
            row += [median, f"{least} to {greatest}" if least != "–" else "–"]
        rows.append(row)
    return Table(
        title=f"norm-test: {result.config['model']}, {result.config['hook']}, held-out R2 of squared norms, "
        f"{len(result.series['saes'])} SAEs",
        headings=("squared norm of", "R2 from x, median", "range", "R2 from ||x||^2 alone, median", "range"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How predictable the error's norm is, and whether more so than that of its nonlinear part."""
    numbers, saes = result.numbers, [sae["name"] for sae in result.series["saes"]]

    def ends(target: str) -> dict[str, float]:
        return {end: numbers[f"over_saes/r2_norm/{target}/{end}"] for end in _ENDS}

    error, nonlinear = ends("error"), ends("nonlinear")
    above = sum(numbers[f"{sae}/r2_norm/nonlinear"] > numbers[f"{sae}/r2_norm/error"] for sae in saes)
    best = max(saes, key=lambda sae: numbers[f"{sae}/r2_norm/error"])
    return [
        f"A linear map of x predicts {error['median']:.0%} of the variance of the error's squared norm in the median SAE "
        f"({error['least']:.0%} to {error['greatest']:.0%}; most in {best}: "
        f"{with_interval(numbers, f'{best}/r2_norm/error', '{:.3f}')}).",
        f"Of the nonlinear error it is {nonlinear['median']:.0%} ({nonlinear['least']:.0%} to "
        f"{nonlinear['greatest']:.0%}), above the whole error's in {above} of {len(saes)} SAEs.",
        f"The norm of x alone predicts {numbers['over_saes/r2_from_norm_of_x/error/median']:.0%} of the error's in the "
        f"median SAE; the noise floor is {numbers['noise_floor']:.3f}.",
        f"The paper, Gemma 2 9B: {PAPER}.",
    ]
