"""Table and reading of `earlier-layers`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

PAPER = "SAE outputs of earlier sites explain up to 50 % of the variance of the nonlinear error"
_PARTS = ("error", "linear", "nonlinear")


def table(result: Result) -> Table:
    """One row a predictor: R2 for the error and its parts, and what a predictor that says nothing would score."""
    rows, several = [], len(result.series["saes"]) > 1
    for sae in result.series["saes"]:
        for name, about in result.series["predictors"].items():
            label = f"control: {name}" if about.startswith("control") else name
            scores = [
                with_interval(result.numbers, f"{sae['name']}/r2_from/{name}/{part}", "{:.3f}") for part in _PARTS
            ]
            floor = shown(result.numbers[f"{sae['name']}/noise_floor/{name}"], "{:.3f}")
            rows.append([f"{sae['name']}: {label}" if several else label, *scores, floor])
    return Table(
        title=f"earlier-layers: {result.config['model']}, {result.config['hook']}, held-out R2 from SAE outputs",
        headings=("from", "error", "linear error", "nonlinear error", "noise floor"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How much of the nonlinear error other SAEs explain, beside the controls."""
    numbers, predictors, lines = result.numbers, result.series["predictors"], []
    real = [name for name, about in predictors.items() if not about.startswith("control")]
    for sae in result.series["saes"]:

        def score(name: str, own: str = sae["name"]) -> str:
            return with_interval(numbers, f"{own}/r2_from/{name}/nonlinear", "{:.3f}")

        best = max((name for name in real if not name.startswith("all")), key=lambda n, own=sae["name"]: numbers[
            f"{own}/r2_from/{n}/nonlinear"
        ])  # fmt: skip
        together = f", all together {score('all')}" if "all" in real else ""
        without = f", all but the SAE's own output {score('all but res')}" if "all but res" in real else ""
        lines.append(f"{sae['name']}: of the nonlinear error {best} alone explains {score(best)}{together}{without}.")
        controls = [f"{name} {score(name)}" for name in predictors if name not in real]
        lines.append(f"{sae['name']}: the controls: {'; '.join(controls)}.")
    return [*lines, f"The paper, Gemma 2 9B: {PAPER}."]
