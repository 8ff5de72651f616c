"""How much of what an SAE costs a language model does a low-rank adapter of the model win back?

An SAE replaces x, and the blocks after it get low-rank adapters, trained so that the model predicts what it predicted
from x (2501.19406). How much of the increase in CE and KL does that close, by rank and by tokens seen? What does the
adapter do to the model without the SAE? And what has been repaired: the linear or the nonlinear part of the error, this
SAE's errors or any perturbation of their size?

gap closed = (L_sae - L_adapted) / (L_sae - L_model), from sums over documents; NaN if the increase may be 0. A part is
*repaired* to the extent that putting it back (Sae(x) + linear error, Sae(x) + nonlinear error) gains less KL than before.
A *null* is another point at Sae(x)'s distance from x (see `nulls`), never seen in training.

Learning rates are chosen by KL on other fit documents, nothing is chosen on held-out ones; b* comes from fit tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from darkmatter_ext.activations.splicing import (
    Change,
    PlacesToSplice,
    Splice,
    SplicedModel,
    SplicedTokens,
    splice_contexts,
)
from darkmatter_ext.estimators.intervals import ratio, seed_interval, sums_by
from darkmatter_ext.measurement.adapters import AdapterTraining, Method, ToAdapt, fit_contexts
from darkmatter_ext.measurement.decompose import Decomposition
from darkmatter_ext.measurement.loss_sums import LossSums
from darkmatter_ext.measurement.nulls import NULLS, NullModels
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import Inputs, prepare
from darkmatter_ext.measurement.sae_splices import decomposed, sae_splices
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.measurement.stored_tokens import (
    MeasuredBatches,
    StoredTokens,
    WholeContexts,
    check_whole_contexts,
)
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREEN, GREY, ORANGE, SKY, interval_bars, legend_beside, new_panels
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.inputs import require, require_at_least
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import fingerprint, stamp
from darkmatter_ext.saes.encoders import as_encoder, random_directions, shuffled_sae
from darkmatter_ext.training.adaptation import Recipe
from darkmatter_ext.training.low_rank import Adapter, check_rank, linear_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECKPOINTS = (0.125, 0.25, 0.5)  # shares of the contexts, for the curve over tokens seen
COMPARED_NULLS = ("random", "error_covariance", "mixture")
CONTROLS = {
    "no-sae": "the same training without an SAE: nothing to close",
    "next-token": "plain next-token fine-tuning on the same documents, without an SAE",
    "biases": "a bias in every adapted layer instead of low-rank matrices",
    "random-directions": "around an SAE of random directions, whose own gap is the measure",
    "shuffled-decoder": "around the SAE with its decoder rows permuted, whose own gap is the measure",
}


@dataclass(frozen=True)
class AdaptSettings(Settings):
    """Low-rank adapters in the blocks after an SAE: how much of its cost do they win back?"""

    ranks: tuple[int, ...] = (1, 16)
    """ranks of the adapters, one training each; controls have the largest"""
    adapt_tokens: int = 4096
    """tokens of fit documents that an adapter sees, each once"""
    learning_rates: tuple[float, ...] = (1e-3, 4e-3)
    """learning rates of AdamW; of several, the one with the lowest KL on other fit documents after a quarter of the contexts"""
    adapt_seeds: int = 3
    """train every adapter this many times, each with its own start and order of contexts (controls once)"""
    alpha: float = 32.0
    """adapters are scaled by alpha / rank"""
    loss_share: float = 0.25
    """share of a step's tokens that have a loss, drawn again each step; the unembedding is the more expensive half"""
    contexts: int = 10
    """held-out contexts the adapters are measured on, once"""
    choose_contexts: int = 4
    """contexts of other fit documents on which the learning rate is chosen"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_contexts(self.contexts, self.measure.split)
        for name in ("adapt_seeds", "choose_contexts"):
            require_at_least(name, 1, getattr(self, name))
        for name in ("ranks", "learning_rates"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, name, "must be numbers above 0", list(values))
            require(len(set(values)) == len(values), name, "must be different numbers", list(values))
        require(0 < self.loss_share <= 1, "loss_share", "must be above 0 and at most 1", self.loss_share)
        require(self.alpha > 0, "alpha", "must be above 0", self.alpha)

    @property
    def main(self) -> int:
        """The rank of the controls."""
        return max(self.ranks)

    @property
    def first(self) -> str:
        """The adapter that is examined more closely."""
        return f"rank-{self.main}/seed-0"

    @property
    def method(self) -> Method:
        """How adapters are trained: by these settings, or as in the released code."""
        if self.measure.released:
            return Method((5e-5,), alpha=self.alpha, dropout=0.1, recipe=Recipe(summed=True), seed=self.seed)
        return Method(self.learning_rates, alpha=self.alpha, recipe=Recipe(self.loss_share), seed=self.seed)


PRESETS = {"demo": extended(DEMO, AdaptSettings, hook="blocks.20.hook_resid_post", widths=(2048,))}


def plan(settings: AdaptSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    rates = settings.method.learning_rates
    return [
        *plan_lines(settings),
        f"adapt     ranks {', '.join(map(str, settings.ranks))}, {settings.adapt_seeds} seeds each, on "
        f"{settings.adapt_tokens} tokens; learning rate of {', '.join(f'{rate:g}' for rate in rates)}",
        *(f"control   {name}: {about}" for name, about in CONTROLS.items()),
        f"splice    into {settings.contexts} held-out contexts",
    ]


# ---- which adapters, and their training


def to_adapt(settings: AdaptSettings) -> list[ToAdapt]:
    """Every rank with every seed, and the controls."""
    main = settings.main
    own = [
        ToAdapt(f"rank-{rank}/seed-{seed}", rank, seed, "sae")
        for seed in range(settings.adapt_seeds)
        for rank in settings.ranks
    ]
    return [
        *own,
        ToAdapt("controls/no-sae", main, 0, ""),
        ToAdapt("controls/next-token", main, 0, "", loss_of_text=True),
        ToAdapt("controls/biases", 0, 0, "sae"),
        ToAdapt("controls/random-directions", main, 0, "random-directions"),
        ToAdapt("controls/shuffled-decoder", main, 0, "shuffled-decoder"),
    ]


# ---- what is measured


def _same(x: Tensor) -> Tensor:
    return x


def passes(
    settings: AdaptSettings, splices: Mapping[str, Splice], again: Mapping[str, Splice], adapters: Mapping[str, Adapter]
) -> tuple[dict[str, Splice], dict[str, Change]]:
    """Every pass over the held-out contexts: what replaces x, and which adapter is on.

    `again`: the nulls a second time, with the same draws as in `splices`.
    """
    found: dict[str, Splice] = dict(splices)
    changes: dict[str, Change] = {}

    def add(name: str, splice: Splice, adapter: Adapter) -> None:
        found[name], changes[name] = splice, adapter.on

    for own in to_adapt(settings):
        add(f"{own.name}/with", splices[own.inserted or "sae"], adapters[own.name])
        add(f"{own.name}/without", _same, adapters[own.name])
    first = settings.first
    for name in ("linear", "nonlinear"):
        add(f"{first}/{name}", splices[name], adapters[first])
    for null, splice in again.items():
        add(f"{first}/{null}", splice, adapters[first])
    for share in CHECKPOINTS:
        add(f"{first}@{share:g}/with", splices["sae"], adapters[f"{first}@{share:g}"])
    return found, changes


def gap_numbers(sums: LossSums, name: str, own: Sequence[str], around: str) -> dict[str, float]:
    """How much of the cost of the splice `around` the adapters `own` (one, or the same from several seeds) win back."""
    with_sae, without = [f"{one}/with" for one in own], [f"{one}/without" for one in own]
    numbers = {
        **sums.mean(f"{name}/ce_increase", sums.ce(*with_sae)),
        **sums.mean(f"{name}/kl", sums.kl(*with_sae)),
        **sums.mean(f"{name}/ce_without_sae", sums.ce(*without)),
        **sums.mean(f"{name}/kl_without_sae", sums.kl(*without)),
        **sums.closed(f"{name}/ce_gap_closed", sums.ce(around), sums.ce(*with_sae)),
        **sums.closed(f"{name}/kl_closed", sums.kl(around), sums.kl(*with_sae)),
    }
    if len(own) > 1:
        each = [sums.closed("kl", sums.kl(around), sums.kl(one))["kl"] for one in with_sae]
        numbers |= seed_interval(each).numbers(f"{name}/kl_closed_over_seeds")
        numbers |= {f"{one}/kl_closed": value for one, value in zip(own, each, strict=True)}
    return numbers


def repair_numbers(sums: LossSums, name: str, adapter: str) -> dict[str, float]:
    """Which parts of the error and which nulls `adapter` has repaired; and KL of Sae(x) in multiples of each null's."""
    numbers: dict[str, float] = {}
    for part in ("linear", "nonlinear"):
        before = sums.kl("sae") - sums.kl(part)  # what putting it back gains
        after = sums.kl(f"{adapter}/with") - sums.kl(f"{adapter}/{part}")
        numbers |= sums.mean(f"{part}/kl_won", before)
        numbers |= sums.mean(f"{name}/{part}/kl_won", after)
        numbers |= sums.closed(f"{name}/{part}/repaired", before, after)
    for null in COMPARED_NULLS:
        before, after = sums.kl(null), sums.kl(f"{adapter}/{null}")
        numbers |= sums.closed(f"{name}/{null}/kl_closed", before, after)
        for key, sae, other in ((null, "sae", before), (f"{name}/{null}", f"{adapter}/with", after)):
            numbers |= ratio(sums_by(sums.documents, sums.kl(sae), other)).numbers(f"{key}/kl_ratio")
    return numbers


def all_numbers(settings: AdaptSettings, sums: LossSums) -> dict[str, float]:
    """Every number of one SAE."""
    numbers: dict[str, float] = {}
    for splice in ("sae", "linear", "random-directions", "shuffled-decoder"):
        numbers |= sums.mean(f"{splice}/ce_increase", sums.ce(splice))
        numbers |= sums.mean(f"{splice}/kl", sums.kl(splice))
    numbers |= sums.closed("linear/ce_gap_closed", sums.ce("sae"), sums.ce("linear"))
    numbers |= sums.closed("linear/kl_closed", sums.kl("sae"), sums.kl("linear"))
    for rank in settings.ranks:
        own = [f"rank-{rank}/seed-{seed}" for seed in range(settings.adapt_seeds)]
        numbers |= gap_numbers(sums, f"rank-{rank}", own, "sae")
    for own in to_adapt(settings):
        if own.name.startswith("controls"):
            numbers |= gap_numbers(sums, own.name, [own.name], own.inserted or "sae")
    main = f"rank-{settings.main}"
    for share in CHECKPOINTS:
        at = f"{settings.first}@{share:g}/with"
        numbers |= sums.closed(f"{main}/at-{share:g}/ce_gap_closed", sums.ce("sae"), sums.ce(at))
        numbers |= sums.closed(f"{main}/at-{share:g}/kl_closed", sums.kl("sae"), sums.kl(at))
    return numbers | repair_numbers(sums, main, settings.first)


# ---- the run


def _splices(
    inputs: Inputs, sae: SiteSae, own: Decomposition, tokens: StoredTokens
) -> tuple[dict[str, Splice], dict[str, Splice]]:
    """What replaces x, by name; and the nulls a second time, with the same draws."""
    seed, batches = inputs.settings.seed, MeasuredBatches(tokens, inputs.settings.device)
    loaded = sae.load()
    found = sae_splices(sae.own, own.error_map, seed=seed)
    del found["shuffled"]  # belongs to another experiment
    random = random_directions(loaded, max(1, round(own.l0)), seed=seed)
    permuted = as_encoder(shuffled_sae(loaded, seed=seed))
    found |= {"random-directions": lambda x: random(x).x_hat, "shuffled-decoder": lambda x: permuted(x).x_hat}
    nulls = NullModels.of_errors(batches, sae.own, seed=seed)

    def drawn() -> dict[str, Splice]:
        functions = nulls.functions(seed=seed)
        return {name: lambda x, null=functions[name]: null(x, sae.own(x).x_hat) for name in COMPARED_NULLS}

    return found | drawn(), drawn()


def run(settings: AdaptSettings, stages: Stages) -> Result:
    """Train adapters around every SAE and measure them on held-out contexts.

    Raises InputError for bad settings, a rank that a layer cannot have, SAEs of several sites, stored activations that are
    not the model's, fewer contexts than asked for; StateError for a damaged cache.
    """
    found = resolve(settings)
    with stages.stage("load the language model"):
        model = SplicedModel.load(found.model, found.sites[0], device=settings.device)
    layers = linear_layers(model.network, model.layer)
    for rank in settings.ranks:
        check_rank(layers, rank, argument="ranks")
    inputs = prepare(settings, stages, splices=True)
    tokens = inputs.stored[inputs.one_site]
    train, choose = fit_contexts(tokens, settings.adapt_tokens, settings.choose_contexts, seed=settings.seed)
    held_out = WholeContexts.sample(tokens, settings.contexts, seed=settings.seed)
    contexts = train.in_memory()
    model.check_activations(contexts.tokens[:1], contexts.x[:1])
    numbers: dict[str, float] = {}
    arrays, folders = {}, {}
    with stages.stage("fit the linear error"):
        parts = decomposed(inputs, tokens)
    for sae in inputs.saes:
        splices, again = _splices(inputs, sae, parts[sae.name], tokens)
        identity = fingerprint(sae=sae.folder, stamp=stamp(Path(sae.folder)), activations=tokens.cache.folder.name)
        work = AdapterTraining(settings.method, model, layers, splices, identity)
        rate, tried = work.best_rate(ToAdapt("pilot", settings.main, 0, "sae"), contexts, choose, stages)
        adapters: dict[str, Adapter] = {}
        for seed in range(settings.adapt_seeds):
            wanted = [one for one in to_adapt(settings) if one.seed == seed]
            at = {} if seed else {settings.first: CHECKPOINTS}
            adapters |= work.train(wanted, rate, contexts, stages, about=f"train adapters, seed {seed}", checkpoints=at)
        every, changes = passes(settings, splices, again, adapters)
        with stages.stage("measure adapters", len(held_out)) as advance:
            spliced = splice_contexts(model, held_out, every, changes=changes, progress=advance)
        sums = LossSums(spliced.losses, held_out.documents_of(spliced.context), seed=settings.seed)
        own = all_numbers(settings, sums) | {"learning_rate": rate}
        own |= {f"learning_rate/{name}/kl": kl for name, kl in tried.items()}
        numbers |= {f"{sae.name}/{key}": value for key, value in own.items()}
        arrays |= {f"{sae.name}/{key}": column for key, column in spliced.columns().items()}
        folders[sae.name] = work.folders
        numbers |= _counts(held_out, spliced, contexts)  # the same for every SAE
    notes = [
        f"Adapters saw {numbers['adapted_tokens']:.0f} tokens of {numbers['adapt_documents']:.0f} fit documents (the paper's "
        f"main runs 15 million); measured once on {numbers['spliced_tokens']:.0f} tokens of {len(held_out)} held-out contexts "
        f"of {held_out.n_documents} documents. Intervals: 95 %, by document (shares by Fieller's theorem), for the adapters as "
        "trained; over seeds Student's t.",
        "As the released code: dropout 0.1, KL summed over a context's tokens, learning rate 5e-5."
        if settings.measure.released
        else f"Not as the released code: no dropout, KL as a mean over {settings.loss_share:.0%} of a context's tokens.",
    ]
    series = {"adapters": folders, "controls": CONTROLS, "nulls": {name: NULLS[name] for name in COMPARED_NULLS}}
    return stored_result("adapt", inputs, stages, numbers, series=series, arrays=arrays, notes=notes)


def _counts(held_out: WholeContexts, spliced: SplicedTokens, contexts: PlacesToSplice) -> dict[str, float]:
    return {
        "spliced_contexts": len(held_out),
        "spliced_documents": held_out.n_documents,
        "spliced_tokens": len(spliced.context),
        "ce_original": spliced.losses.cross_entropy.double().mean().item(),
        "adapted_tokens": contexts.tokens.numel(),
        "adapt_documents": len(held_out.documents_of(contexts.numbers).unique()),
    }


# ---- what is shown

PAPER = (30, 55)  # percent of the CE gap closed: 2501.19406
PAPER_TOKENS = 15.4e6
SHOWN = 150  # percent: wider intervals are cut off in figures


def table(result: Result) -> Table:
    """One row per adapter: KL and CE with the SAE in, what that closes, and KL and CE without the SAE."""
    rows = []
    several = len(result.series["saes"]) > 1
    for sae in result.series["saes"]:
        name, before = sae["name"], f"{sae['name']}: " if several else ""
        for splice, label in (("sae", "no adapter"), ("linear", "no adapter, Sae(x) + b* x")):
            rows.append([f"{before}{label}", *_row(result, f"{name}/{splice}", closed=splice == "linear")])
        for rank in result.config["ranks"]:
            rows.append([f"{before}rank {rank}", *_row(result, f"{name}/rank-{rank}", without=True)])
        for control in result.series["controls"]:
            rows.append([f"{before}control: {control}", *_row(result, f"{name}/controls/{control}", without=True)])
    return Table(
        title=f"adapt: {result.config['model']}, {result.config['hook']}, adapters of the blocks after it on "
        f"{result.numbers['adapted_tokens']:.0f} tokens; nats a held-out token",
        headings=("adapter", "CE, SAE in", "KL, SAE in", "CE gap closed", "KL closed", "CE, no SAE", "KL, no SAE"),
        rows=rows,
    )


def _row(result: Result, name: str, *, closed: bool = True, without: bool = False) -> list[str]:
    def cell(key: str, form: str, shown: bool) -> str:
        return with_interval(result.numbers, f"{name}/{key}", form) if shown else ""

    return [
        cell("ce_increase", "{:+.3f}", True),
        cell("kl", "{:.3f}", True),
        cell("ce_gap_closed", "{:.0f}%", closed or without),
        cell("kl_closed", "{:.0f}%", closed or without),
        cell("ce_without_sae", "{:+.3f}", without),
        cell("kl_without_sae", "{:.3f}", without),
    ]


def reading(result: Result) -> list[str]:
    """How much is closed compared with the controls, at what price, and what was repaired."""
    lines, main, seen = [], max(result.config["ranks"]), result.numbers["adapted_tokens"]

    for sae in result.series["saes"]:

        def of(key: str, form: str = "{:.0f}%", name: str = sae["name"]) -> str:
            return with_interval(result.numbers, f"{name}/{key}", form)

        best = f"rank-{main}"
        lines += [
            f"{sae['name']}: an adapter of rank {main} closes {of(f'{best}/ce_gap_closed')} of the CE gap and "
            f"{of(f'{best}/kl_closed')} of the KL after {seen:.0f} tokens; adding b* x closes {of('linear/kl_closed')} of the "
            f"KL without any training, biases alone {of('controls/biases/kl_closed')}.",
            f"{sae['name']}: without the SAE that adapter moves the model by {of(f'{best}/kl_without_sae', '{:.3f}')} nats "
            f"(KL), {of('controls/no-sae/kl_without_sae', '{:.3f}')} when trained without an SAE. Next-token fine-tuning on "
            f"the same text changes CE without SAE by {of('controls/next-token/ce_without_sae', '{:+.3f}')} and closes "
            f"{of('controls/next-token/ce_gap_closed')} of the gap: that much could be the text, not the SAE.",
            f"{sae['name']}: of what putting a part of the error back had won, adaptation has repaired "
            f"{of(f'{best}/linear/repaired')} for the linear and {of(f'{best}/nonlinear/repaired')} for the nonlinear part.",
            f"{sae['name']}: other points at Sae(x)'s distance, never trained on: KL closed "
            + ", ".join(
                f"{of(f'{best}/{null}/kl_closed')} ({null.replace('_', ' ')})" for null in result.series["nulls"]
            )
            + f", beside {of(f'{best}/kl_closed')} for Sae(x) itself.",
        ]
    return [
        *lines,
        f"The paper, larger models and {PAPER_TOKENS / 1e6:.1f} million tokens: {PAPER[0]} to {PAPER[1]} % of the CE gap.",
    ]


_QUANTITIES = {"ce_gap_closed": ("CE gap", BLUE), "kl_closed": ("KL", ORANGE)}


def closure(result: Result) -> Figure:
    """The share of the SAE's cost that adapters win back, by rank and by tokens seen."""
    figure, (over_rank, over_tokens) = new_panels(3.0, 2, sharey=True)
    name, ranks = _shown(result), sorted(result.config["ranks"])
    main, seen = f"{name}/rank-{ranks[-1]}", result.numbers["adapted_tokens"]
    shares = [*CHECKPOINTS, 1.0]
    for number, (quantity, (label, colour)) in enumerate(_QUANTITIES.items()):
        bar = {"color": colour, "markersize": 4, "linewidth": 1, "label": label}
        keys = [f"{name}/rank-{rank}/{quantity}" for rank in ranks]
        values, errors = interval_bars(result, keys)
        over_rank.errorbar([place + 0.1 * number for place in range(len(ranks))], values, yerr=errors, fmt="o-", **bar)
        keys = [f"{main}/at-{share:g}/{quantity}" for share in CHECKPOINTS] + [f"{main}/{quantity}"]
        values, errors = interval_bars(result, keys)
        at = [share * seen * 1.04**number for share in shares]
        over_tokens.errorbar(at, values, yerr=errors, fmt="o-", **bar)
    repair = result.numbers[f"{name}/linear/kl_closed"]
    over_rank.axhline(repair, color=GREY, linewidth=0.8, linestyle="--", label="KL, Sae(x) + b* x")
    over_rank.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    over_rank.set_xlabel("rank")
    over_rank.set_ylabel("closed, %")
    over_rank.set_title("All tokens")
    over_tokens.plot([PAPER_TOKENS] * 2, PAPER, color=SKY, linewidth=5, alpha=0.6, label="CE gap, the paper's models")
    over_tokens.set_xscale("log")
    over_tokens.set_xlabel("tokens seen")
    over_tokens.set_title(f"Rank {ranks[-1]}")
    for axes in (over_rank, over_tokens):
        axes.axhline(0, color="black", linewidth=0.6)
    over_rank.set_xlim(-0.5, len(ranks) - 0.5)
    over_rank.set_ylim(max(-SHOWN, over_rank.get_ylim()[0]), min(SHOWN, over_rank.get_ylim()[1]))
    handles = {label: handle for axes in (over_rank, over_tokens) for handle, label in
               zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _shown(result: Result) -> str:
    """The SAE that a figure shows: the widest."""
    return max(result.series["saes"], key=lambda sae: sae["d_sae"])["name"]


def price(result: Result) -> Figure:
    """KL with the SAE and without it, for every adapter: what is gained, and what it costs the model itself."""
    name = _shown(result)
    rows = {"no adapter": "sae", **{f"rank {rank}": f"rank-{rank}" for rank in result.config["ranks"]}}
    rows |= {"biases": "controls/biases", "next token": "controls/next-token", "no SAE": "controls/no-sae"}
    figure, (axes,) = new_panels(0.9 + 0.36 * len(rows), 1)
    _bars(axes, result, [f"{name}/{key}/kl" for key in rows.values()], -0.2, BLUE, "with the SAE in")
    keys = [f"{name}/{key}/kl_without_sae" for key in rows.values() if key != "sae"]
    _bars(axes, result, keys, 0.2, SKY, "without the SAE", first=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("KL from the model as it is, nats a token")
    legend_beside(axes)
    return figure


def _bars(
    axes: Axes, result: Result, keys: Sequence[str], shift: float, colour: str, label: str, first: int = 0
) -> None:
    lengths, errors = interval_bars(result, keys)
    places = [place + first + shift for place in range(len(keys))]
    axes.barh(places, lengths, 0.38, xerr=errors, color=colour, label=label, error_kw={"linewidth": 0.8})


def repaired(result: Result) -> Figure:
    """KL closed at Sae(x) and at nulls at its distance; how much of each part of the error no longer needs putting back."""
    name = f"{_shown(result)}/rank-{max(result.config['ranks'])}"
    labels = {"kl_closed": "Sae(x)", **{f"{null}/kl_closed": null.replace("_", " ") for null in result.series["nulls"]}}
    parts = {f"{part}/repaired": f"{part} error" for part in ("linear", "nonlinear")}
    figure, panels = new_panels(2.4, 2)
    titles = ("KL closed at ...", "Repaired part of the error")
    for axes, rows, title, colour in zip(panels, (labels, parts), titles, (ORANGE, GREEN), strict=True):
        _bars(axes, result, [f"{name}/{key}" for key in rows], 0, colour, "")
        axes.set_yticks(range(len(rows)), list(rows.values()))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(max(-SHOWN, axes.get_xlim()[0]), min(SHOWN, axes.get_xlim()[1]))
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel("%")
        axes.set_title(title)
    return figure


FIGURES = {"closure": closure, "price": price, "repaired": repaired}
