"""One HTML page of results to explore: text, tables, figures, tokens and latents, in one file that needs no network.

The static part (readings, tables, pictures, numbers, settings) works without JavaScript and can be printed and searched; the
bundle (`web/`) adds the token explorer, the latent browser and interactive figures. A content security policy allows nothing
to be loaded and only that bundle to run, whatever text a model or a file contains.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkmatter_ext.report.figure_data import as_csv
from darkmatter_ext.report.figures import Drawn
from darkmatter_ext.report.payload import packed
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table
from darkmatter_ext.runtime.storage import atomic_file

BUNDLE = Path(__file__).parent / "bundle"  # made by `npm run build` in web/


@dataclass(frozen=True)
class Section:
    """A result, as a reader sees it."""

    result: Result
    table: Table
    reading: Sequence[str]
    figures: Sequence[Drawn] = ()  # PNG files drawn from the result
    command: str = ""  # reproduces the result

    @property
    def packed(self) -> str | None:
        """What the explorer reads; None if the result keeps no text."""
        return packed(self.result)

    @property
    def images(self) -> list[dict[str, Any]]:
        """What the page has for each figure: its name, what it shows, picture and CSV in base64, its panels."""
        return [
            {
                "name": figure.path.stem,
                "about": figure.about,
                "png": _base64(figure.path.read_bytes()),
                "csv": _base64(as_csv(figure.panels).encode()),
                "panels": [_without_nan(panel.as_json()) for panel in figure.panels],
            }
            for figure in self.figures
        ]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _without_nan(value: Any) -> Any:
    """Replace NaN, which browsers' JSON does not have."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value


def inert(text: str) -> str:
    """Text with control and format characters (bidi, zero width) replaced by their names; line ends and tabs stay."""

    def named(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        return f"⟨U+{ord(character):04X}⟩" if hidden and character not in "\n\t" else character

    return text if re.fullmatch(r"[\n\t\x20-\x7e]*", text) else "".join(map(named, text))


def _plainly(value: Any) -> str:
    """A setting or a version, the way people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write_page(sections: Sequence[Section], path: Path) -> Path:
    """Write one HTML page that contains everything it shows."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("darkmatter_ext", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["plainly"] = _plainly
    script, style = ((BUNDLE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    page = environment.get_template("page.html").render(
        sections=sections,
        script=Markup(script),
        style=Markup(style),
        script_hash=_base64(hashlib.sha256(script.encode()).digest()),
    )
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path
