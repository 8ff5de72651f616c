"""Split SAE error into its linear and nonlinear parts, streaming, for any number of SAEs in one pass.

Pass 1 fits b*, the least-squares map (with bias) from x to SaeError(x), on train tokens. Pass 2, with b* known, fits the
norm prediction test for six vectors. Every number is computed on held-out tokens from sufficient statistics; no
activations or errors are kept. (Engels et al., 2410.14670, sections 4 and 5.)

Shapes: n tokens in a batch, d model dimension, S SAEs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import LinearMap, SplitStatistics, train_mask
from darkmatter_ext.measurement.error import NORM_TARGETS, ErrorStatistics, norm_targets, sae_error, varies
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.flat_activations import for_flat_activations


class TokenBatch(NamedTuple):
    """Some tokens of the measurement: their activations and their side of the split."""

    x: Tensor  # [n, d] floating point
    train: Tensor  # [n] bool
    start: int = 0  # index of the first token in the measurement


class Reconstructed(Protocol):
    """An SAE's reconstruction of a batch, as in `saes.encoders.Encoded`."""

    @property
    def x_hat(self) -> Tensor: ...  # [n, d]

    @property
    def l0(self) -> Tensor: ...  # [n] number of active latents


Reconstruct = Callable[[TokenBatch], Reconstructed]


@dataclass(frozen=True)
class Decomposition:
    """The dark matter of one SAE. Numbers are on held-out tokens unless their name says otherwise."""

    fvu: float  # of Sae(x)
    fvu_nonlinear: float  # of Sae(x) + b*.x: what remains once the linear error is explained
    normalised_mse: float  # mean over tokens of mean_d error^2 / mean_d x^2
    r2_vec: float  # error vector test: R2 of x -> SaeError(x), mean over dimensions
    r2_vec_train: float  # same, on the tokens b* was fitted on (shows overfitting)
    r2_norm: dict[str, float]  # norm prediction test: R2 of x -> ||v||^2 for each of NORM_TARGETS
    mean_squared_norm: dict[str, float]  # mean of ||v||^2 for each of NORM_TARGETS
    l0: float  # mean active latents per token
    n_train: int
    n_test: int
    rank: int  # of x on the train tokens
    error_map: LinearMap  # b*

    @property
    def linear_share(self) -> float:
        """1 - FVU_nonlinear / FVU: the share of the error's energy that is linear. This is a ratio of sums, whereas
        r2_vec is a mean of ratios over dimensions; both are reported."""
        return 1 - self.fvu_nonlinear / self.fvu if self.fvu > 0 else float("nan")

    def numbers(self) -> dict[str, float]:
        """All scalars by name, as stored in a result file."""
        numbers = {
            "l0": self.l0,
            "fvu": self.fvu,
            "fvu_nonlinear": self.fvu_nonlinear,
            "linear_share": self.linear_share,
            "normalised_mse": self.normalised_mse,
            "r2_vec": self.r2_vec,
            "r2_vec_train": self.r2_vec_train,
        }
        numbers |= {f"r2_norm/{name}": value for name, value in self.r2_norm.items()}
        return numbers | {f"mean_squared_norm/{name}": value for name, value in self.mean_squared_norm.items()}


@dataclass
class _FirstPass:
    """Statistics of pass 1: one regression whose targets are the errors of all SAEs side by side, [n, S d]."""

    regression: SplitStatistics
    errors: list[ErrorStatistics]  # held-out tokens, one per SAE
    active: list[float]  # sum of l0 over held-out tokens


def _first_pass(batches: Iterable[TokenBatch], saes: Sequence[Reconstruct]) -> _FirstPass:
    state: _FirstPass | None = None
    for batch in batches:
        x, held_out = batch.x, ~batch.train
        if state is None:
            regression = SplitStatistics.empty(x.shape[1], len(saes) * x.shape[1], x.device)
            state = _FirstPass(regression, [ErrorStatistics() for _ in saes], [0.0] * len(saes))
        errors = []
        for number, reconstruct in enumerate(saes):
            found = reconstruct(batch)
            error = sae_error(x, found.x_hat)
            state.errors[number].update(x[held_out], error[held_out])
            state.active[number] += found.l0[held_out].double().sum().item()
            errors.append(error)
        state.regression.update(x, torch.cat(errors, dim=1), batch.train)
    if state is None:
        raise InputError("x: must hold at least one token, got none")
    return state


def _second_pass(
    batches: Iterable[TokenBatch], saes: Sequence[Reconstruct], maps: Sequence[LinearMap]
) -> SplitStatistics:
    """Statistics of x -> squared norms, [n, 6 S]."""
    statistics: SplitStatistics | None = None
    for batch in batches:
        x = batch.x
        if statistics is None:
            statistics = SplitStatistics.empty(x.shape[1], len(saes) * len(NORM_TARGETS), x.device)
        targets = [
            norm_targets(x, reconstruct(batch).x_hat, b_star(x)) for reconstruct, b_star in zip(saes, maps, strict=True)
        ]
        statistics.update(x, torch.cat(targets, dim=1), batch.train)
    if statistics is None:
        raise InputError("batches: must be readable twice (a list, or an object with __iter__), got a spent iterator")
    return statistics


@torch.no_grad()
def decompose_stream(batches: Iterable[TokenBatch], saes: Mapping[str, Reconstruct]) -> dict[str, Decomposition]:
    """Decompose the error of every SAE of a site in two passes over the activations.

    Args:
        batches: an iterable that can be read twice; see TokenBatch.
        saes: name -> function from a TokenBatch to x_hat [n, d] and l0 [n].

    Returns:
        name -> Decomposition.

    Raises:
        ValueError: no tokens, fewer than 2 tokens on a side, constant x, NaN or infinite activations or reconstructions.

    Memory: 16 d^2 (1 + S) bytes, whatever the number of tokens. Cost per token: two reconstructions per SAE and
    d^2 (2 + S) float64 multiply-adds.
    """
    functions = list(saes.values())
    if not functions:
        raise InputError("saes: must name at least one SAE, got none")
    first = _first_pass(batches, functions)
    test = first.regression.test
    for side, own in (("train", first.regression.train), ("held-out", test)):
        if not varies(own.moment_xx.diagonal().sum().item(), own.mean_x, own.count):
            raise InputError(
                f"x: must vary over the {side} tokens, got a constant: shares of its variance cannot be told"
            )
    all_errors = first.regression.fit()
    fits = [
        all_errors.targets(slice(i * test.n_predictors, (i + 1) * test.n_predictors)) for i in range(len(functions))
    ]
    second = _second_pass(batches, functions, [fit.map for fit in fits])
    all_norms, width = second.fit(), len(NORM_TARGETS)
    total_variance = test.moment_xx.diagonal().sum().item()
    results = {}
    for number, (name, fit) in enumerate(zip(saes, fits, strict=True)):
        part = slice(number * width, (number + 1) * width)
        errors = first.errors[number]
        results[name] = Decomposition(
            fvu=errors.fvu(total_variance),
            fvu_nonlinear=fit.test.sse.sum().item() / total_variance if total_variance > 0 else float("nan"),
            normalised_mse=errors.normalised_mse,
            r2_vec=fit.r2,
            r2_vec_train=fit.train.mean_r2,
            r2_norm=dict(zip(NORM_TARGETS, all_norms.targets(part).test.r2.tolist(), strict=True)),
            mean_squared_norm=dict(zip(NORM_TARGETS, second.test.mean_y[part].tolist(), strict=True)),
            l0=first.active[number] / test.count,
            n_train=first.regression.train.count,
            n_test=test.count,
            rank=fit.map.rank,
            error_map=fit.map,
        )
    return results


class _Stored(NamedTuple):
    x_hat: Tensor
    l0: Tensor


def _from_stored(x: Tensor, x_hat: Tensor) -> Reconstruct:
    """A function that reads Sae(x) from a tensor [n, d]; L0 is unknown."""
    sae_error(x, x_hat)  # the shape check

    def reconstruct(batch: TokenBatch) -> Reconstructed:
        part = x_hat[batch.start : batch.start + len(batch.x)]
        return _Stored(part, torch.full((len(part),), torch.nan, device=part.device))

    return reconstruct


def _from_sae(sae: Any) -> Reconstruct:
    """A function that runs a SAELens SAE's own code (or anything with `encode` and `decode`)."""
    if not all(callable(getattr(sae, name, None)) for name in ("encode", "decode")):
        raise TypeError(f"sae: must be a tensor Sae(x) or an SAE with encode and decode, got {type(sae).__name__}")
    own = for_flat_activations(sae)
    architecture = getattr(getattr(own, "cfg", None), "architecture", None)
    if callable(architecture) and "transcoder" in str(architecture()):
        raise InputError(f"sae: must reconstruct x, got a {architecture()} (`dm.measure` takes transcoders)")

    def reconstruct(batch: TokenBatch) -> Reconstructed:
        acts: Any = own.encode(batch.x)
        x_hat: Any = own.decode(acts)
        return _Stored(x_hat, (acts != 0).sum(-1))

    return reconstruct


def decompose(
    x: Tensor,
    sae: object,
    *,
    train: Tensor | None = None,
    train_fraction: float = 0.6,
    groups: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 4096,
) -> Decomposition:
    """Decompose SAE error into linear and nonlinear parts, for in-memory activations.

    Args:
        x: activations [n, d] of the site the SAE was trained on.
        sae: a SAELens SAE (or anything with `encode` and `decode`), which is not modified, or Sae(x) itself as a tensor
            [n, d]. An SAE on hook_z takes x with heads flattened.
        train: bool [n], tokens to fit b* on; default a seeded random split of `groups` (default: of tokens).
        train_fraction, groups, seed: settings of that split, see `least_squares.train_mask`.
        batch_size: tokens encoded at a time.

    Returns:
        Decomposition: fvu, fvu_nonlinear, r2_vec, r2_norm, ... and `error_map` (b*); l0 is NaN for a tensor.

    Raises:
        TypeError, ValueError: one line naming the argument, the rule and the value given.

    Source: Engels, Riggs, Tegmark, 2410.14670.
    """
    if not isinstance(x, Tensor) or x.ndim != 2:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x: must be a tensor of shape [n, d], got {given}")
    if train is None:
        train = train_mask(torch.arange(len(x)) if groups is None else groups, fraction=train_fraction, seed=seed)
    if train.dtype != torch.bool or train.shape != x.shape[:1]:
        raise InputError(f"train: must be bool of shape [{len(x)}], got {train.dtype} {list(train.shape)}")
    d_in = getattr(getattr(sae, "cfg", None), "d_in", x.shape[1])
    if d_in != x.shape[1]:
        raise InputError(f"x: must be of shape [n, {d_in}] as the SAE's d_in, got {list(x.shape)}")
    starts = range(0, len(x), batch_size)
    batches = [TokenBatch(x[i : i + batch_size], train[i : i + batch_size], i) for i in starts]
    reconstruct = _from_stored(x, sae) if isinstance(sae, Tensor) else _from_sae(sae)
    return decompose_stream(batches, {"sae": reconstruct})["sae"]
