"""Does the nonlinear error follow the intrinsic dimension of the activations, from layer to layer?

At each layer: FVU and FVU_nonlinear of an SAE, and the dimension of the activations it reads, by TwoNN (Facco et al. 2017).
2605.09887 ("Geometric Wall") asks this about the error that no width removes; here it is asked about the error that no
linear map removes. For comparison: what a linear view says (the participation ratio of the covariance), and a control
without curvature or clusters, normal points with the same covariance.

A dimension depends on scale: all three are also measured with a half and a quarter of the points.

Shapes: n tokens, d width of a site.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.estimators.intrinsic_dimension import (
    gaussian_like,
    neighbour_ratios,
    participation_ratio,
    two_nn,
)
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, SERIES, SKY, interval_bars, new_panels
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import require_at_least
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (1, 2, 4)  # use one point in this many
MOST_EXACT = 7  # up to this many layers, all orders (5040) are counted
QUANTITIES = ("fvu", "fvu_nonlinear")


@dataclass(frozen=True)
class IntrinsicDimensionSettings(Settings):
    """Measure the intrinsic dimension of activations and the error of their SAEs, layer by layer."""

    points: int = 4000
    """tokens of each layer whose neighbours (in other documents) are looked for"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("points", 200, self.points)


PRESETS = {"demo": extended(DEMO, IntrinsicDimensionSettings, layers=(2, 8, 14, 20, 26), widths=(1024,))}


def plan(settings: IntrinsicDimensionSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    sizes = ", ".join(str(settings.points // scale) for scale in SCALES)
    return [
        *plan_lines(settings),
        f"dimension TwoNN of {sizes} tokens of each layer, neighbours of other documents",
        "          control: as many normal points of the same covariance",
    ]


def sample_tokens(tokens: StoredTokens, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """At most `count` measured tokens at a site [n, d] and their documents [n]: the same tokens at every site."""
    x = torch.cat([tokens.with_role(role) for role in (FIT, HELD_OUT)])
    documents = torch.cat([tokens.documents_with(role) for role in (FIT, HELD_OUT)])
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[chosen], documents[chosen]


def dimension_numbers(x: Tensor, documents: Tensor, *, seed: int) -> dict[str, float]:
    """For points [n, d] in documents [n]: `dimension`, `gaussian` and, with fewer points, `dimension_2`, `gaussian_4`, ..."""
    numbers = {"participation_ratio": participation_ratio(x), "points": float(len(x))}
    gaussian = gaussian_like(x, seed=seed)
    for scale in SCALES:
        end = "" if scale == 1 else f"_{scale}"
        for name, cloud in (("dimension", x), ("gaussian", gaussian)):
            ratios = neighbour_ratios(cloud[::scale], documents[::scale])
            numbers |= two_nn(ratios, documents[::scale], seed=seed).numbers(f"{name}{end}")
            if name == "dimension" and scale == 1:
                numbers["equal_points"] = float(ratios.isnan().sum())
    return numbers


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and its two-sided permutation p-value, which is exact for at most MOST_EXACT pairs.

    NaN for fewer than 3 pairs, or if either is constant.
    """
    from scipy import stats

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan, math.nan
    ranks, others = stats.rankdata(a).tolist(), stats.rankdata(b).tolist()
    rho, p = map(float, stats.pearsonr(ranks, others))
    if len(a) <= MOST_EXACT:
        every = [statistics.correlation(ranks, order) for order in itertools.permutations(others)]
        p = sum(abs(own) >= abs(rho) - 1e-12 for own in every) / len(every)
    return rho, p


def run(settings: IntrinsicDimensionSettings, stages: Stages) -> Result:
    """Measure the SAEs and the dimension of what they read.

    Raises InputError for bad settings or SAEs that do not fit; StateError for damaged files.
    """
    inputs = prepare(settings, stages, splices=True)
    found = measured(inputs, stages)
    numbers = found.sae_numbers()
    hooks = list(inputs.stored)
    with stages.stage("neighbours", len(hooks)) as advance:
        for hook, tokens in inputs.stored.items():
            x, documents = sample_tokens(tokens, settings.points, seed=settings.seed)
            own = dimension_numbers(x, documents, seed=settings.seed)
            numbers |= {f"{hook}/{name}": value for name, value in own.items()}
            advance(1)
    widest = {hook: inputs.widest(hook).name for hook in hooks}
    for quantity in QUANTITIES:
        errors = [numbers[f"{widest[hook]}/{quantity}"] for hook in hooks]
        for name in ("dimension", "participation_ratio"):
            rho, p = rank_correlation([numbers[f"{hook}/{name}"] for hook in hooks], errors)
            numbers |= {f"rank_correlation/{quantity}/{name}": rho, f"rank_correlation/{quantity}/{name}/p": p}
    notes = ["Dimensions: intervals by document take the neighbours as they are; p: of all orders of the layers."]
    return measured_result(
        "intrinsic-dimension", found, stages, numbers, series={"hooks": hooks, "widest": widest}, notes=notes
    )


def table(result: Result) -> Table:
    """One row per layer: dimensions, and the error of its widest SAE."""
    rows = []
    for hook in result.series["hooks"]:
        sae = result.series["widest"][hook]
        dimensions = [
            with_interval(result.numbers, f"{hook}/{name}", "{:.1f}")
            for name in ("dimension", "dimension_4", "gaussian")
        ]
        errors = [with_interval(result.numbers, f"{sae}/{quantity}", "{:.3f}") for quantity in QUANTITIES]
        rows.append([hook, *dimensions, shown(result.numbers[f"{hook}/participation_ratio"], "{:.1f}"), *errors])
    return Table(
        title=f"intrinsic-dimension: {result.config['model']}, {result.config['points']} tokens a layer",
        headings=("site", "TwoNN", "of a quarter", "normal points", "participation", "FVU", "FVU nonlin."),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """What correlates with what, as far as so few layers can tell."""
    numbers, hooks = result.numbers, result.series["hooks"]
    dimensions = [numbers[f"{hook}/dimension"] for hook in hooks]
    controls = [numbers[f"{hook}/gaussian"] for hook in hooks]
    lines = [
        f"TwoNN finds {min(dimensions):.0f} to {max(dimensions):.0f} dimensions in the activations, and "
        f"{min(controls):.0f} to {max(controls):.0f} in normal points of the same covariance: activations lie on "
        f"{'less' if max(dimensions) < min(controls) else 'no less'} than their covariance says."
    ]
    for quantity, name in (("fvu", "FVU"), ("fvu_nonlinear", "FVU nonlinear")):
        rho, p = (numbers[f"rank_correlation/{quantity}/dimension{end}"] for end in ("", "/p"))
        if math.isnan(rho):
            lines.append(f"{name} and the dimension: too few layers to compare.")
            continue
        lines.append(
            f"{name} goes with the dimension at a rank correlation of {rho:+.2f} over {len(hooks)} layers (p {p:.3f} of all "
            f"orders)" + ("." if p <= 0.05 else ": not to be told from chance.")
        )
    if dimensions in (sorted(dimensions), sorted(dimensions, reverse=True)):
        lines.append(
            "The dimension goes one way with depth at every step, so depth may be what it and the error share."
        )
    return lines


def by_layer(result: Result) -> Figure:
    """Dimension and error by layer."""
    figure, (left, right) = new_panels(3.0, 2)
    hooks = result.series["hooks"]
    places = list(range(len(hooks)))
    styles = (
        ("dimension", BLUE, "all points"),
        ("dimension_2", SKY, "half of them"),
        ("dimension_4", GREY, "a quarter"),
    )
    for name, colour, label in (*styles, ("gaussian", ORANGE, "normal points")):
        values, errors = interval_bars(result, [f"{hook}/{name}" for hook in hooks])
        left.errorbar(places, values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1, color=colour, label=label)
    left.set_title("Intrinsic dimension (TwoNN)")
    for number, quantity in enumerate(QUANTITIES):
        values, errors = interval_bars(result, [f"{result.series['widest'][hook]}/{quantity}" for hook in hooks])
        label = "FVU" if quantity == "fvu" else "FVU nonlinear"
        right.errorbar(
            places, values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1, color=SERIES[number], label=label
        )
    right.set_title("Error of the SAE")
    for axes in (left, right):
        axes.set_xticks(places, [hook.removeprefix("blocks.").partition(".")[0] for hook in hooks])
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    return figure


def dimension_and_error(result: Result) -> Figure:
    """FVU_nonlinear against the dimension, one point per layer."""
    figure, panels = new_panels(2.8, 2, sharey=True)
    hooks = result.series["hooks"]
    names = [f"{result.series['widest'][hook]}/fvu_nonlinear" for hook in hooks]
    values, errors = interval_bars(result, names)
    for axes, key, title in zip(
        panels, ("dimension", "participation_ratio"), ("TwoNN dimension", "participation ratio"), strict=True
    ):
        places = [result.numbers[f"{hook}/{key}"] for hook in hooks]
        axes.errorbar(places, values, yerr=errors, fmt="o", markersize=4, linewidth=1, color=BLUE)
        for hook, x, y in zip(hooks, places, values, strict=True):
            layer = hook.removeprefix("blocks.").partition(".")[0]
            axes.annotate(layer, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set_xlabel(title)
    panels[0].set_ylabel("FVU nonlinear")
    return figure


FIGURES = {"by_layer": by_layer, "dimension_and_error": dimension_and_error}
