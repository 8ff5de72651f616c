"""A self-contained HTML page of results: numbers, figures, notes, provenance."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darkmatter_ext.error import NORM_TARGETS
from darkmatter_ext.results import Result
from darkmatter_ext.storage import atomic_file

# What the paper reports for Gemma 2 9B, layer 20 (abstract and figures 3, 4); printed beside our numbers, never mixed in.
PAPER_R2_VEC = "about 0.5"
PAPER_R2_NORM = "above 0.9"
PAPER_PURSUIT = "total FVU 3 to 5% lower, nonlinear error very slightly lower"


def sae_rows(result: Result) -> list[dict[str, Any]]:
    """The headline numbers of a decomposition result, one row an SAE: what the terminal and the page show."""
    rows = []
    for sae in result.series["saes"]:
        own = {
            key.removeprefix(f"{sae['name']}/"): value
            for key, value in result.numbers.items()
            if key.startswith(f"{sae['name']}/")
        }
        rows.append({**sae, **own})
    return rows


COLUMNS = (  # (key, heading, format)
    ("name", "SAE", "{}"),
    ("l0", "L0", "{:.1f}"),
    ("fvu", "FVU", "{:.3f}"),
    ("fvu_nonlinear", "FVU nonlin.", "{:.3f}"),
    ("linear_share", "linear share", "{:.0%}"),
    ("r2_vec", "R² error", "{:.3f}"),
    ("r2_norm/error", "R² error norm", "{:.3f}"),
    ("r2_norm/nonlinear", "R² nonlin. norm", "{:.3f}"),
    ("r2_norm/x", "R² norm of x", "{:.3f}"),
)


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """One formatted table cell; a number that could not be computed shows as an en dash."""
    value = row[key]
    return "–" if isinstance(value, float) and math.isnan(value) else form.format(value)


def reading(result: Result) -> list[str]:
    """What the numbers say, in sentences made of the numbers: no claim that is not computed here."""
    return _READINGS[result.experiment](sae_rows(result))


def _read_pursuit(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    encoders = {row["folder"]: row for row in rows if row["variant"] == "encoder"}
    for row in rows:
        if row["variant"] == "encoder":
            continue
        encoder = encoders[row["folder"]]
        change = row["fvu"] / encoder["fvu"] - 1
        nonlinear = row["fvu_nonlinear"] / encoder["fvu_nonlinear"] - 1
        lines.append(
            f"{row['name']}: FVU {encoder['fvu']:.3f} to {row['fvu']:.3f} ({change:+.0%}), FVU nonlinear "
            f"{encoder['fvu_nonlinear']:.3f} to {row['fvu_nonlinear']:.3f} ({nonlinear:+.0%}), L0 {row['l0']:.1f} "
            f"({encoder['l0']:.1f} of the encoder)."
        )
    return [*lines, f"The paper, gradient pursuit on Gemma Scope: {PAPER_PURSUIT}."]


def _read_decomposition(rows: list[dict[str, Any]]) -> list[str]:

    def span(key: str, form: str) -> str:
        values = [row[key] for row in rows]
        low, high = form.format(min(values)), form.format(max(values))
        return low if low == high else f"{low} to {high}"

    lines = [
        f"A linear map of the activation explains {span('linear_share', '{:.0%}')} of the SAE error's energy on held-out text "
        f"(R² of the error vector {span('r2_vec', '{:.2f}')}; the paper, Gemma 2 9B: {PAPER_R2_VEC}).",
        f"The squared norm of the error is predicted with R² {span('r2_norm/error', '{:.2f}')} (the paper: {PAPER_R2_NORM}); "
        f"the squared norm of x itself, the baseline, with {span('r2_norm/x', '{:.2f}')}; "
        f"of the nonlinear error with {span('r2_norm/nonlinear', '{:.2f}')}.",
    ]
    if len(rows) > 1:
        narrow, wide = min(rows, key=lambda row: row["d_sae"]), max(rows, key=lambda row: row["d_sae"])
        lines.append(
            f"From {narrow['d_sae']} to {wide['d_sae']} latents FVU goes from {narrow['fvu']:.3f} to {wide['fvu']:.3f}, "
            f"FVU nonlinear from {narrow['fvu_nonlinear']:.3f} to {wide['fvu_nonlinear']:.3f}."
        )
    return lines


_READINGS = {"decomposition": _read_decomposition, "pursuit": _read_pursuit}


def write_report(results: Sequence[tuple[Result, Sequence[Path]]], path: Path) -> Path:
    """Write one HTML page for results and the figure files (PNG) drawn from them; the images are inside the page."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("darkmatter_ext", "report"), autoescape=True)
    sections = [
        {
            "result": result,
            "rows": [[cell(row, key, form) for key, _, form in COLUMNS] for row in sae_rows(result)],
            "reading": reading(result),
            "norm_targets": NORM_TARGETS,
            "images": [(figure.name, base64.b64encode(figure.read_bytes()).decode()) for figure in figures],
        }
        for result, figures in results
    ]
    page = environment.get_template("report.html").render(
        sections=sections, headings=[heading for _, heading, _ in COLUMNS]
    )
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path
