"""BatchTopK (2412.06410): the N k largest activations of a batch of N tokens, exactly and without an [N, F] array.

Everything above a bound that is certainly too low is encoded, and the batch's threshold found among it: the last batch's
threshold is nearly always such a bound, and whether it was shows in the count.

Shapes: N tokens (of this process), d model dimension, F latents, z stored entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.encode import (
    PreparedEncoder,
    prepare_encoder,
    threshold_encode,
    topk_encode,
    try_threshold_encode,
)
from darkmatter_ext.ops.ragged import kept
from darkmatter_ext.runtime.processes import ALONE, Processes

# The next guess would have encoded this many times the entries it needed. A guess that encodes too few costs a second
# encode, spare entries their exact sums: after a miss there are more of them, then slowly fewer.
LEAST_SPARE, MOST_SPARE = 1.15, 4.0


class EncoderRows:
    """Encoder weights packed for one batch: W_enc^T as rows [F, d], b_enc [F]; inputs have b_dec taken off."""

    def __init__(self, rows: Tensor, b_enc: Tensor, *, prepared: PreparedEncoder | None = None) -> None:
        """Rows [F, d] that are contiguous are used in place; `prepared` of the same weights, where it is at hand."""
        self.rows, self.b_enc = rows, b_enc
        self._prepared = prepare_encoder(rows.mT, b_enc, share_rows=True) if prepared is None else prepared

    @property
    def packed_rows(self) -> Tensor:
        """[F, d] contiguous."""
        return self._prepared.weight

    def topk(self, x: Tensor, k: int) -> SparseActs:
        return topk_encode(x, self.rows.mT, self.b_enc, k, prepared=self._prepared)

    def above(self, x: Tensor, threshold: Tensor) -> SparseActs:
        return threshold_encode(x, self.rows.mT, self.b_enc, threshold, prepared=self._prepared)

    def try_above(self, x: Tensor, threshold: Tensor) -> tuple[SparseActs, Tensor]:
        """Of the tokens that screening helps, and the numbers [u] of the others."""
        return try_threshold_encode(x, self.rows.mT, self.b_enc, threshold, prepared=self._prepared)


class BatchChoice(NamedTuple):
    """What `batch_topk` finds."""

    acts: SparseActs  # ragged, N k entries; all positive ones where there are fewer
    smallest: Tensor  # of them, []; 0 where there are fewer than N k
    guess: Tensor  # for the next batch, []
    missed: bool  # the guess given was too high


def batch_topk(
    x: Tensor,
    encoder: EncoderRows,
    k: float,
    guess: Tensor | None = None,
    spare: float = LEAST_SPARE,
    own: Processes = ALONE,
) -> BatchChoice:
    """The N k largest activations of a batch x [N, d], ties to the lower token and latent, exactly.

    Args:
        k: mean over the batch; N k is rounded down to a whole number.
        own: processes that each hold a part of the batch; `acts` are then of this part.
        guess: where the smallest of them may be, []; a bad one costs time and changes nothing.
        spare: the next guess would have encoded this many times N k entries here.

    Cost: `threshold_encode` for about spare N k entries; without a guess, or with one too high, also `topk_encode` for 2 k.
    """
    wanted = int(k * own.total(len(x), x.device))
    acts = None if guess is None else encoder.above(x, guess)
    values, first = own.joined(x.new_zeros(0) if acts is None else acts.values)
    missed = guess is not None and len(values) < wanted and bool(guess > 0)
    some = None
    if acts is None or guess is None or missed:
        # The N k-th largest of any entries is a lower bound of the N k-th largest of all.
        some, _ = own.joined(encoder.topk(x, min(2 * math.ceil(k), len(encoder.rows))).values.flatten())
        bound = _largest(some, wanted)
        guess = (bound - bound.abs() * torch.finfo(bound.dtype).eps).clamp(min=0)
        acts = encoder.above(x, guess)
        values, first = own.joined(acts.values)
    if len(values) < wanted:
        return BatchChoice(acts, x.new_zeros(()), x.new_zeros(()), missed)
    smallest = _largest(values, wanted)
    above, equal = values > smallest, values == smallest
    keep = above | (equal & (equal.cumsum(0) <= wanted - above.sum()))
    lower = _lower(values if some is None else some, int(spare * wanted), smallest, guess)
    return BatchChoice(kept(acts, keep[first : first + acts.values.numel()]), smallest, lower, missed)


def _lower(values: Tensor, number: int, smallest: Tensor, guess: Tensor) -> Tensor:
    """About the `number`-th largest of all entries, from the largest of them."""
    if len(values) < number:
        return (torch.minimum(values.min(), smallest) - (smallest - guess) / 2).clamp(min=0)
    return _largest(values, number).clamp(min=0)


def _largest(values: Tensor, number: int) -> Tensor:
    """The `number`-th largest of values [z], []."""
    return values.kthvalue(len(values) - number + 1).values


@dataclass
class Guess:
    """Where the next batch's smallest chosen value may be: costs, not results, depend on it."""

    value: Tensor | None = None
    spare: float = MOST_SPARE / 2

    def after(self, found: BatchChoice) -> None:
        """Learn from a batch."""
        self.value = found.guess
        self.spare = min(1.5 * self.spare, MOST_SPARE) if found.missed else max(0.97 * self.spare, LEAST_SPARE)
