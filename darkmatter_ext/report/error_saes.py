"""Table and reading of `error-saes`."""

from __future__ import annotations

import math

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

PAPER = "FVU 0.54 on the linear and 0.59 on the nonlinear error"


def table(result: Result) -> Table:
    """One row a kind of latents."""
    numbers = result.numbers
    rows = []
    for name, about in result.series["about"].items():
        accuracy = f"{name}/detection_accuracy"
        detection = with_interval(numbers, accuracy, "{:.3f}") if accuracy in numbers else ""
        rows.append([about, *_trained_cells(result, name), detection])
    return Table(
        title=f"error-saes: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=(
            "latents of",
            "FVU",
            "L0",
            "dead",
            "FVU random dictionary",
            "FVU shuffled decoder",
            "detection accuracy",
        ),
        rows=rows,
    )


def _trained_cells(result: Result, name: str) -> list[str]:
    """FVU, L0, dead latents and the controls' FVU, for what was trained here."""
    numbers = result.numbers
    if f"{name}/fvu" not in numbers:
        return [""] * 5
    forms = {"fvu": "{:.3f}", "l0": "{:.1f}", "dead": "{:.1%}"}
    controls = ("fvu_random_dictionary", "fvu_shuffled_decoder")
    return [
        *(with_interval(numbers, f"{name}/{key}", form) for key, form in forms.items()),
        *(shown(numbers[f"{name}/{key}"], "{:.3f}") for key in controls),
    ]


def reading(result: Result) -> list[str]:
    """Which error is harder to explain, and whether its latents can be told better than random directions."""
    numbers = result.numbers
    linear, nonlinear = numbers["linear/fvu"], numbers["nonlinear/fvu"]
    lower, upper = sorted(("linear", "nonlinear"), key=lambda target: numbers[f"{target}/fvu"])
    apart = numbers[f"{lower}/fvu/high"] < numbers[f"{upper}/fvu/low"]
    lines = [
        f"An SAE of {result.config['error_width']} latents leaves {linear:.2f} of the variance of the linear error and "
        f"{nonlinear:.2f} of the nonlinear error (the paper, Gemma 2 2B: {PAPER}); "
        + ("the intervals over seeds are apart." if apart else "the intervals over seeds are not apart.")
    ]
    accuracies = {name: numbers.get(f"{name}/detection_accuracy", math.nan) for name in result.series["about"]}
    if not math.isnan(accuracies["random"]):
        lines.append(
            f"Detection accuracy (0.5: chance): {accuracies['linear']:.2f} for latents of the linear error, "
            f"{accuracies['nonlinear']:.2f} of the nonlinear error, {accuracies['activation']:.2f} of the SAE itself, "
            f"{accuracies['random']:.2f} of random directions."
        )
    return lines
