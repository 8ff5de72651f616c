"""The stored activations of two models at the tokens of one text, on which crosscoders are trained and measured.

Shapes: C contexts of L tokens, d width of both models, n tokens of a role.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.activations.store import ActivationCache
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import SAE_TRAINING, UNUSED
from darkmatter_ext.runtime.inputs import InputError


def usual_in_all(tokens: StoredTokens, others: Sequence[ActivationCache], ratio: float) -> StoredTokens:
    """The same tokens, without those whose norm in one of the other models is above `ratio` medians; 0: keep all.

    An attention sink in only one model would look like a direction that only this model has.
    """
    roles = tokens.roles.clone()
    for other in others if ratio > 0 else ():
        norms = other.column("norms")
        roles[norms > ratio * norms[tokens.roles != UNUSED].median()] = UNUSED
    return dataclasses.replace(tokens, roles=roles)


@dataclass(frozen=True)
class PairedTokens:
    """Two models' activations side by side, v = [x_A / s_A, x_B / s_B], s the root mean variance of a dimension.

    With a common scale, the model with the larger activations would take most latents. Means stay: an SAE's b_dec starts there.
    """

    first: StoredTokens
    second: StoredTokens
    permuted: int | None = None  # control: shuffle the second model's tokens with this seed

    @classmethod
    def of(cls, tokens: StoredTokens, other: ActivationCache, *, permuted: int | None = None) -> PairedTokens:
        """Pair the first model's `tokens` with the other model's activations on the same contexts.

        Raises InputError if the widths differ.
        """
        if other.d_in != tokens.cache.d_in:
            raise InputError(
                f"other: must have width {tokens.cache.d_in} at the hook point, as the model, got {other.d_in}"
            )
        return cls(tokens, dataclasses.replace(tokens, cache=other), permuted)

    @functools.cached_property
    def scales(self) -> tuple[float, float]:
        """s_A and s_B, from the training tokens."""
        return _scale(self.first), _scale(self.second)

    def with_role(self, role: int) -> Tensor:
        """v [n, 2 d] of all tokens with this role, in memory."""
        second = self.second.with_role(role)
        if self.permuted is not None:
            second = second[other_tokens(len(second), torch.Generator().manual_seed(self.permuted))]
        return self.scaled(self.first.with_role(role), second)

    def scaled(self, first: Tensor, second: Tensor) -> Tensor:
        """v [n, 2 d] from both models' activations [n, d]."""
        return torch.cat([first.float() / self.scales[0], second.float() / self.scales[1]], dim=1)


def _scale(tokens: StoredTokens) -> float:
    mean, total = tokens.mean(SAE_TRAINING), 0.0
    for shard, roles in tokens.shards():
        total += (shard.activations[roles == SAE_TRAINING].double() - mean).square().sum().item()
    return (total / (tokens.count(SAE_TRAINING) * tokens.cache.d_in)) ** 0.5
