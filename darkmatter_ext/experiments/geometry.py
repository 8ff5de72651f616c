"""What shape has the cloud of an SAE's features: parallelograms, lobes that fire together, a power law?

Three scales after Li, Michaud, Baek, Engels, Sun, Tegmark, "The Geometry of Concepts" (2410.19750), with other controls:

- *Atoms*: whether activation differences of word pairs in one relation are parallel (quality 0) or not (1), before and
  after linear discriminants fitted on other pairs without a common word.
- *Lobes*: latents that are active in the same chunks of text (spectral clusters of phi) compared with clusters of decoder
  rows: adjusted mutual information, and how well a row predicts its lobe. Nulls: labels permuted; labels permuted within
  deciles of frequency (rare latents share both small phi and their rows); Gaussian rows of the same covariance; each
  latent's chunks shuffled. Control: random directions with their own codes; nearby rows fire together whatever made them.
- *Galaxy*: the slope alpha of the decoder rows' eigenvalues, how many directions they fill, and their entropy compared with
  that of a Gaussian cloud of the same covariance.
- *Dark matter* (new): whether a lobe's directions hold more of the nonlinear error than as many latents of its frequency.

Shapes: n tokens, F latents, d width of the site, c chunks, B draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from darkmatter_ext.activations.text_sites import text_sites
from darkmatter_ext.estimators.clusters import deciles
from darkmatter_ext.estimators.co_occurrence import MEASURES, CoOccurrence, present, unrelated
from darkmatter_ext.estimators.discriminant import discriminant_directions, parallelogram_quality, silhouette
from darkmatter_ext.estimators.intervals import bootstrap
from darkmatter_ext.estimators.lobes import LOBE_DIRECTIONS, angles, dark_numbers, lobe_numbers, middle, random_numbers
from darkmatter_ext.estimators.spectrum import eigenvalues, galaxy_numbers
from darkmatter_ext.measurement.error import sae_error
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import presets
from darkmatter_ext.measurement.run import Inputs, Measurement, measured, prepare
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.measurement.tokens import HELD_OUT, UNUSED
from darkmatter_ext.measurement.word_pairs import WordPairs, read_pairs
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.report.measured import measured_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SERIES,
    interval_bars,
    legend_beside,
    new_figure,
    new_panels,
)
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError, require, require_at_least, require_one_of
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import random_directions, random_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READ_CONTEXTS = 16  # contexts read at a time
SPLITS = 5  # splits of the word pairs into halves
MOST_LATENTS = 16_384  # in an SAE: three tables of counts take 12 F^2 bytes
MOST_PANELS = 4
DRAWN_BINS = 128  # bins of latents in the picture of an affinity
NULLS = {"permuted": "labels permuted", "frequency": "within frequency deciles", "gaussian": "Gaussian rows"}


@dataclass(frozen=True)
class GeometrySettings(Settings):
    """Measure the geometry of decoder rows at three scales, and where the nonlinear error lies among them."""

    chunk: int = 64
    """tokens in a chunk of text, in which latents count as active together"""
    least_chunks: int = 20
    """leave out latents that are active in fewer chunks"""
    clusters: tuple[int, ...] = (2, 4, 8, 16, 32)
    """numbers of lobes; the middle one is used for accuracy and dark matter"""
    measures: tuple[str, ...] = MEASURES
    """measures of co-occurrence: phi, jaccard, dice, overlap, simple"""
    pairs: str = ""
    """CSV file with columns relation, a and b; default: 12 relations of 20 English word pairs"""
    frame: str = "Here is the next word on the list that I wrote:"
    """text before every word of a pair, so that the word comes after a context's first positions"""
    null_draws: int = 100
    """draws of every null that permutes labels"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("chunk", 2), ("least_chunks", 1), ("null_draws", 2)):
            require_at_least(name, least, getattr(self, name))
        for name in ("clusters", "measures"):
            require(bool(getattr(self, name)), name, "must name at least one", "none")
        require_at_least("clusters", 2, min(self.clusters))
        require("phi" in self.measures, "measures", "must have phi among them", " ".join(self.measures))
        for measure in self.measures:
            require_one_of("measures", MEASURES, measure)


PRESETS = presets(GeometrySettings, {"widths": (2048,), "layers": (5, 10, 15, 20)})


def plan(settings: GeometrySettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [
        *plan_lines(settings),
        f"atoms     {settings.pairs or '240 built-in word pairs'}; {SPLITS} divisions into halves",
        f"lobes     chunks of {settings.chunk} tokens; {', '.join(settings.measures)}; {list(settings.clusters)} clusters; "
        f"{settings.null_draws} draws of each null",
        "galaxy    eigenvalues of the decoder rows",
    ]


# ---- atoms


def atom_numbers(differences: Tensor, pairs: WordPairs, *, seed: int) -> dict[str, float]:
    """Quality of each relation's parallelograms before and after discriminants, on pairs not used to fit these.

    Args:
        differences: [n, d], h(b) - h(a) of each pair.

    Returns `RELATION/quality/before` and `/after`, means over SPLITS halves; `atoms/quality/...`, means over relations, with
    intervals from resampling relations; `/shuffled`: after discriminants of shuffled relations; `atoms/silhouette/...`.
    """
    found: dict[str, list[Tensor]] = {"before": [], "after": [], "shuffled": []}
    separated: dict[str, list[float]] = {key: [] for key in found}
    for split in range(SPLITS):
        fit = pairs.halves(seed=seed + split)
        order = torch.randperm(int(fit.sum()), generator=torch.Generator().manual_seed(seed + split))
        labels, rest = pairs.labels[~fit], differences[~fit]
        views = {"before": rest}
        for key, own in (("after", pairs.labels[fit]), ("shuffled", pairs.labels[fit][order])):
            views[key] = rest.double() @ discriminant_directions(differences[fit], own)
        for key, view in views.items():
            found[key].append(parallelogram_quality(view, labels))
            separated[key].append(silhouette(view, labels))
    numbers: dict[str, float] = {}
    for key, values in found.items():
        mean = torch.stack(values).nanmean(0)
        numbers |= {f"{name}/quality/{key}": value for name, value in zip(pairs.relations, mean.tolist(), strict=True)}
        sums = torch.stack([mean, torch.ones_like(mean)], dim=1)
        own = bootstrap(sums, lambda totals: totals[..., :1] / totals[..., 1:], seed=seed)[0]
        numbers |= own.numbers(f"atoms/quality/{key}")
        numbers[f"atoms/silhouette/{key}"] = sum(separated[key]) / SPLITS
    return numbers


# ---- the run


class _Read(NamedTuple):
    counts: CoOccurrence
    dealt: CoOccurrence
    random: CoOccurrence | None  # of random directions; None if the SAE has no decoder bias
    covariance: Tensor  # [d, d] of the nonlinear error on held-out tokens


def _blocks(inputs: Inputs, hook: str, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Measured tokens: x [n, d], whether each is held out [n], the chunk of each [n], and the number of chunks."""
    per_context = inputs.source.context_length // chunk
    for part in torch.arange(inputs.source.n_contexts).split(READ_CONTEXTS):
        batch = inputs.source.read(part.tolist())
        roles, _ = inputs.roles.of(batch, hook)
        place = torch.arange(roles.shape[1])
        number = torch.arange(len(part))[:, None] * per_context + place // chunk
        used = (roles != UNUSED) & (place < per_context * chunk)
        yield batch.activations[hook][used], roles[used] == HELD_OUT, number[used], len(part) * per_context


@torch.no_grad()
def _read(inputs: Inputs, sae: SiteSae, found: Measurement, settings: GeometrySettings) -> _Read:
    """Co-occurrence over all measured text, and the covariance of the nonlinear error."""
    site, device = found.site_of(sae.name), inputs.processes.device
    encode, b_star, loaded = sae.own, site.maps[sae.name], sae.load()
    counts, dealt = CoOccurrence.empty(sae.d_sae), CoOccurrence.empty(sae.d_sae)
    control, random = None, None
    if hasattr(loaded, "b_dec"):
        control, random = random_directions(loaded, _l0(found, sae), seed=settings.seed), CoOccurrence.empty(sae.d_sae)
    generator = torch.Generator().manual_seed(settings.seed)
    total, n = torch.zeros(sae.d_in, sae.d_in, dtype=torch.float64), 0
    for x, held_out, chunks, n_chunks in _blocks(inputs, sae.hook, settings.chunk):
        encoded = encode(x.to(device))
        there = _present(encoded.acts, chunks, n_chunks)
        counts.add(there)
        if control is not None and random is not None:
            random.add(_present(control(x.to(device)).acts, chunks, n_chunks))
        dealt.add(unrelated(there, generator))
        rest = (sae_error(x, encoded.x_hat.cpu()).double() - b_star(x))[held_out]
        total += rest.mT @ rest
        n += len(rest)
    return _Read(counts, dealt, random, total / max(1, n))


def _l0(found: Measurement, sae: SiteSae) -> int:
    return max(1, round(found.site_of(sae.name).decomposition(sae.name).l0))


def _present(acts: SparseActs, chunks: Tensor, n_chunks: int) -> Tensor:
    """[n_chunks, F] bool: which latents are active in which chunk; chunks [n] gives each token's chunk."""
    active = acts.values.reshape(-1) != 0
    token, latent = acts.token_numbers()[active].cpu(), acts.col_indices[active].cpu()
    return present(chunks[token], latent, n_chunks, acts.d_sae)


def _pairs_at(
    inputs: Inputs, hooks: Sequence[str], pairs: WordPairs, settings: GeometrySettings, stages: Stages
) -> tuple[Mapping[str, Tensor], list[str]]:
    """hook point -> [n, d] differences of the last tokens of each pair's words; and notes on attention sinks among them."""
    usage, data = inputs.resolved.usage, settings.data
    texts = [f"{settings.frame} {word}" for word in pairs.words]
    with stages.stage("read word pairs", len(pairs.words)) as advance:
        sites = text_sites(
            inputs.model, hooks, texts, bos=usage.bos, device=inputs.processes.device, dtype=getattr(torch, data.dtype),
            processing=usage.processing, progress=advance,
        )  # fmt: skip
    number = {word: place for place, word in enumerate(pairs.words)}
    a, b = (torch.tensor([number[word] for word in words]) for words in (pairs.first, pairs.second))
    notes = [note for hook in hooks for note in sites.sink_notes(hook, settings.measure.max_norm_ratio)]
    return {hook: x[b] - x[a] for hook, x in sites.x.items()}, notes


def run(settings: GeometrySettings, stages: Stages) -> Result:
    """Measure the SAEs, read their text once more, and look at their rows.

    Raises InputError for bad settings or pairs, SAEs that do not fit or have no decoder rows; StateError for damaged files.
    """
    pairs = read_pairs(settings.pairs)  # reject a bad file before anything runs
    inputs = prepare(settings, stages)
    for sae in inputs.saes:
        require(sae.d_sae <= MOST_LATENTS, "sae", f"must have at most {MOST_LATENTS} latents here", sae.d_sae)
    found = measured(inputs, stages)
    hooks = list(dict.fromkeys(sae.hook for sae in inputs.saes))
    numbers: dict[str, float] = {}
    differences_at, sinks = _pairs_at(inputs, hooks, pairs, settings, stages)
    for hook, differences in differences_at.items():
        own = atom_numbers(differences, pairs, seed=settings.seed)
        numbers |= {f"{hook}/{key}": value for key, value in own.items()}
    arrays: dict[str, np.ndarray] = {}
    for sae in inputs.saes:
        with stages.stage(f"geometry of {sae.name}"):
            own, more = _of_sae(inputs, sae, found, settings)
        numbers |= {f"{sae.name}/{key}": value for key, value in own.items()}
        arrays |= {f"{sae.name}/{key}": value for key, value in more.items()}
    notes = [
        f"Lobes are of measured text, in chunks of {settings.chunk} tokens. A null has mean and sd of its draws; phi is what "
        "the nulls are of. Quality of parallelograms: on pairs that discriminants were not fitted on, intervals 95 % drawing "
        "relations again; alpha: leaving out one of ten groups of rows at a time.",
        *sinks,
    ]
    series: dict[str, Any] = {"relations": pairs.relations, "hooks": hooks, "nulls": NULLS}
    return measured_result("geometry", found, stages, numbers, series=series, arrays=arrays, notes=notes)


def _of_sae(
    inputs: Inputs, sae: SiteSae, found: Measurement, settings: GeometrySettings
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Lobes, galaxy and dark matter of one SAE, and the arrays that figures draw."""
    rows = getattr(sae.load(), "W_dec", None)
    if rows is None or rows.shape[1] != sae.d_in:
        raise InputError(f"sae: must have decoder rows W_dec of shape [latents, {sae.d_in}], got none in {sae.folder}")
    read = _read(inputs, sae, found, settings)
    latents = read.counts.often(settings.least_chunks)
    seed = settings.seed
    fewest = 2 * max(settings.clusters)
    if len(latents) < fewest:
        raise InputError(
            f"least_chunks: must leave at least twice as many latents as clusters ({fewest}), got {len(latents)} in {sae.name}"
        )
    rows = rows.detach().float().cpu()
    counts, kept, draws = read.counts.of(latents), rows[latents], settings.null_draws
    numbers, lobes = lobe_numbers(
        counts, read.dealt.of(latents), kept, settings.clusters, settings.measures, draws=draws, seed=seed
    )
    numbers |= _random_numbers(read.random, sae, settings)
    numbers |= galaxy_numbers(rows, seed=seed)
    numbers |= dark_numbers(kept, lobes, deciles(counts.counts), read.covariance, draws=draws, seed=seed)
    numbers |= {"chunks": read.counts.chunks, "latents_used": len(latents)}
    return numbers, _drawn(counts, kept, lobes, rows, seed=seed)


def _random_numbers(read: CoOccurrence | None, sae: SiteSae, settings: GeometrySettings) -> dict[str, float]:
    """Lobes of those random directions that are active in enough chunks; empty if too few are."""
    if read is None:
        return {}
    latents = read.often(settings.least_chunks)
    if len(latents) < 2 * max(settings.clusters):
        return {}
    rows = random_rows((sae.d_sae, sae.d_in), settings.seed)[latents]
    return random_numbers(read.of(latents), rows, settings.clusters, seed=settings.seed)


def _drawn(counts: CoOccurrence, kept: Tensor, lobes: Tensor, rows: Tensor, *, seed: int) -> dict[str, np.ndarray]:
    """phi and angles, with latents sorted by lobe and averaged in DRAWN_BINS bins; eigenvalues of these and Gaussian rows."""
    order = lobes.argsort(stable=True)
    bins = torch.nn.functional.one_hot(torch.arange(len(order)) * DRAWN_BINS // len(order), DRAWN_BINS).double()
    bins = bins / bins.sum(0).clamp(min=1)
    white = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    white = white * (rows.double().var(0).sum() / rows.shape[1]).sqrt()
    pictures = {"phi": counts.affinity("phi"), "angle": angles(kept)}
    found = {name: bins.mT @ own.fill_diagonal_(0)[order][:, order] @ bins for name, own in pictures.items()}
    found |= {"spectrum": eigenvalues(rows), "spectrum_gaussian": eigenvalues(white)}
    return {name: own.float().numpy() for name, own in found.items()} | {"lobes": lobes[order].numpy()}


# ---- what is shown


def table(result: Result) -> Table:
    """One row per SAE: lobes compared with their nulls, the power law, parallelograms, dark matter."""
    numbers, k = result.numbers, middle(result.config["clusters"])
    rows = []
    for sae in result.series["saes"]:
        name, hook = sae["name"], sae["hook"]
        ami = f"{name}/ami/phi/{k}"
        nulls = [_with_sd(numbers, f"{name}/ami_null/{null}/{k}") for null in result.series["nulls"]]
        atoms = [with_interval(numbers, f"{hook}/atoms/quality/{key}", "{:.2f}") for key in ("before", "after")]
        dark = [
            shown(numbers[f"{name}/dark/largest_lobe"], "{:.2f}"),
            _with_sd(numbers, f"{name}/dark/largest_lobe_null"),
        ]
        alpha = with_interval(numbers, f"{name}/alpha", "{:.2f}")
        random = numbers.get(f"{name}/ami_random_directions/{k}")
        rows.append([
            name, shown(numbers[ami], "{:.3f}"), *nulls, "" if random is None else shown(random, "{:.3f}"), alpha, *atoms, *dark
        ])  # fmt: skip
    return Table(
        title=f"geometry: {result.config['model']}, {result.config['hook']}, {k} lobes",
        headings=(
            "SAE", "AMI", *(f"null: {about}" for about in result.series["nulls"].values()), "random directions",
            "alpha", "quality",
            "after discriminants", "dark matter in a lobe", "null",
        ),
        rows=rows,
    )  # fmt: skip


def _with_sd(numbers: Mapping[str, float], name: str) -> str:
    return f"{shown(numbers[f'{name}/mean'], '{:.3f}')} ± {shown(numbers[f'{name}/sd'], '{:.3f}')}"


def deviations(numbers: Mapping[str, float], value: str, null: str) -> float:
    """How many standard deviations of the null a value lies above the null's mean."""
    return (numbers[value] - numbers[f"{null}/mean"]) / max(numbers[f"{null}/sd"], 1e-12)


def reading(result: Result) -> list[str]:
    """Whether lobes are local beyond frequency, how steep the spectrum is, whether parallelograms and dark matter stand out."""
    numbers, k = result.numbers, middle(result.config["clusters"])
    lines = []
    for sae in result.series["saes"]:
        name = sae["name"]
        z = {
            null: deviations(numbers, f"{name}/ami/phi/{k}", f"{name}/ami_null/{null}/{k}")
            for null in result.series["nulls"]
        }
        verdict = "beyond frequency" if z["frequency"] > 3 else "no further than frequency tells"
        random = [numbers[key] for key in [f"{name}/ami_random_directions/{k}"] if key in numbers]
        where = deviations(numbers, f"{name}/dark/largest_lobe", f"{name}/dark/largest_lobe_null")
        lines.append(
            f"{name}: latents that fire together are near each other {verdict}: AMI {numbers[f'{name}/ami/phi/{k}']:.3f} of "
            f"{k} lobes is {z['permuted']:.1f} sd above permuted labels, {z['frequency']:.1f} above labels permuted within "
            f"frequency deciles, {z['gaussian']:.1f} above Gaussian rows ({numbers[f'{name}/latents_used']:.0f} latents, "
            f"{numbers[f'{name}/chunks']:.0f} chunks)."
            + "".join(f" Random directions in codes of their own have {value:.3f}." for value in random)
        )
        lines.append(
            f"{name}: alpha {with_interval(numbers, f'{name}/alpha', '{:.2f}')} (Gaussian rows "
            f"{numbers[f'{name}/alpha_gaussian']:.2f}; the paper, Gemma 2 2B with 65k latents: 0.24 to 0.49 by layer). The "
            f"largest share of the nonlinear error in {LOBE_DIRECTIONS} directions of a lobe, "
            f"{numbers[f'{name}/dark/largest_lobe']:.2f}, is {where:.1f} sd above lobes dealt within frequency deciles."
        )
    for hook in result.series["hooks"]:
        before, after, other = (
            with_interval(numbers, f"{hook}/atoms/quality/{key}", "{:.2f}") for key in ("before", "after", "shuffled")
        )
        lines.append(
            f"{hook}: word pairs of a relation differ {before} as much as any two (0: parallelograms); after discriminants "
            f"of other pairs {after}, of shuffled relations {other}."
        )
    return lines


def _short(name: str) -> str:
    """An SAE's name for a figure: blocks.5.hook_resid_post/topk-2048 is "block 5, topk-2048"."""
    return re.sub(r"^blocks\.(\d+)\.hook_resid_post", r"block \1", name).replace("/", ", ")


def lobes(result: Result) -> Figure:
    """phi (left) and angles between rows (right) of latents sorted by lobe, for the SAE whose lobes agree best."""
    k = middle(result.config["clusters"])
    sae = max(result.series["saes"], key=lambda sae: result.numbers[f"{sae['name']}/ami/phi/{k}"])["name"]
    figure, panels = new_panels(3.0, 2)
    for axes, name, title in zip(
        panels, ("phi", "angle"), ("phi: firing together", "1 - angle / π of rows"), strict=True
    ):
        values = result.arrays[f"{sae}/{name}"]
        low, high = np.quantile(values, [0.02, 0.98])
        figure.colorbar(axes.imshow(values, vmin=low, vmax=high, cmap="viridis"), ax=axes, shrink=0.8)
        axes.set_title(title)
        edges = np.flatnonzero(np.diff(result.arrays[f"{sae}/lobes"])) + 1
        places = edges * len(values) / len(result.arrays[f"{sae}/lobes"])
        axes.set_xticks(places, [""] * len(places))
        axes.set_yticks(places, [""] * len(places))
    panels[0].set_ylabel(f"latents by lobe, {_short(sae)}")
    return figure


def agreement(result: Result) -> Figure:
    """Agreement of lobes and clusters of rows against their number, with its nulls (2 sd); four SAEs at most."""
    saes, counts = result.series["saes"][:MOST_PANELS], sorted(result.config["clusters"])
    figure, panels = new_panels(2.6, len(saes), sharey=True)
    for axes, sae in zip(panels, saes, strict=True):
        name = sae["name"]
        axes.plot(range(len(counts)), [result.numbers[f"{name}/ami/phi/{k}"] for k in counts], "o-", color=BLUE,
                  markersize=4, label="phi")  # fmt: skip
        for (null, about), colour, marker in zip(
            result.series["nulls"].items(), (GREY, ORANGE, GREEN), "xs^", strict=True
        ):
            mean, sd = ([result.numbers[f"{name}/ami_null/{null}/{k}/{key}"] for k in counts] for key in ("mean", "sd"))
            axes.errorbar(range(len(counts)), mean, yerr=[2 * own for own in sd], fmt=f"{marker}-", color=colour,
                          markersize=3.5, linewidth=1, label=f"null: {about}")  # fmt: skip
        random = [result.numbers.get(f"{name}/ami_random_directions/{k}", math.nan) for k in counts]
        axes.plot(
            range(len(counts)), random, "d--", color=SERIES[3], markersize=3.5, linewidth=1, label="random directions"
        )
        axes.set_xticks(range(len(counts)), counts)
        axes.set_title(_short(name).replace(", ", ",\n"), fontsize=8)
        axes.set_xlabel("clusters")
    panels[0].set_ylabel("adjusted mutual information")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def spectrum(result: Result) -> Figure:
    """Eigenvalues of the decoder rows against their rank, compared with Gaussian rows of the same variance."""
    figure, axes = new_figure(2.6)
    for number, sae in enumerate(result.series["saes"]):
        name = sae["name"]
        values, null = (result.arrays[f"{name}/{key}"] for key in ("spectrum", "spectrum_gaussian"))
        ranks = np.arange(1, len(values) + 1)
        label = f"{_short(name)}, alpha {result.numbers[f'{name}/alpha']:.2f}"
        axes.plot(ranks, values, color=SERIES[number % len(SERIES)], linewidth=1.2, label=label)
        axes.plot(ranks, null, color=GREY, linewidth=0.8, label=None if number else "Gaussian rows")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-6))
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue of W_dec's covariance")
    legend_beside(axes)
    return figure


def parallelograms(result: Result) -> Figure:
    """Quality of each relation's parallelograms before and after discriminants of other pairs, at the first site."""
    hook, relations = result.series["hooks"][0], result.series["relations"]
    figure, axes = new_figure(1.0 + 0.2 * len(relations))
    styles = (("before", BLUE, "o", "as they are"), ("after", ORANGE, "s", "after discriminants of other pairs"),
              ("shuffled", GREY, "x", "control: of shuffled relations"))  # fmt: skip
    for key, colour, marker, label in styles:
        names = [f"{hook}/{relation}/quality/{key}" for relation in relations]
        values = [result.numbers[name] for name in names]
        axes.plot(values, range(len(relations)), marker, color=colour, markersize=4, label=label)
        (mean,), bars = interval_bars(result, [f"{hook}/atoms/quality/{key}"])
        axes.errorbar([mean], [len(relations)], xerr=bars, fmt=marker, color=colour, markersize=5, linewidth=1)
    axes.axvline(1, color="black", linewidth=0.6, linestyle="--")
    axes.set_yticks(range(len(relations) + 1), [*relations, "mean"])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("difference of two pairs of a relation, of any two: 1")
    axes.set_title(hook)
    legend_beside(axes)
    return figure


FIGURES = {"lobes": lobes, "agreement": agreement, "spectrum": spectrum, "parallelograms": parallelograms}
