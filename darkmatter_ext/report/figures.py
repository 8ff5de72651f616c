"""Save figures to files. They are drawn from a Result alone, so a figure can always be redrawn from its result file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from darkmatter_ext.report.figure_data import Panel, panels
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import STYLE
from darkmatter_ext.runtime.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Result], "Figure | None"]  # None: the result has nothing to draw


class Drawn(NamedTuple):
    """A figure that was drawn."""

    path: Path
    about: str  # a sentence: what it shows
    panels: list[Panel]


def save_figures(result: Result, figures: Mapping[str, Draw], folder: Path, *, kind: str = "png") -> list[Drawn]:
    """Draw figures into `folder` as `<experiment>_<figure>.<kind>` (png, pdf or svg)."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            if (figure := draw(result)) is None:
                continue
            path = folder / f"{result.experiment}_{name}.{kind}"
            with atomic_file(path) as part:
                figure.savefig(part)
            about = (inspect.getdoc(draw) or name).partition("\n\n")[0].replace("\n", " ")
            drawn.append(Drawn(path, about, panels(figure)))
    return drawn
