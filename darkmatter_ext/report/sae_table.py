"""The table for results whose rows are SAEs, or SAEs with several encoders."""

from __future__ import annotations

import math
from typing import Any

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown


def sae_rows(result: Result) -> list[dict[str, Any]]:
    """The headline numbers of a decomposition result, one row per SAE."""
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
    ("fvu_training_text", "FVU training text", "{:.3f}"),
    ("fvu_nonlinear", "FVU nonlin.", "{:.3f}"),
    ("linear_share", "linear share", "{:.0%}"),
    ("without_top_8/linear_share", "lin. share, top 8 out", "{:.0%}"),
    ("r2_vec", "R² error", "{:.3f}"),
    ("r2_norm/error", "R² error norm", "{:.3f}"),
    ("r2_norm/nonlinear", "R² nonlin. norm", "{:.3f}"),
    ("r2_norm/x", "R² norm of x", "{:.3f}"),
)


def sae_table(result: Result, more: tuple[tuple[str, str, str], ...] = ()) -> Table:
    """One row per SAE (and variant). `more`: columns besides COLUMNS. A column is left out if no SAE has its number."""
    found = sae_rows(result)
    columns = [column for column in (*COLUMNS, *more) if any(column[0] in row for row in found)]
    return Table(
        title=f"{result.experiment}: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=tuple(heading for _, heading, _ in columns),
        rows=[[shown(row.get(key, math.nan), form) for key, _, form in columns] for row in found],
    )
