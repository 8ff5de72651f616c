"""Table and reading of `pathology`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, with_interval

GURNEE = "2 to 4.5 times in GPT-2 small, all layers"
LEE_HEIMERSHEIM = "no longer pathologically large against such nulls"


def table(result: Result) -> Table:
    """One row an SAE: its KL, and how many times each null's it is."""
    nulls = [null for null in result.series["nulls"] if null != "norm_only"]  # not at the same distance: in the reading
    rows = []
    for sae in result.series["saes"]:
        name = sae["name"]
        ratios = [with_interval(result.numbers, f"{name}/{null}/kl_ratio", "{:.2f}") for null in nulls]
        label = f"block {sae['layer']}, {name.split('/')[-1]}"
        rows.append([label, with_interval(result.numbers, f"{name}/sae/kl", "{:.3f}"), *ratios])
    return Table(
        title=f"pathology: {result.config['model']}, KL of Sae(x) in nats, and in multiples of the KL of each null",
        headings=("SAE", "KL", *(null.replace("_", " ") for null in nulls)),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Whether Sae(x) is worse than a random point, and whether that stays against covariance-matched ones."""
    lines = []
    for null, about in (
        ("random", f"a random point at its distance (Gurnee: {GURNEE})"),
        ("error_covariance", f"a direction of its errors' covariance (Lee and Heimersheim: {LEE_HEIMERSHEIM})"),
        ("mixture", f"a mixture of activations (Lee and Heimersheim: {LEE_HEIMERSHEIM})"),
    ):
        names = [f"{sae['name']}/{null}/kl_ratio" for sae in result.series["saes"]]
        values = [f"{result.numbers[name]:.2f}" for name in sorted(names, key=lambda name: result.numbers[name])]
        span = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
        worse = sum(result.numbers[f"{name}/low"] > 1 for name in names)
        better = sum(result.numbers[f"{name}/high"] < 1 for name in names)
        lines.append(
            f"KL of Sae(x) is {span} times that of {about}: "
            f"worse beyond its interval for {worse} of {len(names)}, better for {better}."
        )
    shrinkage = [
        result.numbers[f"{sae['name']}/norm_only/kl"] / result.numbers[f"{sae['name']}/sae/kl"]
        for sae in result.series["saes"]
    ]
    lines.append(f"The norm of Sae(x) alone, put on x, has at most {max(shrinkage):.1%} of the KL of Sae(x).")
    return lines
