"""Report pages of the result files in docs/results, for the documentation site.

`python docs/pages.py FOLDER` writes them, in the environment that has the package; each from its JSON file alone. As a hook
of mkdocs, in an environment that has not, this file puts them into the site, lists them and links them from the gallery.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "docs" / "results", ROOT / "build" / "pages"
LIST = "<!-- every result file with its page -->"  # in result_pages.md
_HEADING = re.compile(r"^## ([a-z-]+):.*$", re.MULTILINE)  # in results.md


def write(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Write `<experiment file>.html` of every result file into `folder`, which holds nothing else afterwards."""
    from darkmatter_ext import experiments
    from darkmatter_ext.report.result import load_result

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.html"):
        old.unlink()
    return [
        experiments.write_report([load_result(path, alone=True)], folder / f"{path.stem}.html")
        for path in sorted(results.glob("*.json"))
    ]


def listed(results: Path, pages: Path) -> str:
    """A table in Markdown: what each result is of, its page, its file."""
    rows = []
    for path in sorted(results.glob("*.json")):
        if not (pages / f"{path.stem}.html").exists():
            continue
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made = content["provenance"].get("created", "")[:10]
        links = f"[page](results/{path.stem}.html) | [JSON](results/{path.name})"
        model, count = content["config"].get("model", ""), len(content["numbers"])
        rows.append(f"| {content['experiment']} | {model} | {count} | {made} | {links} |")
    if not rows:
        return "No result file is in this checkout."
    return "\n".join(["| experiment | model | numbers | made | explore | file |", "|---|---|---|---|---|---|", *rows])


def linked(markdown: str, pages: Path) -> str:
    """The gallery with a link to the page of each result under the heading of its experiment."""

    def line(heading: re.Match[str]) -> str:
        has_page = (pages / f"{heading[1]}.html").exists()
        return f"{heading[0]}\n\n[Explore this result](results/{heading[1]}.html)" if has_page else heading[0]

    return _HEADING.sub(line, markdown)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the pages are files of the site, so that links to them are checked."""
    from mkdocs.structure.files import File

    for page in sorted(PAGES.glob("*.html")):
        files.append(File.generated(config, f"results/{page.name}", abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: the list and the links."""
    if page.file.src_uri == "result_pages.md":
        return markdown.replace(LIST, listed(RESULTS, PAGES))
    return linked(markdown, PAGES) if page.file.src_uri == "results.md" else markdown


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
