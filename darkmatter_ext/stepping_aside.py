"""Encoders that hand tokens back where screening would not pay, and the memory of an SAE on which it does not.

Dense tokens, sinks and ties leave so many candidates that a dense product is the faster way: such rows come back as
`undecided`, [u] int64 numbers of flattened tokens, with nothing stored in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext import ops, unchecked
from darkmatter_ext.sparse import SparseActs

DENSE_SHARE = 0.06  # active share of the latents above which a dense encode is the faster one
FIRST_WAIT, LONGEST_WAIT = 8, 256  # calls


class Tried(NamedTuple):
    """Active latents, and the tokens for which they were not found."""

    acts: SparseActs
    undecided: Tensor  # [u] int64


def try_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, prepared: ops.PreparedEncoder) -> Tried:
    """`ops.topk_encode` of packed weights for the tokens where it pays."""
    return Tried(unchecked.topk_encode(x, W_enc, b_enc, k, prepared), _none(x))


def try_threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, prepared: ops.PreparedEncoder
) -> Tried:
    """`ops.threshold_encode` of packed weights for the tokens where it pays."""
    acts = unchecked.threshold_encode(x, W_enc, b_enc, threshold, prepared)
    if acts.values.numel() <= DENSE_SHARE * acts.d_sae:
        return Tried(acts, _none(x))
    counts = acts.crow_indices.diff()
    undecided = (counts > DENSE_SHARE * acts.d_sae).nonzero()[:, 0]
    return Tried(without_tokens(acts, undecided) if undecided.numel() else acts, undecided)


def _none(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)


def without_tokens(acts: SparseActs, tokens: Tensor) -> SparseActs:
    """Ragged acts with nothing stored for some tokens [u]."""
    counts = acts.crow_indices.diff()
    kept = torch.ones_like(counts, dtype=torch.bool).index_fill_(0, tokens, False)
    stays = torch.repeat_interleave(kept, counts)
    crow = torch.cat([acts.crow_indices[:1], (counts * kept).cumsum(0)])
    return SparseActs.ragged(crow, acts.col_indices[stays], acts.values[stays], acts.d_sae, acts.batch_shape)


class BackOff:
    """Calls to leave to SAELens after one in which most tokens were handed back: 8, then 16, at most 256."""

    def __init__(self) -> None:
        self.left = 0
        self._wait = 0
        self._dense = False  # the tokens were many because they were dense, not because they were hard to tell

    def after_trying(self, tokens: int, undecided: int) -> None:
        """Remember how a call went."""
        if 2 * undecided > tokens:
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), LONGEST_WAIT)
            self.left = self._wait
        elif self._wait:
            self._wait = 0

    def was_dense(self, acts: Tensor) -> None:
        """Remember whether tokens were handed back because their acts [u, F] are dense, or because they were hard to tell."""
        self._dense = median_share(acts) > DENSE_SHARE

    def after_dense(self, acts: Tensor) -> None:
        """One call less to wait; none where the tokens of dense acts [..., F] were dense and have become sparse."""
        self.left = max(0, self.left - 1)
        if self._dense and median_share(acts) <= DENSE_SHARE:
            self.left = 0


def median_share(acts: Tensor) -> float:
    """Active share of the latents of the median token, of a few: tokens far from the others decide nothing."""
    rows = acts.detach().reshape(-1, acts.shape[-1])
    if rows.numel() == 0:
        return 0.0
    rows = rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()]
    return (rows != 0).sum(-1).median().item() / rows.shape[-1]
