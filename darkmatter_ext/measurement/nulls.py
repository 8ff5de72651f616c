"""Null models of SAE error: other points as far from x as Sae(x) is, to tell a bad direction from a mere distance.

Gurnee, "SAE reconstruction errors are (empirically) pathological" (2024): random directions, the SAE's norm, the same angle.
Lee and Heimersheim, 2410.12555: directions that vary as activations do; beside these, a random direction is no fair null.

Shapes: n tokens, d model dimension, M real activations of the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import LinearStatistics
from darkmatter_ext.measurement.decompose import TokenBatch
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.encoders import Encode

MIXTURE_ACTIVATIONS = 1024  # more than d, so that mixtures span the same space as activations
Null = Callable[[Tensor, Tensor], Tensor]  # x [n, d], Sae(x) [n, d] -> the point of the null model [n, d]

NULLS = {
    "random": "a random direction, at the same distance",
    "same_angle": "a random direction at the same angle to x, with the SAE's norm, hence at the same distance",
    "error_covariance": "a direction drawn from N(0, covariance of the SAE's errors), at the same distance",
    "mixture": "a random mixture of real activations as direction, at the same distance",
    "shuffled": "the SAE's error at another token, at the same distance",
    "norm_only": "x with the norm of Sae(x): shrinkage alone (nearer to x than Sae(x) is)",
}


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)


def other_tokens(n: int, generator: torch.Generator) -> Tensor:
    """[n] int64 the index of another token for each of n tokens, each used once: a random cycle (itself only if n is 1)."""
    order = torch.randperm(n, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def at_distance_of(x: Tensor, x_hat: Tensor, direction: Tensor) -> Tensor:
    """x moved along `direction` by the distance of x_hat from x; all [n, d]."""
    return x + _unit(direction) * (x_hat - x).norm(dim=-1, keepdim=True)


def norm_only(x: Tensor, x_hat: Tensor) -> Tensor:
    """x rescaled to the norm of x_hat."""
    return _unit(x) * x_hat.norm(dim=-1, keepdim=True)


def same_angle(x: Tensor, x_hat: Tensor, direction: Tensor) -> Tensor:
    """A point with x_hat's norm and x_hat's angle to x, rotated from x towards `direction`; all [n, d]."""
    towards = _unit(x)
    along = (x_hat * towards).sum(-1, keepdim=True)
    across = (x_hat - along * towards).norm(dim=-1, keepdim=True)
    sideways = direction - (direction * towards).sum(-1, keepdim=True) * towards
    return along * towards + across * _unit(sideways)


@dataclass(frozen=True)
class NullModels:
    """What the null models of one SAE know about its errors and about real activations, from fit tokens."""

    error_root: Tensor  # [d, d], root R of the errors' covariance R R^T
    activations: Tensor  # [M, d] real activations minus their mean

    @classmethod
    def from_covariance(cls, error_covariance: Tensor, activations: Tensor) -> NullModels:
        """Build from the errors' covariance [d, d] and M real activations [M, d].

        Raises ValueError for fewer than 2 activations.
        """
        if len(activations) < 2:
            raise InputError(f"activations: must be at least 2 for a mixture, got {len(activations)}")
        values, vectors = torch.linalg.eigh(error_covariance.double())
        root = (vectors * values.clamp(min=0).sqrt()).to(activations.dtype)
        return cls(root, activations - activations.mean(0))

    @classmethod
    @torch.no_grad()
    def of_errors(cls, batches: Iterable[TokenBatch], encode: Encode, *, seed: int) -> NullModels:
        """Build from an SAE's errors and a seeded sample of activations on fit tokens, read twice. Memory: one batch."""
        statistics: LinearStatistics | None = None
        kept, generator = [], torch.Generator().manual_seed(seed)
        n_fit = sum(int(batch.train.sum()) for batch in batches)
        share = min(1.0, MIXTURE_ACTIVATIONS / n_fit)
        for batch in batches:
            x = batch.x[batch.train]
            if statistics is None:
                statistics = LinearStatistics(x.shape[1], 0, x.device)
            error = x - encode(x).x_hat
            statistics.update(error, error[:, :0])
            chosen = torch.rand(len(x), generator=generator) < share
            kept.append(x[chosen.to(x.device)].float())
        assert statistics is not None  # there are fit tokens
        return cls.from_covariance(statistics.moment_xx / statistics.count, torch.cat(kept))

    def functions(self, *, seed: int) -> dict[str, Null]:
        """Each of NULLS as a function of (x, Sae(x)); every call makes new draws from one seeded generator."""
        generator = torch.Generator().manual_seed(seed)

        def normal(x: Tensor, width: int) -> Tensor:
            return torch.randn(len(x), width, generator=generator, dtype=x.dtype).to(x.device)

        def shuffled(x: Tensor, x_hat: Tensor) -> Tensor:
            return at_distance_of(x, x_hat, (x_hat - x)[other_tokens(len(x), generator).to(x.device)])

        return {
            "random": lambda x, x_hat: at_distance_of(x, x_hat, normal(x, x.shape[1])),
            "same_angle": lambda x, x_hat: same_angle(x, x_hat, normal(x, x.shape[1])),
            "error_covariance": lambda x, x_hat: at_distance_of(x, x_hat, normal(x, x.shape[1]) @ self.error_root.mT),
            "mixture": lambda x, x_hat: at_distance_of(x, x_hat, normal(x, len(self.activations)) @ self.activations),
            "shuffled": shuffled,
            "norm_only": norm_only,
        }
