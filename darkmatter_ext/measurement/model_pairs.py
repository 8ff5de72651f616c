"""Crosscoders of two models and SAEs of each: train them once, and see what reconstructions and errors say about the pair.

Shapes: n tokens, d width of both models, v [n, 2 d] both side by side (`PairedTokens`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.store import Contexts, activation_caches
from darkmatter_ext.estimators.intervals import UNKNOWN, Interval, ratio, seed_interval, share_by, sums_by
from darkmatter_ext.estimators.least_squares import LinearStatistics
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.paired_tokens import PairedTokens, usual_in_all
from darkmatter_ext.measurement.run import Inputs
from darkmatter_ext.measurement.settings import Settings, ToTrain
from darkmatter_ext.measurement.site_saes import ensure_trained, training_of
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import SAE_TRAINING
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.crosscoder import (
    LatentKinds,
    LatentSums,
    activation_of,
    found_again,
    half_cosine,
    halves,
    relative_norm,
)
from darkmatter_ext.saes.encoders import Encode, as_encoder
from darkmatter_ext.saes.loading import load_sae

if TYPE_CHECKING:
    from sae_lens import SAE

BATCH = 4096  # tokens reconstructed at a time
LEAST_TOKENS = 10  # fit tokens on which a latent must be active to be counted
ENDS = ("A", "B")


class PairModels(NamedTuple):
    """Which two models, and where."""

    first: str
    second: str
    hook: str


@dataclass(frozen=True, eq=False)
class OwnSae:
    """An SAE trained here on the activations of one or two models."""

    sae: SAE
    folder: Path

    @functools.cached_property
    def encode(self) -> Encode:
        return as_encoder(self.sae)

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def reconstruct(self, v: Tensor) -> Tensor:
        """Sae(v) [n, d_in], on the device of v."""
        return torch.cat([self.encode(part.to(self.W_dec.device)).x_hat.to(v.device) for part in v.split(BATCH)])

    def batches(self, v: Tensor) -> Iterator[tuple[SparseActs, Tensor]]:
        """Yield acts and errors of v [n, d_in], a batch of tokens at a time."""
        for part in v.split(BATCH):
            given = part.to(self.W_dec.device)
            found = self.encode(given)
            yield found.acts, given - found.x_hat


def trained_crosscoder(
    settings: Settings, own: ToTrain, tokens: PairedTokens, models: PairModels, stages: Stages
) -> OwnSae:
    """A crosscoder of a pair, trained or from an earlier run: an SAE on v whose whole decoder rows have unit norm."""
    metadata = {"model_name": models.first, "other_model_name": models.second, "hook_name": models.hook}
    metadata |= {"activation_scales": list(tokens.scales)}
    key = {"second": tokens.second.cache.folder.name, "permuted": tokens.permuted, "metadata": metadata}
    return _trained("crosscoder", settings, own, tokens.first, key, lambda: tokens.with_role(SAE_TRAINING), stages)


def trained_alone(settings: Settings, own: ToTrain, tokens: StoredTokens, models: PairModels, stages: Stages) -> OwnSae:
    """An SAE with as many latents on the other model's activations alone."""
    key = {"metadata": {"model_name": models.second, "hook_name": models.hook}}
    return _trained("alone", settings, own, tokens, key, lambda: tokens.with_role(SAE_TRAINING).float(), stages)


def _trained(
    kind: str,
    settings: Settings,
    own: ToTrain,
    tokens: StoredTokens,
    key: Mapping[str, Any],
    x: Callable[[], Tensor],
    stages: Stages,
) -> OwnSae:
    training = training_of(settings, own)
    roles = fingerprint(roles=tokens.roles.flatten().tolist())
    made = {"activations": tokens.cache.folder.name, "roles": roles, "training": dataclasses.asdict(training)}
    folder = cache_dir("saes") / f"{kind}-{own.width}-{fingerprint(**made, **key)}"
    with stages.stage(f"train {kind}", training.steps) as advance:
        ensure_trained(folder, lambda: x().to(settings.device), training, key["metadata"], advance)
    return OwnSae(load_sae(folder, device=settings.device), folder)


def paired(inputs: Inputs, models: Mapping[str, PairModels], stages: Stages) -> dict[str, PairedTokens]:
    """Both models' activations for every pair, at tokens with usual norms in all models; `permuted` is the control's name.

    `inputs` belong to the first model. Raises InputError for a model of another width.
    """
    hook, settings = inputs.one_site, inputs.settings
    tokens, dtype = inputs.stored[hook], getattr(torch, settings.data.dtype)
    caches = {inputs.model: tokens.cache}
    contexts = Contexts(tokens.cache.column("tokens"), tokens.cache.column("documents"), inputs.text)
    for other in {own.second: None for own in models.values()}:
        if other not in caches:
            with stages.stage("run the other models", contexts.tokens.numel()) as advance:
                found = activation_caches(
                    other, [hook], contexts, device=settings.device, dtype=dtype, progress=advance
                )
            caches[other] = found[hook]
    tokens = usual_in_all(tokens, list(caches.values())[1:], settings.measure.max_norm_ratio)
    seeds = {"permuted": settings.seed}
    return {name: PairedTokens.of(tokens, caches[own.second], permuted=seeds.get(name)) for name, own in models.items()}


# ---- what the reconstructions say


def _ratio(missed: Tensor, total: Tensor, documents: Tensor, seed: int) -> Interval:
    """Missed over total energy, each [n], with its interval by document."""
    found = share_by(documents, missed, total, seed=seed)
    return found


def _rest(share: Interval) -> Interval:
    """One minus a share."""
    return Interval(1 - share.value, 1 - share.high, 1 - share.low)


def _energy(x: Tensor) -> Tensor:
    return x.double().square().sum(1)


def fvu(x: Tensor, reconstructions: Sequence[Tensor], documents: Tensor, *, seed: int) -> Interval:
    """FVU of x [n, d], averaged over several SAEs, with its interval by document."""
    missed = torch.stack([_energy(x - x_hat) for x_hat in reconstructions]).mean(0)
    return _ratio(missed, _energy(x - x.mean(0)), documents, seed)


def energy_numbers(
    v: Tensor, reconstructions: Sequence[Tensor], scales: tuple[float, float], documents: Tensor, *, seed: int
) -> dict[str, float]:
    """FVU of each half, and the share of the difference x_B - x_A that the crosscoders explain; NaN if they do not differ.

    v and its reconstructions are [n, 2 d], one reconstruction per SAE; numbers are means over SAEs. documents [n].
    """
    both, found = halves(v), [halves(v_hat) for v_hat in reconstructions]
    numbers: dict[str, float] = {}
    for end, name in enumerate(ENDS):
        numbers |= fvu(both[end], [own[end] for own in found], documents, seed=seed).numbers(f"fvu/{name}")
    difference, *approximated = (own[1].double() * scales[1] - own[0].double() * scales[0] for own in (both, *found))
    if not bool(difference.any()):
        return numbers | UNKNOWN.numbers("change_explained")
    left = fvu(difference, approximated, documents, seed=seed)
    return numbers | _rest(left).numbers("change_explained")


class Errors(NamedTuple):
    """One model's activations and an SAE's error, at fit and at held-out tokens, each [n, d]."""

    x: Tensor
    error: Tensor
    held_out_x: Tensor
    held_out_error: Tensor

    def nonlinear(self) -> Errors:
        """The error minus b* x, with b* fitted on the fit tokens."""
        b_star = _fitted(self.x, self.error)
        return self._replace(
            error=self.error - b_star(self.x), held_out_error=self.held_out_error - b_star(self.held_out_x)
        )


def _fitted(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    statistics = LinearStatistics(x.shape[1], y.shape[1], x.device)
    for part, target in zip(x.split(BATCH), y.split(BATCH), strict=True):
        statistics.update(part, target)
    return statistics.solve()


def r2_of_errors(first: Errors, second: Errors, documents: Tensor, *, seed: int) -> Interval:
    """R2 (of energies) of predicting the second's errors from the first's, fitted on fit tokens; documents [n] held out."""
    predicted = _fitted(first.error, second.error)(first.held_out_error)
    target = second.held_out_error
    left = _ratio(_energy(target - predicted), _energy(target - target.mean(0)), documents, seed)
    return _rest(left)


def dark_numbers(first: Errors, second: Errors, documents: Tensor, *, seed: int) -> dict[str, float]:
    """How well the first model's error predicts the second's: `r2_error`, `r2_nonlinear`; `r2_shuffled`: at another token.

    Cost: five d-to-d regressions.
    """
    whole = r2_of_errors(first, second, documents, seed=seed)
    first, second = first.nonlinear(), second.nonlinear()
    nonlinear = r2_of_errors(first, second, documents, seed=seed)
    random = torch.Generator().manual_seed(seed)
    strangers = first._replace(
        error=first.error[other_tokens(len(first.error), random)],
        held_out_error=first.held_out_error[other_tokens(len(first.held_out_error), random)],
    )
    control = r2_of_errors(strangers, second, documents, seed=seed)
    return whole.numbers("r2_error") | nonlinear.numbers("r2_nonlinear") | control.numbers("r2_shuffled")


# ---- what their latents say


class Trained(NamedTuple):
    """A crosscoder, and what fit tokens say about its latents."""

    sae: OwnSae
    sums: LatentSums
    kinds: LatentKinds


@torch.no_grad()
def judged(sae: OwnSae, v: Tensor, *, unique: float) -> Trained:
    """Latent scaling, measured on fit tokens v [n, 2 d]."""
    sums = LatentSums(sae.W_dec)
    for acts, error in sae.batches(v):
        sums.update(acts, error)
    return Trained(sae, sums, LatentKinds.of(sums, unique=unique, least=LEAST_TOKENS))


def latent_numbers(trained: list[Trained]) -> dict[str, float]:
    """Counts of each kind of latent and the cosine of shared ones, with intervals over crosscoders."""
    columns: dict[str, list[float]] = {}
    for own in trained:
        kinds, rows = own.kinds, own.sums.W_dec
        found = {
            "latents/used": kinds.used, "latents/shared": kinds.shared,
            "latents/a_only_by_rho": kinds.first_by_norm, "latents/b_only_by_rho": kinds.second_by_norm,
            "latents/a_only_by_nu": kinds.first_by_scaling, "latents/b_only_by_nu": kinds.second_by_scaling,
        }  # fmt: skip
        numbers = {name: float(mask.sum()) for name, mask in found.items()}
        numbers["shared/cosine"] = half_cosine(rows)[kinds.shared].mean().item()
        numbers["rho/mean"] = relative_norm(rows)[kinds.used].mean().item()
        others = [other.sums.W_dec[other.kinds.second_by_scaling] for other in trained if other is not own]
        numbers["latents/b_only_found_again"] = found_again(rows[kinds.second_by_scaling], others)
        for name, value in numbers.items():
            columns.setdefault(name, []).append(value)
    return {
        key: value for name, values in columns.items() for key, value in seed_interval(values).numbers(name).items()
    }


def covered_numbers(own: Trained, v: Tensor, covered: Tensor, names: Tensor, *, seed: int) -> dict[str, float]:
    """How much of the activation of the variant's own latents falls on markers and phrases, and what share of tokens does.

    All arguments are of held-out tokens: v [n, 2 d], covered [n] bool, names [n] (their documents).
    """
    chosen = own.kinds.second_by_scaling
    sizes = torch.cat([activation_of(acts, chosen) for acts, _ in own.sae.batches(v)]).double().cpu()
    inside, ones = covered.double(), torch.ones(len(covered), dtype=torch.float64)
    found = {"behaviour/share_of_b_only": ratio(sums_by(names, sizes * inside, sizes))}
    found["behaviour/share_of_tokens"] = share_by(names, inside, ones, seed=seed)
    return {key: value for name, interval in found.items() for key, value in interval.numbers(name).items()}
