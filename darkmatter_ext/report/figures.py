"""Figures to files. They are drawn from a Result alone: a figure can always be made again from its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import STYLE
from darkmatter_ext.runtime.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Result], "Figure | None"]  # None: this result has nothing for the figure


def save_figures(result: Result, figures: Mapping[str, Draw], folder: Path, *, kind: str = "png") -> list[Path]:
    """Draw figures into `folder` as `<experiment>_<figure>.<kind>` (png, pdf or svg)."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            if (figure := draw(result)) is None:
                continue
            path = folder / f"{result.experiment}_{name}.{kind}"
            with atomic_file(path) as part:
                figure.savefig(part)
            paths.append(path)
    return paths
