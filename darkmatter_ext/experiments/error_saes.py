"""SAEs trained on the linear and the nonlinear error: FVU, dead latents, interpretability.

What is in the error? TopK SAEs trained on its linear and on its nonlinear part (figure 8).

Both get the same latents, L0, tokens, steps and seeds. Training tokens are those b* is fitted on, which the first SAE has
not seen; FVU, L0, dead latents and interpretability are of held-out tokens. Interpretability is detection accuracy per
decile of activation (`interpretability.py`); beside it stand the first SAE's own latents and, as a control, latents that
read random directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from darkmatter_ext.activations.store import ActivationCache, load_tokenizer
from darkmatter_ext.estimators.intervals import seed_interval
from darkmatter_ext.estimators.least_squares import LinearMap, LinearStatistics
from darkmatter_ext.measurement.decompose import Reconstruct, TokenBatch
from darkmatter_ext.measurement.detection import (
    DetectionSettings,
    Judge,
    WordListJudge,
    accuracy_by_decile,
    score_latents,
)
from darkmatter_ext.measurement.error import sae_error
from darkmatter_ext.measurement.judges import EndpointJudge, LocalJudge
from darkmatter_ext.measurement.reconstruct import as_reconstruct, random_dictionary, shuffled_decoder
from darkmatter_ext.measurement.selection import HELD_OUT, MeasuredBatches, TokenSelection
from darkmatter_ext.measurement.site import SiteConfig, listed_saes, prepared_site, site_notes, site_plan
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.report.result import Result, provenance
from darkmatter_ext.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    interval_bars,
    legend_beside,
    new_figure,
    row_bars,
)
from darkmatter_ext.report.table import Table, shown, with_interval
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.drop_in import accelerate
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.saes.training import TrainingConfig, save_sae, train_topk_sae

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from sae_lens import SAE

TARGETS = ("linear", "nonlinear")
JUDGED = {
    "linear": "SAE on the linear error",
    "nonlinear": "SAE on the nonlinear error",
    "activation": "the SAE whose error it is",
    "random": "control: random directions on the nonlinear error",
}
_BATCH = 4096  # tokens reconstructed at a time


@dataclass(frozen=True)
class ErrorSaesConfig(SiteConfig):
    """Train TopK SAEs on the linear and on the nonlinear error of an SAE, and compare them."""

    error_width: int = 1024
    """latents of the SAEs on the errors"""
    error_k: int = 32
    """their active latents a token"""
    error_steps: int = 300
    """their training steps of 2048 tokens"""
    training_seeds: int = 3
    """SAEs a target; intervals are over them"""
    latents: int = 48
    """latents of each SAE that are explained and judged; 0: none"""
    scorer: str = "offline"
    """who explains and judges: offline (token lists, no model), local (a Hugging Face model) or endpoint"""
    scorer_model: str = ""
    """name of the judging model; for local the default is model"""
    endpoint: str = ""
    """URL of an OpenAI-compatible server, as http://localhost:8000/v1; asked only with scorer endpoint"""
    api_key_variable: str = "OPENAI_API_KEY"
    """environment variable with the server's key, if it wants one"""
    parity: str = "paper"
    """paper, or released-code: b* fitted on all measured tokens, the held-out ones too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sae or self.widths) != 1:
            raise InputError(f"sae, widths: must name one SAE, got {len(self.sae or self.widths)}")
        for name, least in (("error_steps", 1), ("training_seeds", 1), ("latents", 0), ("error_k", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.error_width < self.error_k:
            raise InputError(f"error_width: must be at least error_k ({self.error_k}), got {self.error_width}")
        if self.parity not in ("paper", "released-code"):
            raise InputError(f"parity: must be paper or released-code, got {self.parity!r}")
        if self.scorer not in ("offline", "local", "endpoint"):
            raise InputError(f"scorer: must be offline, local or endpoint, got {self.scorer!r}")
        if self.scorer == "endpoint" and not self.endpoint:
            raise InputError("endpoint: must be the URL of an OpenAI-compatible server for scorer endpoint, got none")
        if self.scorer == "endpoint" and not self.scorer_model:
            raise InputError("scorer_model: must name the server's model for scorer endpoint, got none")
        if self.endpoint and self.scorer != "endpoint":
            raise InputError(f"endpoint: is asked only with scorer endpoint, got scorer {self.scorer}")


PRESETS = {"demo": ErrorSaesConfig(widths=(2048,))}


def plan(config: ErrorSaesConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    judge = {"offline": "token lists, no model", "local": config.scorer_model or config.model}
    asked = judge.get(config.scorer, f"{config.scorer_model} at {config.endpoint}")
    return [
        *site_plan(config),
        f"train     {config.training_seeds} TopK SAEs each on linear and nonlinear error: {config.error_width} latents, "
        f"k {config.error_k}, {config.error_steps} steps",
        f"judge     {config.latents} latents of each of {len(JUDGED)}; {config.scorer}: {asked}",
    ]


def _judge(config: ErrorSaesConfig) -> Judge:
    """The configured judge; a server is asked once here, before any long work."""
    if config.scorer == "endpoint":
        judge = EndpointJudge(config.endpoint, config.scorer_model, key_variable=config.api_key_variable)
        judge.check()
        return judge
    if config.scorer == "local":
        return LocalJudge(config.scorer_model or config.model, device=config.device)
    return WordListJudge()


class Errors(NamedTuple):
    """Activations and the parts of their error for the tokens of one role, in memory, each [n, d]."""

    activation: Tensor
    linear: Tensor
    nonlinear: Tensor


def fit_error_map(batches: MeasuredBatches, reconstruct: Reconstruct, *, on_all: bool) -> LinearMap:
    """b*: least squares from x to SaeError(x) on fit tokens, or on all measured ones as the released code does."""
    statistics: LinearStatistics | None = None
    for batch in batches:
        if statistics is None:
            d = batch.x.shape[1]
            statistics = LinearStatistics(d, d, batch.x.device)
        error = sae_error(batch.x, reconstruct(batch).x_hat)
        chosen = torch.ones_like(batch.train) if on_all else batch.train
        statistics.update(batch.x[chosen], error[chosen])
    if statistics is None:
        raise InputError("x: must hold at least one token, got none")
    return statistics.solve()


def split_errors(batches: MeasuredBatches, reconstruct: Reconstruct, error_map: LinearMap) -> tuple[Errors, Errors]:
    """The error parts of the fit and of the held-out tokens. Memory: 12 n d bytes."""
    sides: tuple[list[Errors], list[Errors]] = ([], [])
    for batch in batches:
        error = sae_error(batch.x, reconstruct(batch).x_hat)
        linear = error_map(batch.x).to(error.dtype)
        for side, chosen in zip(sides, (batch.train, ~batch.train), strict=True):
            side.append(Errors(batch.x[chosen], linear[chosen], (error - linear)[chosen]))
    fit, held_out = (Errors(*(torch.cat(part) for part in zip(*side, strict=True))) for side in sides)
    return fit, held_out


def trained_error_sae(
    target: Tensor, training: TrainingConfig, key: dict[str, Any], progress: Callable[[int], None], device: str
) -> tuple[SAE, Path]:
    """A TopK SAE on `target` [n, d], or the one an earlier run made from the same `key`."""
    name = fingerprint(**key, training=dataclasses.asdict(training))
    folder = cache_dir("saes") / f"error-{key['target']}-{training.d_sae}-{name}"
    if not folder.exists():
        sae, report = train_topk_sae(target, training, metadata=key["metadata"], progress=progress)
        save_sae(sae, folder, report, training)
    return load_sae(folder, device=device), folder


@torch.no_grad()
def fvu(reconstruct: Reconstruct, y: Tensor) -> float:
    """FVU on y [n, d]."""
    squared_error = 0.0
    for part in y.split(_BATCH):
        batch = TokenBatch(part, torch.zeros(len(part), dtype=torch.bool, device=part.device))
        squared_error += sae_error(part, reconstruct(batch).x_hat).double().square().sum().item()
    return squared_error / (y - y.mean(0)).double().square().sum().item()


@torch.no_grad()
def reconstruction_numbers(
    reconstruct: Reconstruct, encode: Callable[[Tensor], SparseActs], y: Tensor
) -> dict[str, float]:
    """FVU, L0 and share of dead latents (silent on every token) on y [n, d]."""
    active, fired = 0, []
    for part in y.split(_BATCH):
        acts = encode(part)
        active += int(acts.l0().sum())
        fired.append(torch.bincount(acts.col_indices[acts.values.reshape(-1) != 0], minlength=acts.d_sae))
    dead = (torch.stack(fired).sum(0) == 0).double().mean().item()
    return {"fvu": fvu(reconstruct, y), "l0": active / len(y), "dead": dead}


@dataclass(frozen=True)
class Snippets:
    """Where the snippets of held-out text stand: rows of the held-out tokens in cache order."""

    rows: Tensor  # [w, length] int64
    contexts: list[int]  # [w]
    tokens: list[list[str]]  # [w][length]

    @classmethod
    def cut(cls, cache: ActivationCache, roles: Tensor, length: int, decode: Callable[[int], str]) -> Snippets:
        """All runs of `length` held-out tokens, side by side, that start at a multiple of it.

        Raises ValueError when there is none.
        """
        held_out = roles == HELD_OUT
        row = held_out.flatten().long().cumsum(0).view_as(held_out) - 1
        usable = cache.context_length // length * length
        whole = held_out[:, :usable].unflatten(1, (-1, length)).all(-1)  # [C, L / length]
        context, place = whole.nonzero(as_tuple=True)
        if len(context) == 0:
            raise InputError(f"context_length: must hold {length} held-out tokens in a row to judge latents, got none")
        rows = row[:, :usable].unflatten(1, (-1, length))[context, place]
        ids = cache.column("tokens")[:, :usable].unflatten(1, (-1, length))[context, place]
        names = {token: decode(token) for token in ids.unique().tolist()}
        return cls(rows, context.tolist(), [[names[token] for token in own] for own in ids.tolist()])

    def firing(self, acts: SparseActs) -> Tensor:
        """On how many snippets each latent is active, [F]."""
        own = torch.full((acts.n_tokens,), -1)
        own[self.rows.flatten()] = torch.arange(len(self.rows)).repeat_interleave(self.rows.shape[1])
        window, active = own[acts.token_numbers().cpu()], acts.values.reshape(-1).cpu() != 0
        kept = active & (window >= 0)
        pairs = (window[kept] * acts.d_sae + acts.col_indices.cpu()[kept]).unique()
        return torch.bincount(pairs % acts.d_sae, minlength=acts.d_sae)


def interpret(
    acts: SparseActs,
    snippets: Snippets,
    judge: Judge,
    settings: DetectionSettings,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Accuracy per decile with intervals, mean accuracy, and the explanations, of a sample of latents."""

    def activations(latents: Sequence[int]) -> Tensor:
        return acts.dense_columns(torch.tensor(latents, device=acts.values.device)).cpu()[snippets.rows]

    scores = score_latents(
        snippets.tokens, snippets.contexts, activations, snippets.firing(acts), judge, settings, progress=progress
    )
    *deciles, mean = [dataclasses.asdict(interval) for interval in accuracy_by_decile(scores, seed=settings.seed)]
    return {
        "deciles": deciles,
        "mean": mean,
        "latents": [{"latent": score.latent, "explanation": score.explanation} for score in scores],
        "unanswered": sum(score.unanswered for score in scores),
    }


def _encoders(sae: SAE, trained: dict[str, SAE], held_out: Errors, config: ErrorSaesConfig) -> dict[str, SparseActs]:
    """The codes of everything in JUDGED on held-out tokens."""
    acts = {name: cast("Any", accelerate(own)).encode_sparse(getattr(held_out, name)) for name, own in trained.items()}
    acts["activation"] = cast("Any", accelerate(sae)).encode_sparse(held_out.activation.to(sae.dtype))
    y = held_out.nonlinear
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.randn(y.shape[1], config.error_width, generator=generator).to(y)
    bias = torch.zeros(config.error_width).to(y)
    acts["random"] = topk_encode(y, directions / directions.norm(dim=0), bias, config.error_k, b_dec=y.mean(0))
    return acts


def _train_and_measure(
    config: ErrorSaesConfig, folder: Path, selection: TokenSelection, fit: Errors, held_out: Errors, stages: Stages
) -> tuple[dict[str, float], dict[str, SAE], list[dict[str, Any]]]:
    """Numbers with intervals over seeds, the SAE of the first seed by target, and what is listed."""
    numbers, first, listed = {}, {}, []
    roles = fingerprint(roles=selection.roles.flatten().tolist())
    for target in TARGETS:
        y, found = getattr(held_out, target), []
        for number in range(config.training_seeds):
            training = TrainingConfig(
                d_sae=config.error_width, k=config.error_k, steps=config.error_steps, seed=config.seed + number
            )
            metadata = {"model_name": config.model, "hook_name": config.hook, "trained_on": f"{target} error"}
            key = {"sae": folder.name, "roles": roles, "target": target, "parity": config.parity, "metadata": metadata}
            with stages.stage(f"train on the {target} error", training.steps) as advance:
                sae, own = trained_error_sae(getattr(fit, target), training, key, advance, config.device)
            first.setdefault(target, sae)
            listed += [e | {"target": target} for e in listed_saes({f"{target}, seed {training.seed}": (sae, own)})]
            encode = cast("Any", accelerate(sae)).encode_sparse
            found.append(reconstruction_numbers(as_reconstruct(sae), encode, y))
        for quantity in found[0]:
            numbers |= seed_interval([entry[quantity] for entry in found]).numbers(f"{target}/{quantity}")
        with stages.stage("controls"):
            random = random_dictionary(
                getattr(fit, target).float().mean(0), config.error_width, config.error_k, seed=config.seed
            )
            numbers[f"{target}/fvu_random_dictionary"] = fvu(random, y)
            numbers[f"{target}/fvu_shuffled_decoder"] = fvu(shuffled_decoder(first[target], seed=config.seed), y)
    return numbers, first, listed


@torch.no_grad()
def run(config: ErrorSaesConfig, stages: Stages) -> Result:
    """Train, measure, judge.

    Raises ValueError for bad settings, an SAE of another site, text too short to judge; RuntimeError for a server that
    does not answer, a damaged cache.
    """
    judge = _judge(config)
    cache, selection, saes = prepared_site(config, stages)
    ((_, (sae, folder)),) = saes.items()
    batches, reconstruct = MeasuredBatches(cache, selection.roles, config.device), as_reconstruct(sae)
    with stages.stage("split the error"):
        error_map = fit_error_map(batches, reconstruct, on_all=config.parity == "released-code")
        fit, held_out = split_errors(batches, reconstruct, error_map)
    found, first, listed = _train_and_measure(config, folder, selection, fit, held_out, stages)
    numbers, judged = selection.numbers() | found, {}
    if config.latents:
        tokenizer, settings = load_tokenizer(config.model), DetectionSettings(latents=config.latents, seed=config.seed)
        snippets = Snippets.cut(
            cache, selection.roles, settings.snippet_length, lambda token: str(tokenizer.decode([token]))
        )
        for name, acts in _encoders(sae, first, held_out, config).items():
            with stages.stage(f"judge latents, {name}", config.latents) as advance:
                judged[name] = interpret(acts, snippets, judge, settings, advance)
            mean = judged[name]["mean"]
            ends = {"": "value", "/low": "low", "/high": "high"}
            numbers |= {f"{name}/detection_accuracy{end}": mean[key] for end, key in ends.items()}
    asked = {"offline": "token lists", "local": config.scorer_model or config.model}
    notes = [
        *site_notes(config, cache, selection, saes),
        f"FVU, L0 and dead latents (silent on all {len(held_out.linear)} held-out tokens): intervals 95 %, Student's t over "
        f"{config.training_seeds} training seeds. Detection: SAEs of the first seed, intervals 95 %, latents drawn again; "
        f"judge: {asked.get(config.scorer, f'{config.scorer_model} at {config.endpoint}')}.",
    ]
    if config.parity == "released-code":
        notes.append("Released code: b* is fitted on the held-out tokens too.")
    return Result(
        experiment="error-saes",
        config=dataclasses.asdict(config),
        numbers=numbers,
        series={"saes": listed, "judged": judged, "about": JUDGED},
        notes=notes,
        seconds=stages.seconds,
        provenance=provenance(config.device) | {"text_sha256": cache.meta["text_sha256"]},
    )


PAPER = "FVU 0.54 on the linear and 0.59 on the nonlinear error"


def table(result: Result) -> Table:
    """One row a kind of latents."""
    numbers = result.numbers
    rows = []
    for name, about in result.series["about"].items():
        accuracy = f"{name}/detection_accuracy"
        detection = with_interval(numbers, accuracy, "{:.3f}") if accuracy in numbers else ""
        rows.append([about, *_trained_cells(result, name), detection])
    return Table(
        title=f"error-saes: {result.config['model']}, {result.config['hook']}, held-out tokens",
        headings=(
            "latents of",
            "FVU",
            "L0",
            "dead",
            "FVU random dictionary",
            "FVU shuffled decoder",
            "detection accuracy",
        ),
        rows=rows,
    )


def _trained_cells(result: Result, name: str) -> list[str]:
    """FVU, L0, dead latents and the controls' FVU, for what was trained here."""
    numbers = result.numbers
    if f"{name}/fvu" not in numbers:
        return [""] * 5
    forms = {"fvu": "{:.3f}", "l0": "{:.1f}", "dead": "{:.1%}"}
    controls = ("fvu_random_dictionary", "fvu_shuffled_decoder")
    return [
        *(with_interval(numbers, f"{name}/{key}", form) for key, form in forms.items()),
        *(shown(numbers[f"{name}/{key}"], "{:.3f}") for key in controls),
    ]


def reading(result: Result) -> list[str]:
    """Which error is harder to explain, and whether its latents can be told better than random directions."""
    numbers = result.numbers
    linear, nonlinear = numbers["linear/fvu"], numbers["nonlinear/fvu"]
    lower, upper = sorted(("linear", "nonlinear"), key=lambda target: numbers[f"{target}/fvu"])
    apart = numbers[f"{lower}/fvu/high"] < numbers[f"{upper}/fvu/low"]
    lines = [
        f"An SAE of {result.config['error_width']} latents leaves {linear:.2f} of the variance of the linear error and "
        f"{nonlinear:.2f} of the nonlinear error (the paper, Gemma 2 2B: {PAPER}); "
        + ("the intervals over seeds are apart." if apart else "the intervals over seeds are not apart.")
    ]
    accuracies = {name: numbers.get(f"{name}/detection_accuracy", math.nan) for name in result.series["about"]}
    if not math.isnan(accuracies["random"]):
        lines.append(
            f"Detection accuracy (0.5: chance): {accuracies['linear']:.2f} for latents of the linear error, "
            f"{accuracies['nonlinear']:.2f} of the nonlinear error, {accuracies['activation']:.2f} of the SAE itself, "
            f"{accuracies['random']:.2f} of random directions."
        )
    return lines


_JUDGED = {"linear": (SKY, "o"), "nonlinear": (BLUE, "s"), "activation": (GREEN, "^"), "random": (GREY, "x")}


def fvu_bars(result: Result) -> Figure:
    """FVU of the SAEs trained on each part of the error, with intervals over seeds, and their controls."""
    figure, axes = new_figure(2.7)
    targets = ("linear", "nonlinear")
    values, errors = interval_bars(result, [f"{target}/fvu" for target in targets])
    axes.bar([0, 1], values, yerr=errors, width=0.5, color=[SKY, BLUE], error_kw={"linewidth": 0.8})
    for place, (value, above) in enumerate(zip(values, errors[1], strict=True)):
        axes.annotate(
            f"{value:.3f}", (place, value + above), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom"
        )
    for key, colour, label in (
        ("random_dictionary", GREY, "random dictionary, pursuit"),
        ("shuffled_decoder", ORANGE, "decoder rows permuted"),
    ):
        heights = [result.numbers[f"{target}/fvu_{key}"] for target in targets]
        for place, height in enumerate(heights):
            axes.plot(
                [place - 0.3, place + 0.3], [height] * 2, color=colour, linewidth=1.5, label=None if place else label
            )
    axes.set_xticks([0, 1], ["SAE on the\nlinear error", "SAE on the\nnonlinear error"])
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("Equal latents, L0, tokens and steps")
    legend_beside(axes)
    return figure


def detection(result: Result) -> Figure:
    """Detection accuracy per decile of activation, with intervals over latents."""
    figure, axes = new_figure(2.9)
    for number, (name, judged) in enumerate(result.series["judged"].items()):
        colour, marker = _JUDGED[name]
        rows = judged["deciles"]
        places = [place + 1 + (number - 1.5) * 0.1 for place in range(len(rows))]
        axes.errorbar(
            places, [row["value"] for row in rows], yerr=row_bars(rows), fmt=f"{marker}-", color=colour, markersize=4,
            linewidth=1, label=result.series["about"][name].replace(": ", ":\n"),
        )  # fmt: skip
    if not result.series["judged"]:
        axes.annotate("no latents were judged (latents 0)", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return figure
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle="--")
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("decile of activation, weakest to strongest")
    axes.set_ylabel("balanced detection accuracy")
    axes.set_title("Can one tell from the explanation where a latent is active?")
    legend_beside(axes)
    return figure


FIGURES = {"fvu": fvu_bars, "detection": detection}
