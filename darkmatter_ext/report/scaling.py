"""Table and reading of `scaling`."""

from __future__ import annotations

from statistics import fmean

from darkmatter_ext.report.result import Result
from darkmatter_ext.report.table import Table, shown, with_interval

PAPER = "FVU_nonlinear is about constant in width at fixed L0"


def table(result: Result) -> Table:
    """One row an SAE, pursuit and controls below."""
    saes = sorted(result.series["saes"], key=lambda sae: (round(result.numbers[f"{sae['name']}/l0"]), sae["d_sae"]))
    names = [sae["name"] for sae in saes]
    if result.series["with_pursuit"]:
        names += [f"{name} pursuit" for name in result.series["law"]]
    names += [sae["name"] for sae in result.series["controls"]]
    forms = {"fvu": "{:.3f}", "fvu_nonlinear": "{:.3f}", "r2_vec": "{:.3f}", "r2_norm/error": "{:.3f}"}
    rows = [
        [name, shown(result.numbers[f"{name}/l0"], "{:.1f}")]
        + [with_interval(result.numbers, f"{name}/{key}", form) for key, form in forms.items()]
        for name in names
    ]
    return Table(
        title=f"scaling: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=("SAE", "L0", "FVU", "FVU nonlin.", "R² error", "R² error norm"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How far the law is known, how flat FVU_nonlinear is, and what the error is made of."""
    numbers, names = result.numbers, result.series["law"]
    if not names:
        return ["Too few widths at one L0 for a power law; see the notes."]
    constants = ", ".join(f"{name} = {with_interval(numbers, f'law/{name}', '{:.3g}')}" for name in "cam")
    widths = {sae["name"]: sae["d_sae"] for sae in result.series["saes"]}
    narrow, wide = names[0], names[-1]
    lines = [
        f"FVU(W) = c + a W^m over {len(names)} widths at L0 about {fmean(numbers[f'{name}/l0'] for name in names):.0f}: "
        f"{constants}; R² {numbers['law/r2']:.4f}, largest residual {numbers['law/largest_residual']:.4f}.",
        f"From {widths[narrow]} to {widths[wide]} latents FVU goes {_change(result, narrow, wide, 'fvu')}, FVU nonlinear "
        f"{_change(result, narrow, wide, 'fvu_nonlinear')} (the paper: {PAPER}).",
        f"Of the FVU {numbers[f'{wide}/fvu']:.3f} at {widths[wide]} latents, {numbers[f'{wide}/breakdown/absent']:.3f} is what "
        f"more latents would remove, {with_interval(numbers, 'breakdown/linear', '{:.3f}')} linear error at any width, "
        f"{numbers['breakdown/nonlinear']:.3f} nonlinear error (its mean over widths).",
    ]
    if numbers["breakdown/linear/low"] <= 0 or numbers["breakdown/linear"] <= 0:
        lines.append(
            "The interval of c reaches below the mean FVU nonlinear: whether linear error stays at any width cannot be told "
            "from these widths."
        )
    if result.series["with_pursuit"]:
        removed = [numbers[f"{name}/breakdown/encoder"] for name in names]
        lines.append(
            f"Gradient pursuit at the same L0 takes {min(removed):+.4f} to {max(removed):+.4f} off FVU nonlinear."
        )
    return lines


def _change(result: Result, narrow: str, wide: str, key: str) -> str:
    first, last = (result.numbers[f"{name}/{key}"] for name in (narrow, wide))
    return f"from {first:.3f} to {last:.3f} ({last / first - 1:+.0%})"
