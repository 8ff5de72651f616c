"""SAEs trained on the linear and the nonlinear error: FVU, dead latents, interpretability.

What is in the error? TopK SAEs trained on its linear and on its nonlinear part (figure 8).

Both get the same number of latents, L0, tokens, steps and seeds. They train on the tokens b* is fitted on, which the first
SAE has not seen; FVU, L0, dead latents and interpretability are measured on held-out tokens. Interpretability is detection
accuracy per decile of activation (`measurement/detection.py`), compared with that of the first SAE's own latents and, as a
control, of latents that read random directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.estimators.intervals import seed_interval
from darkmatter_ext.estimators.least_squares import LinearMap, LinearStatistics
from darkmatter_ext.measurement.detection import (
    DetectionSettings,
    Judge,
    Snippets,
    WordListJudge,
    accuracy_by_decile,
    score_latents,
)
from darkmatter_ext.measurement.error import sae_error
from darkmatter_ext.measurement.exploration import explored
from darkmatter_ext.measurement.judges import EndpointJudge, LocalJudge
from darkmatter_ext.measurement.plan import plan_lines
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.run import Inputs, measured, prepare
from darkmatter_ext.measurement.settings import Settings, extended
from darkmatter_ext.measurement.site_saes import ensure_trained
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.report.explanations import Explanation, with_explanations
from darkmatter_ext.report.measured import stored_result
from darkmatter_ext.report.result import Result
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
from darkmatter_ext.runtime.inputs import InputError, require, require_at_least
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.drop_in import accelerate
from darkmatter_ext.saes.encoders import Encode, as_encoder, random_dictionary, shuffled_sae
from darkmatter_ext.saes.loading import load_sae
from darkmatter_ext.training.config import TrainingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sae_lens import SAE

TARGETS = ("linear", "nonlinear")
JUDGED = {
    "linear": "SAE on the linear error",
    "nonlinear": "SAE on the nonlinear error",
    "activation": "the SAE whose error it is",
    "random": "control: random directions on the nonlinear error",
}
SCORERS = ("offline", "local", "endpoint")
_BATCH = 4096  # tokens reconstructed at a time


@dataclass(frozen=True)
class ErrorSaesSettings(Settings):
    """Train TopK SAEs on the linear and the nonlinear error of an SAE, and compare them."""

    error_width: int = 1024
    """latents of the SAEs on the errors"""
    error_k: int = 32
    """their active latents per token"""
    error_steps: int = 300
    """their training steps of 2048 tokens"""
    training_seeds: int = 3
    """SAEs per target; intervals are over them"""
    latents: int = 48
    """latents of each SAE to explain and judge; 0: none"""
    scorer: str = "offline"
    """who explains and judges: offline (token lists, no model), local (a Hugging Face model) or endpoint"""
    scorer_model: str = ""
    """name of the judging model; with scorer local it defaults to model"""
    endpoint: str = ""
    """URL of an OpenAI-compatible server, such as http://localhost:8000/v1; used only with scorer endpoint"""
    api_key_variable: str = "OPENAI_API_KEY"
    """environment variable with the server's key, if it needs one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("error_steps", 1), ("training_seeds", 1), ("latents", 0), ("error_k", 1)):
            require_at_least(name, least, getattr(self, name))
        if self.error_width < self.error_k:
            raise InputError(f"error_width: must be at least error_k ({self.error_k}), got {self.error_width}")
        require(self.scorer in SCORERS, "scorer", "must be offline, local or endpoint", repr(self.scorer))
        if self.scorer == "endpoint" and not self.endpoint:
            raise InputError("endpoint: must be the URL of an OpenAI-compatible server for scorer endpoint, got none")
        if self.scorer == "endpoint" and not self.scorer_model:
            raise InputError("scorer_model: must name the server's model for scorer endpoint, got none")
        if self.endpoint and self.scorer != "endpoint":
            raise InputError(f"endpoint: is asked only with scorer endpoint, got scorer {self.scorer}")


PRESETS = {"demo": extended(DEMO, ErrorSaesSettings, widths=(2048,))}


def plan(settings: ErrorSaesSettings) -> list[str]:
    """Describe a run, one line per step, without starting it."""
    return [
        *plan_lines(settings),
        f"train     {settings.training_seeds} TopK SAEs each on linear and nonlinear error: {settings.error_width} latents, "
        f"k {settings.error_k}, {settings.error_steps} steps",
        f"judge     {settings.latents} latents of each of {len(JUDGED)}; {settings.scorer}: {_asked(settings)}",
    ]


def _asked(settings: ErrorSaesSettings) -> str:
    """The judge, in words."""
    if settings.scorer == "endpoint":
        return f"{settings.scorer_model} at {settings.endpoint}"
    return (settings.scorer_model or "the model itself") if settings.scorer == "local" else "token lists, no model"


def _judge(settings: ErrorSaesSettings) -> Judge:
    """The configured judge; a server is tried once here, before any long work."""
    if settings.scorer == "endpoint":
        judge = EndpointJudge(settings.endpoint, settings.scorer_model, key_variable=settings.api_key_variable)
        judge.check()
        return judge
    if settings.scorer == "local":
        return LocalJudge(settings.scorer_model or resolve(settings).model, device=settings.device)
    return WordListJudge()


class Errors(NamedTuple):
    """Activations and the parts of their error at the tokens of one role, in memory, each [n, d]."""

    activation: Tensor
    linear: Tensor
    nonlinear: Tensor


def fit_error_map(batches: MeasuredBatches, encode: Encode, *, on_all: bool) -> LinearMap:
    """b*: least squares from x to SaeError(x) on fit tokens, or on all measured tokens as in the released code."""
    statistics: LinearStatistics | None = None
    for batch in batches:
        if statistics is None:
            d = batch.x.shape[1]
            statistics = LinearStatistics(d, d, batch.x.device)
        error = sae_error(batch.x, encode(batch.x).x_hat)
        chosen = torch.ones_like(batch.train) if on_all else batch.train
        statistics.update(batch.x[chosen], error[chosen])
    if statistics is None:
        raise InputError("x: must hold at least one token, got none")
    return statistics.solve()


def split_errors(batches: MeasuredBatches, encode: Encode, error_map: LinearMap) -> tuple[Errors, Errors]:
    """The parts of the error at fit and at held-out tokens. Memory: 12 n d bytes."""
    sides: tuple[list[Errors], list[Errors]] = ([], [])
    for batch in batches:
        error = sae_error(batch.x, encode(batch.x).x_hat)
        linear = error_map(batch.x).to(error.dtype)
        for side, chosen in zip(sides, (batch.train, ~batch.train), strict=True):
            side.append(Errors(batch.x[chosen], linear[chosen], (error - linear)[chosen]))
    fit, held_out = (Errors(*(torch.cat(part) for part in zip(*side, strict=True))) for side in sides)
    return fit, held_out


def trained_error_sae(
    target: Tensor, training: TrainingConfig, key: dict[str, Any], progress: Callable[[int], None], device: str
) -> tuple[SAE, Path]:
    """A TopK SAE trained on `target` [n, d], or the one an earlier run made from the same `key`."""
    name = fingerprint(**key, training=dataclasses.asdict(training))
    folder = cache_dir("saes") / f"error-{key['target']}-{training.d_sae}-{name}"
    ensure_trained(folder, lambda: target, training, key["metadata"], progress)
    return load_sae(folder, device=device), folder


@torch.no_grad()
def fvu(encode: Encode, y: Tensor) -> float:
    """FVU on y [n, d]."""
    squared_error = 0.0
    for part in y.split(_BATCH):
        squared_error += sae_error(part, encode(part).x_hat).double().square().sum().item()
    return squared_error / (y - y.mean(0)).double().square().sum().item()


@torch.no_grad()
def reconstruction_numbers(encode: Encode, y: Tensor) -> dict[str, float]:
    """FVU, L0 and share of dead latents (silent on every token) on y [n, d]."""
    active, fired = 0, []
    for part in y.split(_BATCH):
        acts = encode(part).acts
        active += int(acts.l0().sum())
        fired.append(torch.bincount(acts.col_indices[acts.values.reshape(-1) != 0], minlength=acts.d_sae))
    dead = (torch.stack(fired).sum(0) == 0).double().mean().item()
    return {"fvu": fvu(encode, y), "l0": active / len(y), "dead": dead}


def interpret(
    acts: SparseActs,
    snippets: Snippets,
    judge: Judge,
    settings: DetectionSettings,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Accuracy per decile with intervals, mean accuracy and explanations, for a sample of latents."""

    def activations(latents: Sequence[int]) -> Tensor:
        return acts.dense_columns(torch.tensor(latents, device=acts.values.device)).cpu()[snippets.rows]

    scores = score_latents(
        snippets.tokens, snippets.documents, activations, snippets.firing(acts), judge, settings, progress=progress
    )
    *deciles, mean = [dataclasses.asdict(interval) for interval in accuracy_by_decile(scores, seed=settings.seed)]
    return {
        "deciles": deciles,
        "mean": mean,
        "latents": [
            {
                "latent": score.latent,
                "explanation": score.explanation,
                "score": None if math.isnan(score.accuracy) else score.accuracy,
                "documents": score.documents,
            }
            for score in scores
        ],
        "unanswered": sum(score.unanswered for score in scores),
    }


def _encoders(
    sae: SAE, trained: dict[str, SAE], held_out: Errors, settings: ErrorSaesSettings
) -> dict[str, SparseActs]:
    """The codes of everything in JUDGED at held-out tokens."""
    acts = {name: cast("Any", accelerate(own)).encode_sparse(getattr(held_out, name)) for name, own in trained.items()}
    acts["activation"] = cast("Any", accelerate(sae)).encode_sparse(held_out.activation.to(sae.dtype))
    y = held_out.nonlinear
    generator = torch.Generator().manual_seed(settings.seed)
    directions = torch.randn(y.shape[1], settings.error_width, generator=generator).to(y)
    bias = torch.zeros(settings.error_width).to(y)
    acts["random"] = topk_encode(y, directions / directions.norm(dim=0), bias, settings.error_k, b_dec=y.mean(0))
    return acts


def _train_and_measure(
    inputs: Inputs, settings: ErrorSaesSettings, fit: Errors, held_out: Errors, stages: Stages
) -> tuple[dict[str, float], dict[str, SAE], list[dict[str, Any]]]:
    """Numbers with intervals over seeds, the first seed's SAE by target, and the entries to list."""
    numbers, first, listed = {}, {}, []
    (sae,) = inputs.saes
    roles = fingerprint(roles=inputs.stored[sae.hook].roles.flatten().tolist())
    for target in TARGETS:
        y, found = getattr(held_out, target), []
        for number in range(settings.training_seeds):
            seed = settings.seed + number
            training = TrainingConfig(
                d_sae=settings.error_width, k=settings.error_k, steps=settings.error_steps, seed=seed
            )
            metadata = {"model_name": inputs.model, "hook_name": sae.hook, "trained_on": f"{target} error"}
            key = {"sae": Path(sae.folder).name, "roles": roles, "target": target, "metadata": metadata}
            key["parity"] = settings.measure.parity
            with stages.stage(f"train on the {target} error", training.steps) as advance:
                own, folder = trained_error_sae(getattr(fit, target), training, key, advance, settings.device)
            first.setdefault(target, own)
            name, kind = f"{target}, seed {seed}", own.cfg.architecture()
            entry = {"name": name, "d_sae": own.cfg.d_sae, "architecture": kind, "folder": str(folder)}
            listed.append(entry | {"target": target})
            encode, trained_on = as_encoder(own), getattr(fit, target)
            of_fit = {"fvu_training_text": fvu(encode, trained_on[: len(y)])}
            found.append(reconstruction_numbers(encode, y) | of_fit)
        for quantity in found[0]:
            numbers |= seed_interval([entry[quantity] for entry in found]).numbers(f"{target}/{quantity}")
        with stages.stage("controls"):
            mean = getattr(fit, target).float().mean(0)
            random = random_dictionary(mean, settings.error_width, settings.error_k, seed=settings.seed)
            shuffled = as_encoder(shuffled_sae(first[target], seed=settings.seed))
            numbers[f"{target}/fvu_random_dictionary"] = fvu(random, y)
            numbers[f"{target}/fvu_shuffled_decoder"] = fvu(shuffled, y)
    return numbers, first, listed


def _judged(
    inputs: Inputs, settings: ErrorSaesSettings, judge: Judge, acts: dict[str, SparseActs], stages: Stages
) -> tuple[dict[str, float], dict[str, Any]]:
    """Detection accuracy of everything in JUDGED, and what was judged."""
    tokenizer, detection = load_tokenizer(inputs.model), DetectionSettings(latents=settings.latents, seed=settings.seed)
    stored = inputs.stored[inputs.one_site]
    snippets = Snippets.cut(stored, detection.snippet_length, lambda token: str(tokenizer.decode([token])))
    numbers: dict[str, float] = {}
    judged: dict[str, Any] = {}
    for name, own in acts.items():
        with stages.stage(f"judge latents, {name}", settings.latents) as advance:
            judged[name] = interpret(own, snippets, judge, detection, advance)
        mean = judged[name]["mean"]
        ends = {"": "value", "/low": "low", "/high": "high"}
        numbers |= {f"{name}/detection_accuracy{end}": mean[key] for end, key in ends.items()}
    return numbers, judged


@torch.no_grad()
def run(settings: ErrorSaesSettings, stages: Stages) -> Result:
    """Train the SAEs, measure and judge them.

    Raises InputError for bad settings, more than one SAE, text too short to judge; StateError for a server that does not
    answer or a damaged cache.
    """
    saes = settings.saes
    n_saes = len(saes.sae) or len(saes.trained) * len(saes.trained_hooks)
    require(n_saes == 1, "sae, widths", "must name one SAE", n_saes)
    judge = _judge(settings)
    inputs = prepare(settings, stages, splices=True)
    (sae,) = inputs.saes
    batches = MeasuredBatches(inputs.stored[sae.hook], settings.device)
    with stages.stage("split the error"):
        error_map = fit_error_map(batches, sae.own, on_all=settings.measure.released)
        fit, held_out = split_errors(batches, sae.own, error_map)
    numbers, first, listed = _train_and_measure(inputs, settings, fit, held_out, stages)
    judged: dict[str, Any] = {}
    if settings.latents:
        acts = _encoders(sae.load(), first, held_out, settings)
        found, judged = _judged(inputs, settings, judge, acts, stages)
        numbers |= found
    notes = [
        f"FVU, L0 and dead latents (silent on all {len(held_out.linear)} held-out tokens): intervals 95 %, Student's t over "
        f"{settings.training_seeds} training seeds. FVU on training text is of as many tokens that the SAEs were trained on. "
        "Detection: SAEs of the first seed, balanced accuracy (mean of active and silent snippets told), explained and judged "
        f"on different documents; intervals 95 %, latents drawn again; judge: {_asked(settings)}.",
    ]
    if settings.measure.released:
        notes.append("Released code: b* is fitted on the held-out tokens too.")
    series = {"saes": listed, "judged": judged, "about": JUDGED}
    exploration = explored(inputs, measured(inputs, stages), stages) if judged and settings.page_megabytes else None
    result = stored_result("error-saes", inputs, stages, numbers, series=series, notes=notes, exploration=exploration)
    if exploration is None:
        return result
    own = {
        entry["latent"]: Explanation(entry["explanation"], entry["score"]) for entry in judged["activation"]["latents"]
    }
    by = f"this run ({_asked(settings)}); the score is the balanced accuracy of detection, 0.5 by chance"
    return with_explanations(result, sae.name, own, by)


PAPER = "FVU 0.54 on the linear and 0.59 on the nonlinear error"


def table(result: Result) -> Table:
    """One row per kind of latents."""
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
            "FVU training text",
            "L0",
            "dead",
            "FVU random dictionary",
            "FVU shuffled decoder",
            "detection accuracy",
        ),
        rows=rows,
    )


def _trained_cells(result: Result, name: str) -> list[str]:
    """FVU, L0, dead latents and the controls' FVU, for SAEs trained here."""
    numbers = result.numbers
    if f"{name}/fvu" not in numbers:
        return [""] * 6
    forms = {"fvu": "{:.3f}", "fvu_training_text": "{:.3f}", "l0": "{:.1f}", "dead": "{:.1%}"}
    controls = ("fvu_random_dictionary", "fvu_shuffled_decoder")
    return [
        *(with_interval(numbers, f"{name}/{key}", form) for key, form in forms.items()),
        *(shown(numbers[f"{name}/{key}"], "{:.3f}") for key in controls),
    ]


def reading(result: Result) -> list[str]:
    """Which error is harder to explain, and whether its latents are more interpretable than random directions."""
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
