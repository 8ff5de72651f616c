"""The cost of passes through a language model, token by token, and shares of that cost, with intervals by document.

Shapes: n measured tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import TokenLosses
from darkmatter_ext.estimators.intervals import ratio, share_by, sums_by


class LossSums:
    """CE and KL of every pass. Several names together mean their average: the same training from several seeds."""

    def __init__(self, losses: TokenLosses, documents: Tensor, *, seed: int) -> None:
        self.losses, self.documents, self.seed = losses, documents, seed

    def ce(self, *names: str) -> Tensor:
        """Increase in CE over the unchanged model, [n]."""
        return torch.stack([self.losses.spliced[name] for name in names]).mean(0) - self.losses.cross_entropy

    def kl(self, *names: str) -> Tensor:
        """[n]"""
        return torch.stack([self.losses.kl[name] for name in names]).mean(0)

    def mean(self, key: str, column: Tensor) -> dict[str, float]:
        """Mean over tokens with its interval by document."""
        return share_by(self.documents, column, torch.ones_like(column), seed=self.seed).numbers(key)

    def closed(self, key: str, before: Tensor, after: Tensor) -> dict[str, float]:
        """100 (before - after) / before, from sums over documents (Fieller); NaN if `before` may be 0."""
        return ratio(sums_by(self.documents, 100 * (before - after), before)).numbers(key)
