"""Which tokens have large error: the error norm of one SAE predicted from another's.

Is a token hard for every SAE? Error norms of several widths, token by token (figures 5, 6).

For every pair of SAEs, the (unsquared) norm of one SAE's error on held-out tokens is regressed on the other's alone; the
figures show a smaller SAE predicting a larger one. The gain is the share of the unexplained rest, (R2' - R2) / (1 - R2),
that is explained when the norm of the smaller SAE's nonlinear error joins as a second predictor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, r2_interval
from darkmatter_ext.estimators.least_squares import fit_linear
from darkmatter_ext.measurement.excerpt import excerpt
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import WIDTHS, presets
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.settings import Regressions, Settings, replaced
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import SERIES, new_panels, token_axis
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.catalogue import SAE_SETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PerTokenSettings(Settings):
    """Predict the norm of one SAE's error, token by token, from that of an SAE of another width."""


PRESETS = presets(PerTokenSettings, {"widths": WIDTHS, "sae_seeds": 2})
del PRESETS["gemma-2-9b-all-layers"]  # errors of several sites are not on the same scale
PRESETS["gemma-2-9b-l20"] = replaced(
    PRESETS["gemma-2-9b-l20"], sae=tuple(sae.spec for sae in SAE_SETS["gemma-2-9b-l20-near-60"])
)


SCRIPT = Regressions(bias=False)  # sae_power_laws_per_token.py; its regressions of norms have a bias


def plan(settings: PerTokenSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [*plan_lines(settings), "regress   the error norm of every SAE on that of every other, token by token"]


def _check_one_site(settings: PerTokenSettings) -> None:
    """Raises InputError for fewer than two SAEs, or several sites."""
    saes = settings.saes
    if len(saes.sae) == 1:
        raise InputError(f"sae: must name at least two SAEs, one predicts the other, got {saes.sae[0]}")
    if not saes.sae and sum(not own.seed for own in saes.trained) < 2:
        raise InputError(f"widths: must name at least two widths, one predicts the other, got {list(saes.widths)}")
    hooks = resolve(settings).sites
    if len(hooks) > 1:
        raise InputError(f"sae: must be of one site, errors of several are not on one scale, got {' and '.join(hooks)}")


def pair_numbers(site: SiteMeasurement, first: str, second: str) -> dict[str, float]:
    """How the error norm of the SAE `first` predicts that of `second`: R2, and what two further predictors gain, in percent."""
    norm, target, pair = [f"{first}/error_norm"], f"{second}/error_norm", f"{first}/{second}"
    return {
        **site.scalar_interval(norm, target).numbers(f"r2/{pair}"),
        **site.scalar_gain(norm, [f"{first}/nonlinear_norm"], target).numbers(f"gain/{pair}"),
        **site.scalar_gain(norm, ["x_norm"], target).numbers(f"gain_from_x/{pair}"),
    }


def shuffled_r2(norms: Tensor, contexts: Tensor, *, seed: int) -> Interval:
    """R2 of the same regression from another token's norm to a token's own: 0 up to chance (from its own: 1).

    Fitted on every other context and scored on the rest, always with a bias: without one, the known value is not 0.

    Args:
        norms: [n], of one SAE's error.
        contexts: [n] int64.
    """
    other = norms[other_tokens(len(norms), torch.Generator().manual_seed(seed))]
    fit = contexts.unique(return_inverse=True)[1] % 2 == 0
    predicted = fit_linear(other[:, None], norms[:, None], train=fit).map(other[:, None])[:, 0]
    return r2_interval(norms[~fit], predicted[~fit], contexts[~fit])


def _controls(site: SiteMeasurement, names: list[str], *, seed: int) -> dict[str, float]:
    """For each SAE's error norm: R2 from the norm of x alone, and from another token's error norm."""
    table = read_tokens(site.per_token, [f"{name}/error" for name in names])
    contexts, numbers = torch.tensor(table["context"].to_pylist()), {}
    for name in names:
        norms = torch.tensor(table[f"{name}/error"].to_pylist(), dtype=torch.float64).sqrt()
        numbers |= site.scalar_interval(["x_norm"], f"{name}/error_norm").numbers(f"x_norm/{name}")
        numbers |= shuffled_r2(norms, contexts, seed=seed).numbers(f"shuffled/{name}")
    return numbers


def run(settings: PerTokenSettings, stages: Stages) -> Result:
    """Measure all SAEs, then regress every pair.

    Raises ValueError for bad settings, fewer than two SAEs, SAEs of several sites; RuntimeError for a damaged cache or
    checkpoint.
    """
    _check_one_site(settings)
    inputs = prepare(settings, stages)
    found = measured(inputs, stages, released=SCRIPT)
    (site,) = found.sites.values()
    every: list[dict[str, Any]] = sorted(found.saes, key=lambda sae: sae["d_sae"])
    saes = [sae for sae in every if not sae.get("seed")]
    names = [sae["name"] for sae in saes]
    numbers: dict[str, float] = {}
    with stages.stage("regress error norms", len(names) ** 2) as advance:
        for first in names:
            decomposition = site.decomposition(first)
            numbers |= {f"{first}/l0": decomposition.l0, f"{first}/fvu": decomposition.fvu}
            for second in names:
                numbers |= pair_numbers(site, first, second) if second != first else {}
                advance(1)
    ceilings = [
        (own["name"], other["name"])
        for own in saes
        for other in every
        if other.get("seed") and _but_seed(other) == _but_seed(own)
    ]
    with stages.stage("regress between seeds", max(1, len(ceilings))):
        for first, second in ceilings:
            numbers |= pair_numbers(site, first, second)
        numbers |= _controls(site, names, seed=settings.seed)
    notes = [
        "Another token's error norm: a seeded shuffle, fitted on every other held-out context and scored on the rest."
    ]
    if settings.measure.released:
        notes.append("As the released code (sae_power_laws_per_token.py): b* without bias. Its shuffle is unseeded.")
    series = {"saes": saes, "ceilings": ceilings, "excerpt": excerpt(found)}
    exploration = explored(inputs, found, stages)
    return measured_result("per-token", found, stages, numbers, series=series, notes=notes, exploration=exploration)


def _but_seed(sae: dict[str, Any]) -> dict[str, Any]:
    """What SAEs that differ only in their seed have in common."""
    return sae | {"folder": "", "seed": 0, "name": sae["name"].replace(f"-seed{sae.get('seed')}", "")}


def _pairs(result: Result) -> list[tuple[str, str]]:
    """Predicting and predicted SAE, the smaller one first."""
    names = [sae["name"] for sae in result.series["saes"]]
    return [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]


def table(result: Result) -> Table:
    """One row per pair: R2 of the larger SAE's error norm, what further predictors gain; below, each SAE's controls."""
    numbers = result.numbers
    rows = [
        [
            f"{first} → {second}",
            with_interval(numbers, f"r2/{first}/{second}", "{:.3f}"),
            with_interval(numbers, f"gain/{first}/{second}", "{:.1f}%"),
            with_interval(numbers, f"gain_from_x/{first}/{second}", "{:.1f}%"),
        ]
        for first, second in [*_pairs(result), *result.series["ceilings"]]
    ]
    for name, label in (("x_norm", "norm of x"), ("shuffled", "another token's error norm")):
        for sae in result.series["saes"]:
            rows.append([f"{label} → {sae['name']}", with_interval(numbers, f"{name}/{sae['name']}", "{:.3f}"), "", ""])
    return Table(
        title=f"per-token: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=("error norm of → of", "R²", "gain, nonlinear norm", "gain, norm of x instead"),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """How well smaller SAEs predict which tokens are hard for larger ones, and whether the nonlinear norm adds to it."""
    numbers, pairs, saes = result.numbers, _pairs(result), result.series["saes"]

    def span(keys: list[str], form: str) -> str:
        values = sorted(numbers[key] for key in keys)
        low, high = shown(values[0], form), shown(values[-1], form)
        return low if low == high else f"{low} to {high}"

    def of_pairs(quantity: str) -> list[str]:
        return [f"{quantity}/{first}/{second}" for first, second in pairs]

    gains = of_pairs("gain")
    above = sum(numbers[f"{key}/low"] > 0 for key in gains)
    larger = sum(numbers[key] > numbers[key.replace("gain/", "gain_from_x/", 1)] for key in gains)
    names = [sae["name"] for sae in saes]
    first, last = names[0], names[-1]
    ceilings = [f"r2/{own}/{other}" for own, other in result.series["ceilings"]]
    ceiling = "between two seeds of one width, which is as much as there is to agree on, with "
    return [
        f"The error norm of a smaller SAE predicts, token by token, that of a larger one with R² "
        f"{span(of_pairs('r2'), '{:.2f}')}; from {first} to {last} with "
        f"{with_interval(numbers, f'r2/{first}/{last}', '{:.2f}')}"
        + (
            f"; {ceiling}{span(ceilings, '{:.2f}')}."
            if ceilings
            else ". No second seed, so no ceiling (--sae-seeds 2)."
        ),
        f"The norm of the smaller SAE's nonlinear error explains {span(gains, '{:.0f}%')} of what that leaves (beyond the "
        f"interval for {above} of {len(pairs)} pairs); the norm of x in its place {span(of_pairs('gain_from_x'), '{:.0f}%')} "
        f"(less for {larger} of {len(pairs)}).",
        f"Controls: the norm of x alone has R² {span([f'x_norm/{name}' for name in names], '{:.2f}')}, "
        f"another token's error norm {span([f'shuffled/{name}' for name in names], '{:.4f}')}.",
    ]


_ROOMY = 4  # most cells in a row that leave room for an interval
_TITLES = {"r2": "R² of the error norm", "gain": "gain from the nonlinear norm, %"}


def matrices(result: Result) -> Figure:
    """R2 of a larger SAE's error norm from a smaller one's, and the gain when the nonlinear norm joins, with intervals."""
    saes = result.series["saes"]
    figure, panels = new_panels(min(6.0, 1.2 + 0.48 * len(saes)), 2)
    for axes, (quantity, title) in zip(panels, _TITLES.items(), strict=True):
        _matrix(axes, result, quantity, "{:.3f}" if quantity == "r2" else "{:.1f}")
        axes.set_title(title)
        axes.set_xlabel("SAE predicted, latents")
    panels[0].set_ylabel("from the SAE with latents")
    return figure


def _matrix(axes: Axes, result: Result, quantity: str, form: str) -> None:
    """Draw the upper triangle: row predicts column; text is dark on light cells and light on dark ones."""
    saes, last = result.series["saes"], len(result.series["saes"]) - 1
    names = [sae["name"] for sae in saes]
    values = [
        [result.numbers[f"{quantity}/{first}/{second}"] if j > i else math.nan for j, second in enumerate(names) if j]
        for i, first in enumerate(names[:-1])
    ]
    axes.imshow(values, cmap="Blues", aspect="auto")
    finite = [value for row in values for value in row if math.isfinite(value)]
    dark = min(finite, default=0.0) + 0.55 * (max(finite, default=0.0) - min(finite, default=0.0))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isfinite(value):
                continue
            key = f"{quantity}/{names[i]}/{names[j + 1]}"
            colour = "white" if value > dark else "black"
            axes.text(j, i - 0.1, form.format(value), ha="center", va="center", color=colour, fontsize=9)
            low, high = (result.numbers[f"{key}/{end}"] for end in ("low", "high"))
            if last <= _ROOMY and math.isfinite(low):
                interval = f"{form.format(low)} to {form.format(high)}"
                axes.text(j, i + 0.25, interval, ha="center", va="center", color=colour, fontsize=6)
    labels = _labels(saes)
    axes.set_xticks(range(last), labels[1:], fontsize=8)
    axes.set_yticks(range(last), labels[:-1], fontsize=8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _labels(saes: list[dict[str, Any]]) -> list[str]:
    """Widths, or names where SAEs share one."""
    widths = [str(sae["d_sae"]) for sae in saes]
    return widths if len(set(widths)) == len(widths) else [sae["name"] for sae in saes]


def curves(result: Result) -> Figure:
    """Norms of the error and of the nonlinear error of every SAE over a piece of held-out text, token by token."""
    excerpt, saes = result.series["excerpt"], result.series["saes"]
    figure, panels = new_panels(4.6, 1, rows=2, sharex=True, sharey=True)
    for axes, part in zip(panels, ("error", "nonlinear"), strict=True):
        for number, (sae, label) in enumerate(zip(saes, _labels(saes), strict=True)):
            norms = [math.sqrt(square) for square in excerpt["squared_norms"][sae["name"]][part]]
            axes.plot(norms, color=SERIES[number % len(SERIES)], linewidth=1.1, label=label)
        axes.set_ylabel(f"norm of the\n{part} error" if part != "error" else "norm of the error")
        token_axis(axes, excerpt["tokens"])
    panels[0].set_title("A token's error in SAEs of every width")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(saes)), title="latents")
    return figure


FIGURES = {"matrices": matrices, "curves": curves}
