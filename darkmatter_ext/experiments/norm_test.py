"""How well a linear map of x predicts six squared norms, over a family of SAEs.

How much of each squared norm a linear map of x predicts, over a family of SAEs (figure 7).

For v in x, Sae(x), SaeError(x), its linear part, its nonlinear part and Sae(x) + nonlinear part: R2 on held-out tokens of
the least-squares map from x to ||v||^2. Baseline: the same with ||x||^2 as the only predictor, one number instead of d.
With n tokens to fit d slopes, a target that x says nothing about would score about -d / n: the noise floor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import KS, WIDTHS, presets
from darkmatter_ext.measurement.run import Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Regressions, Settings
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, GREY, ORANGE, interval_bars, legend_beside, new_figure
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_VIOLIN = 4  # SAEs: too few for a density below that


@dataclass(frozen=True)
class NormTestSettings(Settings):
    """Predict the squared norms of x, of Sae(x) and of each part of its error from x, for every SAE of a family."""


PRESETS = presets(NormTestSettings, {"widths": WIDTHS, "ks": KS})


# norm_prediction_violin.py
SCRIPT = Regressions(bias=False, map_on_all=True)


def plan(settings: NormTestSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return plan_lines(settings)


def norm_numbers(site: SiteMeasurement, sae: str) -> dict[str, float]:
    """R2 of every norm of one SAE, from x and from ||x||^2 alone, with intervals; also L0, FVU and the noise floor."""
    found, numbers = site.intervals(sae), {}
    for target in NORM_TARGETS:
        numbers |= found[f"r2_norm/{target}"].numbers(f"{sae}/r2_norm/{target}")
        if target != "x":  # ||x||^2 predicts itself
            numbers |= site.scalar_interval(["x"], f"{sae}/{target}").numbers(f"{sae}/r2_from_norm_of_x/{target}")
    numbers |= found["fvu"].numbers(f"{sae}/fvu") | found["r2_vec"].numbers(f"{sae}/r2_vec")
    d = len(site.maps[sae].weight)
    return numbers | {f"{sae}/l0": site.l0(sae), f"{sae}/noise_floor": -d / site.n_norm_fit}


def over_saes(numbers: dict[str, float], saes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, minimum and maximum of each R2 over the SAEs: "over_saes/r2_norm/error/median" and so on.

    SAEs whose norm does not vary (R2 is NaN) are left out.
    """
    kinds = {"r2_norm": NORM_TARGETS, "r2_from_norm_of_x": NORM_TARGETS[1:]}
    found = {}
    for name in (f"{kind}/{target}" for kind, targets in kinds.items() for target in targets):
        every = [numbers[f"{sae['name']}/{name}"] for sae in saes]
        values = [value for value in every if math.isfinite(value)] or [math.nan]
        ends = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        found |= {f"over_saes/{name}/{end}": value for end, value in ends.items()}
    return found | {"noise_floor": min(numbers[f"{sae['name']}/noise_floor"] for sae in saes)}


def _notes(found: Measurement, numbers: dict[str, float]) -> list[str]:
    notes = [
        f"Noise floor: a norm that has nothing to do with x would score about {numbers['noise_floor']:.3f} (d slopes "
        "fitted on n tokens cost d / n). The ranges are least and greatest over SAEs, no intervals."
    ]
    if len(found.saes) < MIN_VIOLIN:
        notes.append(f"{len(found.saes)} SAE(s): drawn as points, a violin needs {MIN_VIOLIN}.")
    if found.config["parity"] == "released-code":
        notes.append("As the released code: no bias in any regression, b* fitted on all tokens, held-out ones too.")
    return notes


def run(settings: NormTestSettings, stages: Stages) -> Result:
    """Measure the family and read its norm tests.

    Raises ValueError for bad settings, SAEs that do not fit; RuntimeError for damaged files.
    """
    found = measured(prepare(settings, stages), stages, released=SCRIPT)
    numbers: dict[str, float] = {}
    with stages.stage("norm tests", len(found.saes)) as advance:
        for sae in found.saes:
            numbers |= norm_numbers(found.site_of(sae["name"]), sae["name"])
            advance(1)
    numbers |= over_saes(numbers, found.saes)
    series = {"targets": NORM_TARGETS, "violins": len(found.saes) >= MIN_VIOLIN}
    return measured_result("norm-test", found, stages, numbers, series=series, notes=_notes(found, numbers))


PAPER = "more than 90 % of the norm of the error is linearly predictable; R2 of 0.7 to 0.95 at middle layers"
_ENDS = ("median", "least", "greatest")


def table(result: Result) -> Table:
    """One row per norm: median and range over SAEs, from x and from its norm alone."""
    rows = []
    for target in result.series["targets"]:
        row = [target.replace("_", " ")]
        for kind in ("r2_norm", "r2_from_norm_of_x"):
            median, least, greatest = (
                shown(result.numbers.get(f"over_saes/{kind}/{target}/{end}", float("nan")), "{:.3f}") for end in _ENDS
            )
            row += [median, f"{least} to {greatest}" if least != "–" else "–"]
        rows.append(row)
    return Table(
        title=f"norm-test: {result.config['model']}, {result.config['hook']}, held-out R2 of squared norms, "
        f"{len(result.series['saes'])} SAEs",
        headings=("squared norm of", "R2 from x, median", "range", "R2 from ||x||^2 alone, median", "range"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How predictable the error's norm is, and whether it is more so than that of its nonlinear part."""
    numbers, saes = result.numbers, [sae["name"] for sae in result.series["saes"]]

    def ends(target: str) -> dict[str, float]:
        return {end: numbers[f"over_saes/r2_norm/{target}/{end}"] for end in _ENDS}

    error, nonlinear = ends("error"), ends("nonlinear")
    above = sum(numbers[f"{sae}/r2_norm/nonlinear"] > numbers[f"{sae}/r2_norm/error"] for sae in saes)
    best = max(saes, key=lambda sae: numbers[f"{sae}/r2_norm/error"])
    return [
        f"A linear map of x predicts {error['median']:.0%} of the variance of the error's squared norm in the median SAE "
        f"({error['least']:.0%} to {error['greatest']:.0%}; most in {best}: "
        f"{with_interval(numbers, f'{best}/r2_norm/error', '{:.3f}')}).",
        f"Of the nonlinear error it is {nonlinear['median']:.0%} ({nonlinear['least']:.0%} to "
        f"{nonlinear['greatest']:.0%}), above the whole error's in {above} of {len(saes)} SAEs.",
        f"The norm of x alone predicts {numbers['over_saes/r2_from_norm_of_x/error/median']:.0%} of the error's in the "
        f"median SAE; the noise floor is {numbers['noise_floor']:.3f}.",
        f"The paper, Gemma 2 9B: {PAPER}.",
    ]


LABELS = {
    "x": "x",
    "sae": "Sae(x)",
    "error": "SaeError(x)",
    "linear": "linear\nerror",
    "nonlinear": "nonlinear\nerror",
    "sae_plus_nonlinear": "Sae(x) +\nnonlinear",
}
_COLOURS = {"error": BLUE, "linear": GREEN, "nonlinear": ORANGE}


def _layers(saes: list[dict[str, Any]]) -> list[int]:
    """The layer of each SAE; the number of its site if hook points have other names."""
    try:
        return [parse_hook_point(sae["hook"]).layer for sae in saes]
    except ValueError:
        hooks = list(dict.fromkeys(sae["hook"] for sae in saes))
        return [hooks.index(sae["hook"]) for sae in saes]


def violins(result: Result) -> Figure:
    """R2 of the six norms over all SAEs: violins, and every SAE as a point, coloured by width (by layer for many sites)."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    saes, numbers = result.series["saes"], result.numbers
    many_sites = len({sae["hook"] for sae in saes}) > 1
    values = _layers(saes) if many_sites else [sae["d_sae"] for sae in saes]
    norm = (Normalize if many_sites else LogNorm)(min(values), max(values) + (min(values) == max(values)))
    figure, axes = new_figure(3.2)
    l0s = [numbers[f"{sae['name']}/l0"] for sae in saes]
    ranks = [sorted(l0s).index(l0) for l0 in l0s]  # SAEs lie side by side in the order of their L0
    across = [0.5 * (rank / max(1, len(saes) - 1) - 0.5) for rank in ranks]
    points: Any = None
    for place, target in enumerate(LABELS):
        heights = [numbers[f"{sae['name']}/r2_norm/{target}"] for sae in saes]
        finite = [height for height in heights if math.isfinite(height)]  # a norm that does not vary has no R2
        if result.series["violins"] and finite:
            _violin(axes, finite, place)
        where = [place + offset for offset in across]
        points = axes.scatter(where, heights, c=values, norm=norm, cmap="viridis", s=14, zorder=3, linewidths=0)
        if target != "x":
            baseline = numbers[f"over_saes/r2_from_norm_of_x/{target}/median"]
            label = r"from $\|x\|^2$ alone (median)" if target == "sae" else "_"
            axes.hlines(baseline, place - 0.35, place + 0.35, colors="black", linestyles=":", label=label)
    axes.axhline(numbers["noise_floor"], color=GREY, linewidth=0.8, linestyle="--", label="noise floor")
    axes.set_xticks(range(len(LABELS)), list(LABELS.values()))
    axes.set_xlabel("squared norm of (points from left to right: by L0)")
    axes.set_ylabel("held-out R²")
    axes.set_title(f"Linear prediction of squared norms from x, {len(saes)} SAE{'s' if len(saes) > 1 else ''}")
    axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
    bar = figure.colorbar(points, ax=axes, pad=0.02, label="layer" if many_sites else "latents")
    if many_sites:
        bar.locator = MaxNLocator(integer=True)
    else:
        bar.set_ticks(sorted(set(values)), labels=[str(value) for value in sorted(set(values))])
        bar.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _violin(axes: Axes, heights: list[float], place: int) -> None:
    shape: Any = axes.violinplot([heights], positions=[place], widths=0.8, showextrema=False, showmedians=True)
    for body in shape["bodies"]:
        body.set(facecolor=GREY, alpha=0.25)
    shape["cmedians"].set(color="black", linewidth=1)


def by_sae(result: Result) -> Figure:
    """R2 of the norms of the error and its parts, SAE by SAE, with intervals."""
    saes = sorted(result.series["saes"], key=lambda sae: (sae["d_sae"], result.numbers[f"{sae['name']}/l0"]))
    figure, axes = new_figure(3.2)
    for number, (target, colour) in enumerate(_COLOURS.items()):
        heights, errors = interval_bars(result, [f"{sae['name']}/r2_norm/{target}" for sae in saes])
        where = [place + 0.2 * (number - 1) for place in range(len(saes))]
        label = LABELS[target].replace("\n", " ")
        axes.errorbar(where, heights, yerr=errors, fmt="o", color=colour, markersize=3, linewidth=1, label=label)
    if len(saes) <= 24:
        l0s = [result.numbers[f"{sae['name']}/l0"] for sae in saes]
        axes.set_xticks(range(len(saes)), [f"{sae['d_sae']}\n{l0:.0f}" for sae, l0 in zip(saes, l0s, strict=True)])
        axes.tick_params(axis="x", labelsize=6.5)
        axes.set_xlabel("SAE: latents, and below L0")
    else:
        axes.set_xlabel("SAEs in the order of their width, then L0")
    axes.set_ylabel("held-out R² of the squared norm")
    axes.set_title("The norms of the error and its parts, SAE by SAE")
    legend_beside(axes)
    return figure


FIGURES = {"violins": violins, "saes": by_sae}
