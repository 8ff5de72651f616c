"""What a reader of results sees: a table and sentences made of the numbers, on the terminal and in one HTML page.

One module an experiment gives `table(result)` and `reading(result)`; `table.py` is what they share.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.report import (
    baselines,
    decomposition,
    downstream,
    earlier_layers,
    error_saes,
    latent_alignment,
    norm_test,
    pathology,
    per_token,
    pursuit,
    scaling,
    synthetic,
)
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table
from darkmatter_ext.runtime.storage import atomic_file

VIEWS: dict[str, ModuleType] = {
    "baselines": baselines,
    "decomposition": decomposition,
    "downstream": downstream,
    "earlier-layers": earlier_layers,
    "error-saes": error_saes,
    "latent-alignment": latent_alignment,
    "norm-test": norm_test,
    "pathology": pathology,
    "per-token": per_token,
    "pursuit": pursuit,
    "scaling": scaling,
    "synthetic": synthetic,
}


def table(result: Result) -> Table:
    """The headline numbers of a result."""
    return VIEWS[result.experiment].table(result)


def reading(result: Result) -> list[str]:
    """What the numbers say, in sentences made of the numbers: no claim that is not computed here."""
    return VIEWS[result.experiment].reading(result)


def write_report(results: Sequence[tuple[Result, Sequence[Path]]], path: Path) -> Path:
    """Write one HTML page for results and the figure files (PNG) drawn from them; the images are inside the page."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("darkmatter_ext", "report"), autoescape=True)
    sections = [
        {
            "result": result,
            "table": table(result),
            "reading": reading(result),
            "norm_targets": NORM_TARGETS,
            "images": [(figure.name, base64.b64encode(figure.read_bytes()).decode()) for figure in figures],
        }
        for result, figures in results
    ]
    page = environment.get_template("report.html").render(sections=sections)
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path
