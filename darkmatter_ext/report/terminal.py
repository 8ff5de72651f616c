"""Results on a terminal: the table, what it says, and where files were written."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darkmatter_ext.report.page import Section
from darkmatter_ext.report.table import Table, shown

if TYPE_CHECKING:
    from rich.console import Console

    from darkmatter_ext.saes.check import Verdict

COLUMNS_A_PART = 8  # columns of numbers: they fit in 120 characters, or in 80 with two-line headings
LOG_WIDTH = 120  # for a file or a pipe, which has no terminal width


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def _print_table(console: Console, table: Table) -> None:
    """Print the table; if it has too many columns for a terminal, print it in parts, each with the row names."""
    import rich.table

    width = len(table.headings)
    for start in range(1, max(2, width), COLUMNS_A_PART):
        columns = [0, *range(start, min(start + COLUMNS_A_PART, width))]
        drawn = rich.table.Table(title=table.title if start == 1 else None, pad_edge=False)
        for number in columns:
            justify = "left" if number == 0 else "right"
            drawn.add_column(table.headings[number], justify=justify, no_wrap=number == 0)
        for row in table.rows:
            drawn.add_row(*(row[number] for number in columns))
        console.print(drawn)


def show_result(section: Section, written: Sequence[Path], seconds: float, *, brief: bool = False) -> None:
    """Print a result: table, reading, notes, its SAEs and the files written, the last of which is its page.

    `brief`: the table, what it says, and where the page is.
    """
    console, result = _console(), section.result
    _print_table(console, section.table)
    for line in [*section.reading, *([] if brief else result.notes)]:
        console.print(f"- {line}", highlight=False, markup=False)
    if brief:
        console.print(f"explore  {written[-1]}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"took     {seconds:.0f} s", highlight=False)
        return
    for sae in result.series.get("saes", ()):
        console.print(f"SAE      {sae['folder']}", highlight=False, markup=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote    {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"took     {seconds:.0f} s", highlight=False)


def show_training(trained: Sequence[tuple[Path, Mapping[str, float]]]) -> None:
    """Print how well SAEs trained here do (`trained`: folder and report), on their training text and on held-out text."""
    console, nan = _console(), math.nan
    quantities = ("train/fvu", "held_out/fvu", "held_out/l0", "held_out/silent_share", "dead_share")
    headings = ("SAE", "FVU, training text", "FVU, held-out text", "L0", "silent there", "dead")
    rows = [
        [folder.name, *(shown(report.get(quantity, nan), "{:.4g}") for quantity in quantities)]
        for folder, report in trained
    ]
    _print_table(console, Table("trained", headings, rows))
    for folder, _ in trained:
        console.print(f"wrote    {folder}", highlight=False, markup=False, soft_wrap=True)


def show_verdict(title: str, verdict: Verdict) -> None:
    """Print how an accelerated SAE compares with the plain one."""
    from rich.table import Table

    console = _console()
    comparisons = Table("activations", "compared with SAELens", "found", "limit", "verdict", title=title)
    for row in verdict.comparisons:
        comparisons.add_row(
            row.data, row.quantity, f"{row.found:.2g}", f"{row.limit:.2g}", "same" if row.passed else "DIFFERENT"
        )
    timings = Table("call", "SAELens, ms", "accelerated, ms", "faster by", title="median time")
    for row in verdict.timings:
        timings.add_row(row.call, f"{row.plain_ms:.1f}", f"{row.fast_ms:.1f}", f"{row.plain_ms / row.fast_ms:.1f}x")
    console.print(comparisons)
    console.print(timings)
    console.print(str(verdict.stats), highlight=False, markup=False)
    for sign in verdict.signs:
        console.print(f"looks misloaded: {sign}", highlight=False, markup=False, soft_wrap=True)
    console.print("same answer" if verdict.passed else "DIFFERENT ANSWER", highlight=False)
