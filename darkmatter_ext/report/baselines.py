"""Table and reading of `baselines`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

NOTHING = 0.01  # an R2 too small to speak of
PARTS = ("error", "linear", "nonlinear")
_HEADINGS = {
    "probe": "linear map of x",
    "token_mean": "token mean",
    "scalars": "all scalars",
    "x_norm": "norm of x",
    "x": "squared norm",
    "loss": "loss",
    "l0": "L0",
    "random_mean": "random tokens",
}


def table(result: Result) -> Table:
    """One row an SAE and part of its error: R2 of its squared norm from every predictor."""
    predictors, several = result.series["predictors"], len(result.series["saes"]) > 1
    rows = []
    for sae in result.series["saes"]:
        for part in PARTS:
            keys = [f"{sae['name']}/{part}/{predictor}" for predictor in predictors]
            label = f"block {sae['layer']}, {part}" if several else part
            rows.append([label, *(with_interval(result.numbers, key, "{:.2f}") for key in keys)])
    return Table(
        title=f"baselines: {result.config['model']}, held-out R² of the squared norm of the error and its parts",
        headings=("block, part", *(_HEADINGS[name] for name in predictors)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """The probe against every baseline, part by part, over the SAEs."""
    numbers, names = result.numbers, [sae["name"] for sae in result.series["saes"]]
    baselines = [name for name in result.series["predictors"] if name not in ("probe", "random_mean")]

    def span(key: str) -> str:
        values = sorted(numbers[f"{name}/{key}"] for name in names)
        low, high = shown(values[0], "{:.2f}"), shown(values[-1], "{:.2f}")
        return low if low == high else f"{low} to {high}"

    lines = []
    for part in PARTS:
        ahead = sum(
            all(numbers[f"{name}/{part}/probe/low"] > numbers[f"{name}/{part}/{other}/high"] for other in baselines)
            for name in names
        )
        others = ", ".join(f"{_HEADINGS[other]} {span(f'{part}/{other}')}" for other in baselines)
        what = "error" if part == "error" else f"{part} error"
        lines.append(
            f"Squared norm of the {what}: a linear map of x has R² {span(f'{part}/probe')}; {others}. The map is ahead of all "
            f"of these, intervals apart, for {ahead} of {len(names)} SAEs."
        )
    if "random_mean" in result.series["predictors"]:
        lines.append(
            f"Control: the mean over as many random tokens has R² {span('error/random_mean')} for the error; "
            f"{span('random_mean_expected')} is what the noise of means over few tokens makes of nothing."
        )
    if (fixed := sum(abs(numbers[f"{name}/error/l0"]) < NOTHING for name in names)) > 0:
        lines.append(
            f"L0 explains less than {NOTHING} for {fixed} of {len(names)} SAEs: in a TopK SAE it is all but constant."
        )
    return lines
