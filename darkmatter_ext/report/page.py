"""One HTML page of results: tables, sentences made of the numbers, figures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table
from darkmatter_ext.runtime.storage import atomic_file


@dataclass(frozen=True)
class Section:
    """A result as a reader sees it."""

    result: Result
    table: Table
    reading: Sequence[str]
    figures: Sequence[Path] = ()  # PNG files drawn from the result

    @property
    def images(self) -> list[tuple[str, str]]:
        """Name and base64 text of each figure."""
        return [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in self.figures]


def write_page(sections: Sequence[Section], path: Path) -> Path:
    """Write one HTML page; the images are inside it."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("darkmatter_ext", "report"), autoescape=True)
    page = environment.get_template("page.html").render(sections=sections)
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path
