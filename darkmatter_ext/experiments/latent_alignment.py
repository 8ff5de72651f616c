"""Do latents that predict a large norm have a large mean active value?

Do latents that predict a large squared norm have a large mean active value (figure 14)?

a* is a linear map to a squared norm. W_dec . a*, the product of a latent's decoder row and a*, is what one unit of that latent
adds to the predicted squared norm, in squared units of activation per unit of the latent's value. It is compared with the
latent's mean value over the tokens where it is active (fit and held-out text), in units of the latent. Nothing is normalised.

*Figure 14* is about the reconstruction: a* maps Sae(x) - b_dec = sum_i z_i w_i to its own squared norm, without a bias. If
the decoder rows were orthogonal and each latent independently either silent or active with value c_i, then W_dec . a* = c_i:
the points would lie on the identity line. How closely they do is measured by the slope (of the value on W_dec . a*, through
0) and by R2. The squared norms of the error, its nonlinear part and x, predicted from x (the norm prediction test), are
shown for comparison.

Controls: the decoder rows permuted among the latents, and random directions with the norms of the rows; neither can know
which latent is large.

Shapes: d width of the site, F latents, m latents that fired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import BLOCK_VALUES, LEVEL, RESAMPLES, UNKNOWN, Interval, bootstrap
from darkmatter_ext.estimators.least_squares import LinearMap, LinearStatistics
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.reading import tokens_again
from darkmatter_ext.measurement.run import Inputs, measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT
from darkmatter_ext.ops.decode import sparse_decode
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, interval_bars, new_panels
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.inputs import InputError, require_at_least
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encode

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

NORMS_FROM_X = ("error", "nonlinear", "x")  # squared norms that a* predicts from x
RECONSTRUCTION = "reconstruction"  # the squared norm of Sae(x) - b_dec, from itself: figure 14
TARGETS = (RECONSTRUCTION, *NORMS_FROM_X)
ROWS = {
    "decoder": "the decoder rows",
    "permuted": "control: the decoder rows permuted among the latents",
    "random": "control: random directions with the norms of the decoder rows",
}
MIN_LATENTS = 3  # a correlation of two points is 1


@dataclass(frozen=True)
class LatentAlignmentSettings(Settings):
    """Compare each latent's contribution to a predicted squared norm with its mean active value."""

    reconstruction_tokens: int = 150_000
    """at most this many tokens to fit a* of the reconstruction on; they are read once more"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("reconstruction_tokens", 1, self.reconstruction_tokens)


PRESETS = presets(LatentAlignmentSettings, {"widths": (2048,)})


def plan(settings: LatentAlignmentSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    again = f"read      up to {settings.reconstruction_tokens} fit tokens once more, for the norm of the reconstruction"
    return [*plan_lines(settings), again, "compare   decoder rows . a* with mean active values, latent by latent"]


# ---- correlations


def weighted_ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Mean ranks [B, m] of values [m], each occurring weights [B, m] times; equal values share a rank."""
    _, group = values.unique(return_inverse=True)
    count = weights.new_zeros(len(weights), int(group.max()) + 1).index_add_(1, group, weights)
    return (count.cumsum(1) - (count - 1) / 2)[:, group]


def _pearson(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Correlations [B] of a and b [m] or [B, m] with weights [B, m]; NaN if either is constant."""
    n = weights.sum(1, keepdim=True)
    a, b = (values - (weights * values).sum(1, keepdim=True) / n for values in (a, b))
    return (weights * a * b).sum(1) / ((weights * a * a).sum(1) * (weights * b * b).sum(1)).sqrt()


def _both(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Pearson and Spearman correlations [B, 2]."""
    spearman = _pearson(weighted_ranks(a, weights), weighted_ranks(b, weights), weights)
    return torch.stack([_pearson(a, b, weights), spearman], dim=1)


def correlations(a: Tensor, b: Tensor, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Pearson and Spearman correlation of a and b, float64 [m], with percentile intervals from resampling latents.

    NaN with fewer than MIN_LATENTS. Cost: `resamples` times O(m); ranks are recomputed in every draw.
    """
    m = len(a)
    if m < MIN_LATENTS:
        return dict.fromkeys(("pearson", "spearman"), UNKNOWN)
    values = _both(a, b, torch.ones(1, m, dtype=torch.float64))[0].tolist()
    generator, draws = torch.Generator().manual_seed(seed), []
    for part in torch.arange(resamples).split(max(1, BLOCK_VALUES // m)):
        drawn = torch.randint(m, (len(part), m), generator=generator)
        weights = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        draws.append(_both(a, b, weights))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    ends = torch.cat(draws).nanquantile(tails, dim=0).T.tolist()  # [2, low and high]
    pearson, spearman = (Interval(value, *own) for value, own in zip(values, ends, strict=True))
    return {"pearson": pearson, "spearman": spearman}


def identity_numbers(alignment: Tensor, value: Tensor, *, seed: int) -> dict[str, float]:
    """`slope` of value on alignment (both [m]) through 0; `identity_r2`, R2 of value = alignment; resampling latents."""
    if len(value) < MIN_LATENTS:
        return UNKNOWN.numbers("slope") | UNKNOWN.numbers("identity_r2")
    a, v = alignment.double(), value.double()
    sums = torch.stack([a * v, a * a, (v - a).square(), v.square(), v, torch.ones_like(v)], dim=1)

    def statistic(totals: Tensor) -> Tensor:
        av, aa, rest, vv, total, n = totals.unbind(-1)
        return torch.stack([av / aa, 1 - rest / (vv - total.square() / n)], dim=-1)

    slope, r2 = bootstrap(sums, statistic, seed=seed)
    return slope.numbers("slope") | r2.numbers("identity_r2")


def directions(w_dec: Tensor, *, seed: int) -> dict[str, Tensor]:
    """ROWS of a decoder [F, d]: the rows themselves and the two controls, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = w_dec.double().cpu()
    random = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    random *= rows.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return {"decoder": rows, "permuted": rows[torch.randperm(len(rows), generator=generator)], "random": random}


@dataclass(frozen=True)
class Alignment:
    """What the latents of one SAE add to each predicted norm, and how large and frequent they are."""

    values: dict[str, dict[str, Tensor]]  # target -> row kind -> [F]
    mean_active_value: Tensor  # [F], NaN where never active
    fired: Tensor  # [F] tokens

    def numbers(self, *, seed: int) -> dict[str, float]:
        """Correlations over the latents that fired: "error/decoder/pearson" with its interval, etc."""
        kept = self.fired > 0
        numbers: dict[str, float] = {"latents": len(kept), "latents_never_fired": int((~kept).sum())}
        for target, every in self.values.items():
            for kind, own in every.items():
                found = correlations(own[kept], self.mean_active_value[kept], seed=seed)
                for name, interval in found.items():
                    numbers |= interval.numbers(f"{target}/{kind}/{name}")
        if RECONSTRUCTION in self.values:
            own = self.values[RECONSTRUCTION]["decoder"][kept]
            line = identity_numbers(own, self.mean_active_value[kept], seed=seed)
            numbers |= {f"{RECONSTRUCTION}/decoder/{name}": value for name, value in line.items()}
        return numbers

    def arrays(self) -> dict[str, np.ndarray]:
        """One value per latent, for the scatter plot."""
        columns = {"mean_active_value": self.mean_active_value, "fired": self.fired}
        columns |= {f"alignment/{target}": every["decoder"] for target, every in self.values.items()}
        return {name: column.cpu().numpy() for name, column in columns.items()}


def reconstruction_map(batches: Iterable[Tensor], encode: Encode, rows: Tensor) -> LinearMap:
    """a* [d, 1]: least squares without bias from s = Sae(x) - b_dec to ||s||^2, as in figure 14.

    s is computed from the latents, sum_i z_i w_i with `rows` [F, d], so it is in their units whatever scaling surrounds them.
    """
    statistics = LinearStatistics(rows.shape[1], 1, rows.device)
    for x in batches:
        s = sparse_decode(encode(x).acts, rows).double()
        statistics.update(s, s.square().sum(1, keepdim=True))
    return statistics.about_zero().solve()


def alignment(
    w_dec: Tensor, maps: Mapping[str, Tensor], mean_active_value: Tensor, fired: Tensor, *, seed: int
) -> Alignment:
    """W_dec . a* of decoder rows [F, d] for each map a* [d, 1] in `maps`, with the latents' values and counts [F]."""
    rows = directions(w_dec, seed=seed)
    values = {
        target: {kind: (own @ a_star.cpu().double()).flatten() for kind, own in rows.items()}
        for target, a_star in maps.items()
    }
    return Alignment(values, mean_active_value.cpu(), fired.cpu())


def decoder_rows(sae: Any, d: int, folder: str) -> tuple[Tensor, str]:
    """What one unit of each latent adds, [F, d]: W_dec of an SAE; and how it normalises activations before encoding.

    Raises InputError if it has no decoder rows of the site's width.
    """
    w_dec = getattr(sae, "W_dec", None)
    shape = None if w_dec is None else list(w_dec.shape)
    if w_dec is None or w_dec.ndim != 2 or w_dec.shape[1] != d:
        raise InputError(f"sae: must have decoder rows W_dec of shape [latents, {d}], got {shape} in {folder}")
    rows = w_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # its latents are in units of their rows' norms
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows, str(sae.cfg.normalize_activations)


def _fit_tokens(inputs: Inputs, sae: SiteSae, settings: LatentAlignmentSettings) -> Iterable[Tensor]:
    """Fit tokens at an SAE's site, or any measured tokens as in the released code."""
    roles = (FIT, HELD_OUT) if settings.measure.released else (FIT,)
    limit, seed, device = settings.reconstruction_tokens, settings.seed, settings.device
    again = tokens_again(inputs.source, inputs.roles, sae.hook, roles, limit=limit, seed=seed, device=device)
    return (tokens.x for tokens in again)


def run(settings: LatentAlignmentSettings, stages: Stages) -> Result:
    """Measure the family of SAEs and compare their latents.

    Raises ValueError for bad settings, SAEs that do not fit or have no decoder rows; RuntimeError for damaged files.
    """
    inputs = prepare(settings, stages)
    found = measured(inputs, stages)
    numbers: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    notes = [
        "Correlations over the latents that fired on fit or held-out text; the others are counted and left out. Their "
        f"intervals: 95 %, latents drawn again {RESAMPLES} times.",
        "W_dec . a* is in squared units of activation per unit of the latent; mean active values in units of the latent.",
    ]
    for sae in found.saes:
        name, site = sae["name"], found.site_of(sae["name"])
        with stages.stage(f"align {name}"):
            maps = {target: site.norm_map(name, target).weight for target in NORMS_FROM_X}
            own_sae = inputs.sae(name)
            loaded = own_sae.load()
            w_dec, normalised = decoder_rows(loaded, len(maps["error"]), sae["folder"])
            again = _fit_tokens(inputs, own_sae, settings)
            maps[RECONSTRUCTION] = reconstruction_map(again, own_sae.own_of(loaded), w_dec).weight
            latents = site.latents[name]
            own = alignment(w_dec, maps, latents.mean_active_value, latents.fired, seed=settings.seed)
            numbers |= {f"{name}/{key}": value for key, value in own.numbers(seed=settings.seed).items()}
            arrays |= {f"{name}/{key}": column for key, column in own.arrays().items()}
        if normalised not in ("none", "None"):
            notes.append(f"{name} normalises activations ({normalised}): its latents are in units of their own.")
    series = {"targets": TARGETS, "rows": ROWS}
    return measured_result("latent-alignment", found, stages, numbers, series=series, arrays=arrays, notes=notes)


_NAMES = {RECONSTRUCTION: "Sae(x) - b_dec (figure 14)", "error": "error", "nonlinear": "nonlinear error", "x": "x"}


def table(result: Result) -> Table:
    """One row per SAE, squared norm and kind of direction: both correlations, and for figure 14 the identity line's numbers."""
    rows = []
    for sae in result.series["saes"]:
        for target in result.series["targets"]:
            for kind in result.series["rows"]:
                names = [
                    f"{sae['name']}/{target}/{kind}/{name}" for name in ("pearson", "spearman", "slope", "identity_r2")
                ]
                cells = [
                    with_interval(result.numbers, name, "{:.2f}") if name in result.numbers else "" for name in names
                ]
                rows.append([sae["name"], _NAMES[target], kind, *cells])
    return Table(
        title=f"latent-alignment: {result.config['model']}, {result.config['hook']}, direction . a* against mean active value",
        headings=(
            "SAE",
            "a* predicts the squared norm of",
            "directions",
            "Pearson",
            "Spearman",
            "slope",
            "R² of identity",
        ),
        rows=rows,
    )


def reading(result: Result) -> list[str]:
    """Figure 14: whether W_dec . a* is the mean active value; and whether latent sizes correlate with the error's norm."""
    numbers, lines = result.numbers, []
    for sae in result.series["saes"]:
        name = sae["name"]
        fig = {
            key: with_interval(numbers, f"{name}/{RECONSTRUCTION}/decoder/{key}", "{:.2f}")
            for key in ("pearson", "slope", "identity_r2")
        }
        lines.append(
            f"{name}: against W_dec . a* of the reconstruction (figure 14) mean active values have Pearson {fig['pearson']}, "
            f"slope {fig['slope']} and R² {fig['identity_r2']} of the identity line, where independent orthogonal latents "
            "would have 1, 1 and 1."
        )
        low, high = (numbers[f"{name}/error/decoder/spearman/{end}"] for end in ("low", "high"))
        verdict = "go with" if low > 0 else "go against" if high < 0 else "do not clearly go with"
        lines.append(
            f"{name}: mean active values {verdict} W_dec . a* of the error (Spearman "
            f"{with_interval(numbers, f'{name}/error/decoder/spearman', '{:.2f}')}; rows permuted "
            f"{with_interval(numbers, f'{name}/error/permuted/spearman', '{:.2f}')}); with a* of x it is "
            f"{with_interval(numbers, f'{name}/x/decoder/spearman', '{:.2f}')}. {numbers[f'{name}/latents_never_fired']:.0f} "
            f"of {numbers[f'{name}/latents']:.0f} latents never fired."
        )
    return lines


_TARGETS = {
    RECONSTRUCTION: "a* of Sae(x)",
    "error": "a* of the error",
    "nonlinear": "a* of the nonlinear error",
    "x": "a* of x",
}
_ROWS = {
    "decoder": ("decoder rows", BLUE),
    "permuted": ("rows permuted", GREY),
    "random": ("random directions", ORANGE),
}


def scatter(result: Result) -> Figure | None:
    """W_dec . a* against the mean active value, one point per latent that fired, for the widest SAE."""
    if not result.arrays:  # they are in a separate file, which may not have been sent along
        return None
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    sae = max(result.series["saes"], key=lambda sae: sae["d_sae"])
    fired = result.arrays[f"{sae['name']}/fired"]
    kept, values = fired > 0, result.arrays[f"{sae['name']}/mean_active_value"]
    figure, panels = new_panels(5.2, 2, rows=2, sharey=True)
    norm = LogNorm(max(1.0, float(fired[kept].min())), max(2.0, float(fired.max())))
    order = fired[kept].argsort()  # frequent latents on top
    for axes, (target, title) in zip(panels, _TARGETS.items(), strict=True):
        alignment = result.arrays[f"{sae['name']}/alignment/{target}"]
        axes.scatter(
            alignment[kept][order],
            values[kept][order],
            c=fired[kept][order],
            norm=norm,
            cmap="viridis",
            s=4,
            linewidths=0,
            rasterized=True,
        )
        axes.axvline(0, color="black", linewidth=0.6)
        pearson = result.numbers[f"{sae['name']}/{target}/decoder/pearson"]
        axes.set_title(f"{title}\nPearson {pearson:.2f}", fontsize=8.5)
        axes.set_xlabel("W_dec · a*")
        axes.set_yscale("log")
        if target == RECONSTRUCTION:  # where independent orthogonal latents would lie
            ends = [values[kept].min(), values[kept].max()]
            line = [ends[0] * (ends[1] / ends[0]) ** (step / 50) for step in range(51)]  # bent by the other axis
            axes.plot(line, line, color=GREY, linewidth=0.8, linestyle="--")
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=panels, label="tokens where active")
    for axes in panels[::2]:
        axes.set_ylabel("mean active value")
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    return figure


def correlation_bars(result: Result) -> Figure:
    """Pearson and Spearman correlation of every SAE, with intervals, compared with the controls."""
    saes = result.series["saes"]
    figure, panels = new_panels(4.6, 2, rows=2, sharey=True)
    kinds = ("pearson", "spearman")
    groups = [(sae, kind) for kind in kinds for sae in saes]
    for axes, (target, title) in zip(panels, _TARGETS.items(), strict=True):
        for number, (row, (label, colour)) in enumerate(_ROWS.items()):
            names = [f"{sae['name']}/{target}/{row}/{kind}" for sae, kind in groups]
            heights, errors = interval_bars(result, names)
            where = [place + 0.22 * (number - 1) for place in range(len(groups))]
            axes.errorbar(where, heights, yerr=errors, fmt="o", color=colour, markersize=3.5, linewidth=1, label=label)
        axes.axhline(0, color="black", linewidth=0.6)
        middles = [(len(saes) - 1) / 2 + number * len(saes) for number in range(len(kinds))]
        axes.set_xticks(middles, [kind.capitalize() for kind in kinds])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_title(title, fontsize=8.5)
        if len(saes) > 1:
            axes.axvline(len(saes) - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    for axes in panels[::2]:
        axes.set_ylabel("correlation with\nmean active value")
    if len(saes) > 1:
        panels[-1].set_xlabel("SAEs from left to right as in the table")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_ROWS))
    return figure


FIGURES = {"scatter": scatter, "correlations": correlation_bars}
