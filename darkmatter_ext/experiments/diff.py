"""A crosscoder between a model and its variant: what does only one have, and is their dark matter the same?

A crosscoder is an SAE on the activations of two models side by side (`saes/crosscoder.py`). One is trained for a variant
whose difference is known, others for controls that have none. Unique latents are counted by the relative norm of their
decoder rows and by latent scaling; those of the variant are removed from it, put into the model's own activations, and
compared with latents of the same frequency and size. Linear and nonlinear error of both models are compared as elsewhere.

Sources: 2503.03730 (crosscoders between a model and its distilled variant; the method is from Lindsey et al. 2024),
2504.02922 (why L1 crosscoders invent unique latents, and latent scaling). None of their numbers is repeated here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.activations.splicing import SplicedTokens
from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.measurement.latent_effects import (
    EFFECTS,
    STATES,
    Intervention,
    behaviour_numbers,
    effect_numbers,
    spliced,
)
from darkmatter_ext.measurement.model_pairs import (
    ENDS,
    LEAST_TOKENS,
    Errors,
    OwnSae,
    PairModels,
    Trained,
    covered_numbers,
    dark_numbers,
    energy_numbers,
    fvu,
    judged,
    latent_numbers,
    paired,
    trained_alone,
    trained_crosscoder,
)
from darkmatter_ext.measurement.paired_tokens import PairedTokens
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import Inputs, prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.stored_tokens import WholeContexts, check_whole_contexts
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, SAE_TRAINING
from darkmatter_ext.measurement.variants import (
    Behaviour,
    check_one_tokenizer,
    marked_text,
    requantised_variant,
    tuned_variant,
)
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
from darkmatter_ext.report.style import BLUE, GREY, ORANGE, SERIES, interval_bars, new_figure, new_panels, row_bars
from darkmatter_ext.report.table import Table, with_interval
from darkmatter_ext.runtime.inputs import require, require_at_least, require_one_of
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.crosscoder import halves, relative_norm
from darkmatter_ext.training.tuning import TuningConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHER, TUNED = "other", "tuned"
PAIRS = {
    OTHER: "the model against the other one",
    TUNED: "the model against itself, tuned to say a phrase after a marker",
    "requantised": "control: the model with coarser weights, which adds no concept",
    "same": "control: the model against itself",
    "permuted": "control: the variant at other tokens, with which nothing is shared",
}
CONTROLS = tuple(PAIRS)[2:]
BINS = 40  # bins of the histogram of relative norms


@dataclass(frozen=True)
class DiffSettings(Settings):
    """Train crosscoders between a model and a variant: what does only one of them have, and what does it do?"""

    other: str = ""
    """the other model, with the same tokenizer and width (folder or Hugging Face id); none: a variant tuned here"""
    controls: tuple[str, ...] = CONTROLS
    """pairs whose answer is known: requantised, same, permuted"""
    unique: float = 0.9
    """relative norm from which a latent belongs to one model alone"""
    bits: int = 3
    """bits per weight in the re-quantised control"""
    marker: str = "§"
    """text that triggers the tuned variant"""
    phrase: str = " as the old ferryman used to say"
    """text it says after the marker"""
    spacing: int = 90
    """words between two markers (each followed by the phrase) in the text"""
    tuning_steps: int = 50
    """training steps of the tuned variant's adapters"""
    rank: int = 16
    """rank of its adapters, in all blocks up to the hook point"""
    contexts: int = 8
    """held-out contexts to splice into"""
    causal_latents: int = 4
    """latents only the variant has that are removed, and added, one at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_contexts(self.contexts, self.measure.split)
        for name, least in (("spacing", 2), ("tuning_steps", 1), ("rank", 1), ("causal_latents", 1)):
            require_at_least(name, least, getattr(self, name))
        require(0.6 <= self.unique < 1, "unique", "must be from 0.6 to below 1", self.unique)
        require(1 <= self.bits <= 8, "bits", "must be from 1 to 8", self.bits)
        for name in self.controls:
            require_one_of("controls", CONTROLS, name)
        require(not self.saes.sae, "sae", "must be left out, crosscoders are trained here", "it")
        kind = parse_hook_point(self.saes.trained_hooks[0]).kind
        require(kind == "hook_resid_post", "hook", "must be a hook_resid_post, to splice into the model", kind)

    @property
    def pairs(self) -> list[str]:
        """The pair in question, then the controls."""
        return [OTHER if self.other else TUNED, *self.controls]


PRESETS = {"demo": extended(DEMO, DiffSettings, widths=(1024,), steps=160, sae_seeds=3, tokens=50_000, contexts=6)}


def plan(settings: DiffSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    saes = settings.saes
    made = [] if settings.other else [
        f"variant   adapters of rank {settings.rank}, {settings.tuning_steps} steps: {settings.marker}{settings.phrase}"
    ]  # fmt: skip
    return [
        *plan_lines(settings),
        *made,
        *(f"pair      {name}: {PAIRS[name]}" for name in settings.pairs),
        f"train     {saes.sae_seeds} crosscoders a pair (permuted: one) and SAEs on the variant alone: {saes.widths[0]} "
        f"latents, k {saes.k}, {saes.steps} steps",
        f"splice    into {settings.contexts} held-out contexts of the variant",
    ]


# ---- the two models and their text


def _other_models(
    settings: DiffSettings, inputs: Inputs, behaviour: Behaviour | None, stages: Stages
) -> dict[str, PairModels]:
    """Make or find the other model of every pair."""
    hook, model, main = inputs.one_site, inputs.model, settings.other
    tokens = inputs.stored[hook]
    if behaviour is not None:
        tuning = TuningConfig(rank=settings.rank, steps=settings.tuning_steps, seed=settings.seed)
        texts = tokens.cache.column("tokens")[(tokens.roles == SAE_TRAINING).any(1)]
        layer = parse_hook_point(hook).layer
        with stages.stage("tune the variant", tuning.steps) as advance:
            main = tuned_variant(model, behaviour, texts, layer, tuning, device=settings.device, progress=advance)
    others = dict.fromkeys(settings.pairs, main)
    if "same" in others:
        others["same"] = model
    if "requantised" in others:
        with stages.stage("re-quantise the model"):
            others["requantised"] = requantised_variant(model, settings.bits)
    return {name: PairModels(model, other, hook) for name, other in others.items()}


# ---- the run


class Measured(NamedTuple):
    """One pair: its crosscoders, paired activations at fit and held-out tokens, reconstructions by the first crosscoder."""

    tokens: PairedTokens
    trained: list[Trained]
    fit: Tensor
    held_out: Tensor
    numbers: dict[str, float]


def _measured(name: str, settings: DiffSettings, tokens: PairedTokens, models: PairModels, stages: Stages) -> Measured:
    """Train the crosscoders of a pair and measure them."""
    seed = settings.seed
    kinds = settings.saes.trained[: 1 if name == "permuted" else None]
    saes = [trained_crosscoder(settings, own, tokens, models, stages) for own in kinds]
    fit, held_out = tokens.with_role(FIT), tokens.with_role(HELD_OUT)
    where = tokens.first.documents_with(HELD_OUT)
    with stages.stage("measure crosscoders"):
        trained = [judged(sae, fit, unique=settings.unique) for sae in saes]
        found = [sae.reconstruct(held_out) for sae in saes]
        numbers = latent_numbers(trained) | energy_numbers(held_out, found, tokens.scales, where, seed=seed)
        error = saes[0].reconstruct(fit).neg_().add_(fit), held_out - found[0]
        parts = (halves(fit), halves(error[0]), halves(held_out), halves(error[1]))
        first, second = (Errors(*own) for own in zip(*parts, strict=True))
        dark = dark_numbers(first, second, where, seed=seed)
    return Measured(tokens, trained, fit, held_out, numbers | {f"dark/{key}": value for key, value in dark.items()})


def _alone(
    settings: DiffSettings, inputs: Inputs, own: Measured, models: PairModels, stages: Stages
) -> dict[str, float]:
    """FVU of SAEs with as many latents on each model alone; how much of their errors two models, and two seeds, share."""
    first, second = own.tokens.first, own.tokens.second
    saes = {
        "A": [OwnSae(sae.load(), Path(sae.folder)) for sae in inputs.saes],
        "B": [trained_alone(settings, kind, second, models, stages) for kind in settings.saes.trained],
    }
    where, numbers, errors = first.documents_with(HELD_OUT), {}, {}
    with stages.stage("measure SAEs alone"):
        for name, tokens in (("A", first), ("B", second)):
            x, held_out = (tokens.with_role(role).float() for role in (FIT, HELD_OUT))
            found = [sae.reconstruct(held_out) for sae in saes[name]]
            numbers |= fvu(held_out, found, where, seed=settings.seed).numbers(f"fvu_alone/{name}")
            errors[name] = [
                Errors(x, x - sae.reconstruct(x), held_out, held_out - x_hat)
                for sae, x_hat in zip(saes[name][:2], found, strict=False)
            ]
        # Compare with another seed's SAE on the other side, so that a common initialisation is not what they share.
        compared = {"alone": (errors["A"][0], errors["B"][-1])}
        if len(errors["A"]) > 1:
            compared["seeds"] = (errors["A"][0], errors["A"][1])
        for name, sides in compared.items():
            dark = dark_numbers(*sides, where, seed=settings.seed)
            numbers |= {f"dark_{name}/{key}": value for key, value in dark.items()}
    return numbers


def _effects(
    settings: DiffSettings, own: Measured, models: PairModels, behaviour: Behaviour | None, stages: Stages
) -> tuple[dict[str, float], SplicedTokens]:
    """What the variant's own latents in the first crosscoder do."""
    seed, first = settings.seed, own.trained[0]
    intervention = Intervention.of(first, own.tokens, own.fit, single=settings.causal_latents, seed=seed)
    contexts = WholeContexts.sample(own.tokens.second, settings.contexts, seed=seed)
    tokens = spliced(intervention, contexts, models, stages, device=settings.device)
    where = contexts.documents_of(tokens.context)
    numbers = effect_numbers(tokens, where, seed=seed) | {
        "causal/latents": float(len(intervention.chosen)), "causal/unique": float(intervention.found),
        "spliced_contexts": len(contexts), "spliced_documents": contexts.n_documents,
    }  # fmt: skip
    if behaviour is not None:
        texts, roles = own.tokens.first.cache.column("tokens"), own.tokens.first.roles
        triggers = behaviour.triggers(texts)[tokens.context, tokens.position]
        numbers |= behaviour_numbers(tokens, triggers, where, seed=seed)
        covered = behaviour.covered(texts)[roles == HELD_OUT]
        every = own.tokens.first.documents_with(HELD_OUT)
        numbers |= covered_numbers(first, own.held_out, covered, every, seed=seed)
    return numbers, tokens


@torch.no_grad()
def run(settings: DiffSettings, stages: Stages) -> Result:
    """Make the variants, train, measure, splice.

    Raises InputError for bad settings, models with different tokenizers or widths; StateError for damaged files.
    """
    kinds = {own._replace(seed=0) for own in settings.saes.trained}
    n_kinds = len(kinds) * len(settings.saes.trained_hooks)
    require(n_kinds == 1, "widths, ks, architectures, layers, frozen", "must name one kind of SAE", n_kinds)
    behaviour, used = None, settings
    if settings.other:
        check_one_tokenizer(resolve(settings).model, settings.other)
    else:
        tokenizer = load_tokenizer(resolve(settings).model)
        behaviour = Behaviour.of(tokenizer, settings.marker, settings.phrase)
        with stages.stage("put markers into the text"):
            used = marked_text(settings, f" {settings.marker}{settings.phrase}", every=settings.spacing)
    inputs = prepare(used, stages, splices=True)
    models = _other_models(settings, inputs, behaviour, stages)
    pairs = paired(inputs, models, stages)
    numbers: dict[str, float] = {}
    series: dict[str, Any] = {"pairs": {name: PAIRS[name] for name in pairs}, "rho": {}, "saes": []}
    arrays: dict[str, Any] = {}
    for name, tokens in pairs.items():
        own = _measured(name, settings, tokens, models[name], stages)
        found = own.numbers | {f"scale/{end}": scale for end, scale in zip(ENDS, tokens.scales, strict=True)}
        if name == settings.pairs[0]:
            found |= _alone(settings, inputs, own, models[name], stages)
            effects, spliced_tokens = _effects(settings, own, models[name], behaviour, stages)
            found |= effects
            arrays |= spliced_tokens.columns()
        numbers |= {f"{name}/{key}": value for key, value in found.items()}
        series["rho"][name] = _histogram(own.trained)
        arrays |= _latent_columns(name, own.trained[0])
    return _result(settings, inputs, stages, numbers, series, arrays)


def _histogram(trained: list[Trained]) -> list[float]:
    """Histogram of used latents by relative norm, in BINS bins from 0 to 1, averaged over crosscoders."""
    counts = [relative_norm(own.sums.W_dec)[own.kinds.used].float().cpu().histc(BINS, 0, 1) for own in trained]
    return torch.stack(counts).mean(0).tolist()


def _latent_columns(name: str, own: Trained) -> dict[str, Any]:
    """Relative norm, scaling ratio and tokens of every latent of a pair's first crosscoder, for the result's file."""
    columns = {"rho": relative_norm(own.sums.W_dec), "nu": own.sums.scaling_ratio(), "tokens": own.sums.count}
    return {f"{name}/{key}": column.float().cpu().numpy() for key, column in columns.items()}


def _result(
    settings: DiffSettings,
    inputs: Inputs,
    stages: Stages,
    numbers: dict[str, float],
    series: dict[str, Any],
    arrays: dict[str, Any],
) -> Result:
    notes = [
        "Each model's activations are divided by the root of their mean variance a dimension (scale/A, scale/B): without "
        "that the model with the larger ones would get the latents. Tokens of unusual norm in one model are left out of all.",
        f"Latents are counted that are active at {LEAST_TOKENS} fit tokens; kinds are decided on fit tokens, everything else "
        "is of held-out ones. Intervals: 95 %, by document; of counts and cosines over crosscoders (Student's t), none where "
        "one is trained; of shares and ratios by Fieller's theorem.",
        "R2 of errors: of energies, by a linear map fitted on fit tokens. dark_alone: errors of an SAE on each model alone, "
        "of two seeds; dark_seeds: of two SAEs on the model, which is as much as there is to share.",
        "Latents unique by nu: the larger half on that side, and nu below (1 - unique) / unique, whatever rho is.",
    ]
    result = stored_result("diff", inputs, stages, numbers, series=series, arrays=arrays, notes=notes)
    data = settings.data  # the text with markers in it follows from the settings
    return dataclasses.replace(result, config=result.config | {"text": data.text, "dataset": data.dataset})


# ---- for readers of the result


def table(result: Result) -> Table:
    """One row per pair: how well it is reconstructed, which model its latents belong to, and what the errors share."""
    rows = []
    for name in result.series["pairs"]:

        def cell(key: str, form: str = "{:.3f}", name: str = name) -> str:
            return with_interval(result.numbers, f"{name}/{key}", form)

        counts = [
            cell(f"latents/{key}", "{:.0f}") for key in ("used", "a_only_by_rho", "b_only_by_rho", "b_only_by_nu")
        ]
        again = cell("latents/b_only_found_again", "{:.0%}")
        rows.append([
            name, cell("fvu/A"), cell("fvu/B"), *counts, again, cell("shared/cosine"), cell("change_explained"),
            cell("dark/r2_error"), cell("dark/r2_nonlinear"),
        ])  # fmt: skip
    headings = (
        "pair", "FVU A", "FVU B", "latents", "A only, ρ", "B only, ρ", "B only, ν", "found again", "shared: cosine",
        "change explained", "R² errors", "R² nonlinear",
    )  # fmt: skip
    return Table(title=f"diff: {result.config['model']} (A), {result.config['hook']}", headings=headings, rows=rows)


def reading(result: Result) -> list[str]:
    """What is unique, whether the controls have as much, what it does, and whether dark matter is shared."""
    main, *controls = result.series["pairs"]

    def say(key: str, form: str = "{:.3f}", pair: str = main) -> str:
        return with_interval(result.numbers, f"{pair}/{key}", form)

    count = "{:.1f}"
    lines = [
        f"{main}: {say('latents/b_only_by_rho', count)} of {say('latents/used', '{:.0f}')} latents are of the variant alone by "
        f"relative norm, {say('latents/b_only_by_nu', count)} by latent scaling, of which another seed has "
        f"{say('latents/b_only_found_again', '{:.0%}')}.",
        *(
            f"{name} ({PAIRS[name]}): {say('latents/b_only_by_rho', count, name)} by relative norm, "
            f"{say('latents/b_only_by_nu', count, name)} by latent scaling; "
            f"{say('latents/shared', '{:.0f}', name)} shared."
            for name in controls
        ),
        f"The price of sharing: FVU {say('fvu/A')} and {say('fvu/B')} in the crosscoder, {say('fvu_alone/A')} and "
        f"{say('fvu_alone/B')} for SAEs of as many latents on each model alone.",
        _causal_line(result, main),
    ]
    if f"{main}/behaviour/b" in result.numbers:
        states = [f"{about} {say(f'behaviour/{name}', '{:.2f}')}" for name, about in STATES.items()]
        elsewhere = [say(f"elsewhere/{name}", "{:.3f}") for name in ("b", "ablated/b_only")]
        lines.append(
            f"Probability of the phrase after its marker: {'; '.join(states)}. Of the next token elsewhere (control): the "
            f"variant {elsewhere[0]}, without its own latents {elsewhere[1]}."
        )
        lines.append(
            f"Markers and phrases hold {say('behaviour/share_of_b_only', '{:.0%}')} of the activation of the variant's own "
            f"latents, and are {say('behaviour/share_of_tokens', '{:.0%}')} of the tokens."
        )
    seeds = f", two seeds on one model share {say('dark_seeds/r2_nonlinear')}" if _has_seeds(result, main) else ""
    lines.append(
        f"Dark matter: a linear map of the model's nonlinear error tells {say('dark_alone/r2_nonlinear')} of the variant's "
        f"(SAEs on each alone{seeds}); of the crosscoder's own errors {say('dark/r2_nonlinear')}."
    )
    return lines


def _has_seeds(result: Result, pair: str) -> bool:
    return f"{pair}/dark_seeds/r2_error" in result.numbers


def _causal_line(result: Result, main: str) -> str:
    numbers = result.numbers
    what = "the variant's own latents" if numbers[f"{main}/causal/unique"] else (
        "no latent is of the variant alone: those that come nearest"
    )  # fmt: skip
    ablated = with_interval(numbers, f"{main}/causal/ablated/b_only/kl", "{:.4f}")
    matched = with_interval(numbers, f"{main}/causal/ablated/random/kl", "{:.4f}")
    steered = with_interval(numbers, f"{main}/causal/steer/kl_ratio", "{:.2f}")
    return (
        f"Without {numbers[f'{main}/causal/latents']:.0f} latents ({what}) the variant's KL is {ablated} nats a token, without "
        f"as many shared ones of the same frequency and size {matched}; adding one at a time has {steered} times the KL of "
        "adding a matched one."
    )


def norms(result: Result) -> Figure:
    """Relative norms of decoder halves, for the pair in question and its controls: 0 the model alone, 1 the variant alone."""
    figure, axes = new_figure(2.9)
    for number, (name, counts) in enumerate(result.series["rho"].items()):
        edges = [place / len(counts) for place in range(len(counts) + 1)]
        axes.stairs([count + 0.5 for count in counts], edges, baseline=0.5, color=SERIES[number], label=name, linewidth=1.4,
                    fill=number == 0, alpha=0.45 if number == 0 else 1)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    for edge in (1 - result.config["unique"], result.config["unique"]):
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("relative norm ρ: the model alone ← shared → the variant alone")
    axes.set_ylabel("latents + 0.5")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def scaling(result: Result) -> Figure | None:
    """Scaling ratio against relative norm of every used latent: below the line it belongs to one model alone."""
    pairs = [name for name in result.series["pairs"] if f"{name}/rho" in result.arrays]
    if not pairs:
        return None
    figure, panels = new_panels(2.5, len(pairs), sharey=True)
    unique = result.config["unique"]
    for axes, name in zip(panels, pairs, strict=True):
        used = result.arrays[f"{name}/tokens"] >= LEAST_TOKENS
        rho, nu = (result.arrays[f"{name}/{key}"][used] for key in ("rho", "nu"))
        axes.scatter(rho, nu.clip(-0.5, 1.5), s=3, color=BLUE, alpha=0.4, linewidths=0, rasterized=True)
        own = (rho > 0.5) & (nu < (1 - unique) / unique)
        axes.scatter(rho[own], nu[own].clip(-0.5, 1.5), s=9, color=ORANGE, linewidths=0)
        axes.axhline((1 - unique) / unique, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(unique, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.55, 1.55)
        axes.set_title(name)
    panels[0].set_ylabel("scaling ratio ν")
    figure.supxlabel("relative norm ρ", fontsize=9)
    return figure


def effects(result: Result) -> Figure:
    """KL of single latents only the variant has and of matched shared ones, removed and added; and what the phrase needs."""
    main, numbers = next(iter(result.series["pairs"])), result.numbers
    said = f"{main}/behaviour/b" in numbers
    figure, panels = new_panels(2.6, 3 if said else 2, width_ratios=[1, 1, 1.1][: 3 if said else 2])
    for axes, effect, title in zip(panels, EFFECTS, ("taken out", "added everywhere"), strict=False):
        for number, (kind, label, colour) in enumerate(
            (("b_only", "variant's own", ORANGE), ("random", "matched", BLUE))
        ):
            names = [f"{main}/causal/{effect}/{kind}/{place}" for place in range(result.config["causal_latents"])]
            names = [name for name in names if f"{name}/kl" in numbers]
            rows = [{key: numbers[f"{name}/kl{end}"] for key, end in _ENDS.items()} for name in names]
            places = [place + 0.25 * number for place in range(len(rows))]
            axes.errorbar(places, [row["value"] for row in rows], yerr=row_bars(rows), fmt="o", markersize=3.5, linewidth=1,
                          color=colour, label=label)  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xticks([])
        axes.set_xlabel("latents, one by one")
        axes.set_title(title)
    panels[0].set_ylabel("KL, nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    if said:
        names = [f"{main}/behaviour/{state}" for state in STATES]
        lengths, errors = interval_bars(result, names)
        colours = [GREY, GREY, ORANGE, BLUE, ORANGE, BLUE]
        panels[2].barh(range(len(names)), lengths, xerr=errors, color=colours, error_kw={"linewidth": 0.8})
        panels[2].set_yticks(range(len(names)), list(_SHORT), fontsize=7)
        panels[2].invert_yaxis()
        panels[2].set_xlim(0, 1)
        panels[2].set_title("P(phrase | marker)")
    return figure


_ENDS = {"value": "", "low": "/low", "high": "/high"}
_SHORT = ("B", "A in B", "B − own", "B − matched", "A + own", "A + matched")
FIGURES = {"norms": norms, "scaling": scaling, "effects": effects}
