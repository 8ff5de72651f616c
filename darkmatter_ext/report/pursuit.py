"""Reading of `pursuit`; its table is that of `decomposition`, a row for every SAE and variant."""

from __future__ import annotations

from darkmatter_ext.report.decomposition import sae_rows, table
from darkmatter_ext.report.result import Result

__all__ = ["reading", "table"]

PAPER_PURSUIT = "total FVU 3 to 5% lower, nonlinear error very slightly lower"


def reading(result: Result) -> list[str]:
    """What pursuit and the refit change against the encoder."""
    rows = sae_rows(result)
    lines = []
    encoders = {row["sae"]: row for row in rows if row["variant"] == "encoder"}
    for row in rows:
        if row["variant"] == "encoder":
            continue
        encoder = encoders[row["sae"]]
        change = row["fvu"] / encoder["fvu"] - 1
        nonlinear = row["fvu_nonlinear"] / encoder["fvu_nonlinear"] - 1
        lines.append(
            f"{row['name']}: FVU {encoder['fvu']:.3f} to {row['fvu']:.3f} ({change:+.0%}), FVU nonlinear "
            f"{encoder['fvu_nonlinear']:.3f} to {row['fvu_nonlinear']:.3f} ({nonlinear:+.0%}), L0 {row['l0']:.1f} "
            f"({encoder['l0']:.1f} of the encoder)."
        )
    return [*lines, f"The paper, gradient pursuit on Gemma Scope: {PAPER_PURSUIT}."]
