"""Progress of long work: bars on a terminal (rich), one line per stage without a terminal, or nothing.

Experiments report progress; they do not print.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[[int], None]


class Stages:
    """The stages of a run: each has a bar if shown, and its seconds are kept for the result."""

    def __init__(self, *, show: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show
        self._bars: Progress | None = None
        self._lines = False

    @contextmanager
    def shown(self) -> Iterator[Stages]:
        """Show the stages inside the block on standard error (standard output is for results)."""
        if not self._show:
            yield self
            return
        if not sys.stderr.isatty():
            self._lines = True
            try:
                yield self
            finally:
                self._lines = False
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            self._bars = bars
            try:
                yield self
            finally:
                self._bars = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A named stage with `total` units of work; yields the function that advances it."""
        start = time.perf_counter()
        if self._bars is None:
            yield lambda _units: None
        else:
            bars, task = self._bars, self._bars.add_task(name, total=total)
            yield lambda units: bars.advance(task, units)
            bars.update(task, total=total or 1, completed=total or 1)
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self._lines:
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)  # noqa: T201  (for the one who waits)
