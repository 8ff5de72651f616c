"""Table and reading of `decomposition`."""

from __future__ import annotations

from typing import Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown

# What the paper reports for Gemma 2 9B, layer 20 (abstract and figures 3, 4); printed beside our numbers, never mixed in.
PAPER_R2_VEC = "about 0.5"
PAPER_R2_NORM = "above 0.9"


def sae_rows(result: Result) -> list[dict[str, Any]]:
    """The headline numbers of a decomposition result, one row an SAE."""
    rows = []
    for sae in result.series["saes"]:
        own = {
            key.removeprefix(f"{sae['name']}/"): value
            for key, value in result.numbers.items()
            if key.startswith(f"{sae['name']}/")
        }
        rows.append({**sae, **own})
    return rows


COLUMNS = (  # (key, heading, format)
    ("name", "SAE", "{}"),
    ("l0", "L0", "{:.1f}"),
    ("fvu", "FVU", "{:.3f}"),
    ("fvu_nonlinear", "FVU nonlin.", "{:.3f}"),
    ("linear_share", "linear share", "{:.0%}"),
    ("r2_vec", "R² error", "{:.3f}"),
    ("r2_norm/error", "R² error norm", "{:.3f}"),
    ("r2_norm/nonlinear", "R² nonlin. norm", "{:.3f}"),
    ("r2_norm/x", "R² norm of x", "{:.3f}"),
)


def table(result: Result) -> Table:
    """One row an SAE (and variant)."""
    return Table(
        title=f"{result.experiment}: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=tuple(heading for _, heading, _ in COLUMNS),
        rows=[[shown(row[key], form) for key, _, form in COLUMNS] for row in sae_rows(result)],
    )


def reading(result: Result) -> list[str]:
    """How much of the error is linear, and how well norms are predicted."""
    rows = sae_rows(result)

    def span(key: str, form: str) -> str:
        values = [row[key] for row in rows]
        low, high = form.format(min(values)), form.format(max(values))
        return low if low == high else f"{low} to {high}"

    lines = [
        f"A linear map of the activation explains {span('linear_share', '{:.0%}')} of the SAE error's energy on held-out text "
        f"(R² of the error vector {span('r2_vec', '{:.2f}')}; the paper, Gemma 2 9B: {PAPER_R2_VEC}).",
        f"The squared norm of the error is predicted with R² {span('r2_norm/error', '{:.2f}')} (the paper: {PAPER_R2_NORM}); "
        f"the squared norm of x itself, the baseline, with {span('r2_norm/x', '{:.2f}')}; "
        f"of the nonlinear error with {span('r2_norm/nonlinear', '{:.2f}')}.",
    ]
    if len(rows) > 1:
        narrow, wide = min(rows, key=lambda row: row["d_sae"]), max(rows, key=lambda row: row["d_sae"])
        lines.append(
            f"From {narrow['d_sae']} to {wide['d_sae']} latents FVU goes from {narrow['fvu']:.3f} to {wide['fvu']:.3f}, "
            f"FVU nonlinear from {narrow['fvu_nonlinear']:.3f} to {wide['fvu_nonlinear']:.3f}."
        )
    return lines
