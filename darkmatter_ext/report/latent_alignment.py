"""Table and reading of `latent-alignment`."""

from __future__ import annotations

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, with_interval

_NAMES = {"error": "error", "nonlinear": "nonlinear error", "x": "x"}


def table(result: Result) -> Table:
    """One row an SAE, squared norm and kind of direction: both correlations."""
    rows = [
        [
            sae["name"],
            _NAMES[target],
            kind,
            *(
                with_interval(result.numbers, f"{sae['name']}/{target}/{kind}/{name}", "{:.2f}")
                for name in ("pearson", "spearman")
            ),
        ]
        for sae in result.series["saes"]
        for target in result.series["targets"]
        for kind in result.series["rows"]
    ]
    return Table(
        title=f"latent-alignment: {result.config['model']}, {result.config['hook']}, direction . a* against mean active value",
        headings=("SAE", "a* predicts the squared norm of", "directions", "Pearson", "Spearman"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Whether the latents' sizes go with what they add to the predicted norm of the error, and with that of x."""
    numbers, lines = result.numbers, []
    for sae in result.series["saes"]:
        name = sae["name"]
        low, high = (numbers[f"{name}/error/decoder/spearman/{end}"] for end in ("low", "high"))
        verdict = "go with" if low > 0 else "go against" if high < 0 else "do not clearly go with"
        lines.append(
            f"{name}: mean active values {verdict} W_dec . a* of the error (Spearman "
            f"{with_interval(numbers, f'{name}/error/decoder/spearman', '{:.2f}')}; rows permuted "
            f"{with_interval(numbers, f'{name}/error/permuted/spearman', '{:.2f}')}); with a* of x it is "
            f"{with_interval(numbers, f'{name}/x/decoder/spearman', '{:.2f}')}. {numbers[f'{name}/latents_never_fired']:.0f} "
            f"of {numbers[f'{name}/latents']:.0f} latents never fired."
        )
    return lines
