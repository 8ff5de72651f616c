"""BatchTopK (2412.06410): the exact N k largest activations of a batch of N tokens, without an [N, F] array.

Encode everything above a bound that is certainly too low, and find the batch's threshold among the result. A guess from
the last batch is nearly always such a bound; the number of entries shows whether it was.

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

# The next guess would have encoded this many times the entries needed. A guess that encodes too few costs a second
# encode; spare entries cost their exact sums. So the factor rises after a miss, then slowly falls.
LEAST_SPARE, MOST_SPARE = 1.15, 4.0


class EncoderRows:
    """Encoder weights packed for one batch: W_enc^T as rows [F, d], b_enc [F]; inputs already have b_dec subtracted."""

    def __init__(self, rows: Tensor, b_enc: Tensor, *, prepared: PreparedEncoder | None = None) -> None:
        """Contiguous rows [F, d] are used in place. Pass `prepared` of the same weights if there is one already."""
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
        """Entries above the threshold for the tokens that screening helps, and the numbers [u] of the others."""
        return try_threshold_encode(x, self.rows.mT, self.b_enc, threshold, prepared=self._prepared)


class BatchChoice(NamedTuple):
    """Result of `batch_topk`."""

    acts: SparseActs  # ragged, N k entries; all positive ones if there are fewer
    smallest: Tensor  # [], the smallest of them; 0 if there are fewer than N k
    guess: Tensor  # [], for the next batch
    missed: bool  # the given guess was too high


def batch_topk(
    x: Tensor,
    encoder: EncoderRows,
    k: float,
    guess: Tensor | None = None,
    spare: float = LEAST_SPARE,
    own: Processes = ALONE,
) -> BatchChoice:
    """The exact N k largest activations of a batch x [N, d]; ties go to the lower token and latent.

    Args:
        k: mean over the batch; N k is rounded down to a whole number.
        own: processes that each hold a part of the batch; `acts` then covers this process's part.
        guess: [], about where the smallest of them lies; a bad guess costs time but does not change the result.
        spare: the next guess would have encoded this many times N k entries here.

    Cost: `threshold_encode` for about spare N k entries; without a guess, or with too high a one, also `topk_encode` for 2 k.
    """
    wanted = int(k * own.total(len(x), x.device))
    acts = None if guess is None else encoder.above(x, guess)
    values, first = own.joined(x.new_zeros(0) if acts is None else acts.values)
    missed = guess is not None and len(values) < wanted and bool(guess > 0)
    some = None
    if acts is None or guess is None or missed:
        # The N k-th largest of any subset of entries is a lower bound on the N k-th largest of all.
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
    """Estimate the `number`-th largest of all entries from the largest ones."""
    if len(values) < number:
        return (torch.minimum(values.min(), smallest) - (smallest - guess) / 2).clamp(min=0)
    return _largest(values, number).clamp(min=0)


def _largest(values: Tensor, number: int) -> Tensor:
    """The `number`-th largest of values [z]; shape []."""
    return values.kthvalue(len(values) - number + 1).values


@dataclass
class Guess:
    """About where the smallest value chosen from the next batch lies. Costs depend on it, results do not."""

    value: Tensor | None = None
    spare: float = MOST_SPARE / 2

    def after(self, found: BatchChoice) -> None:
        """Update the guess from a batch."""
        self.value = found.guess
        self.spare = min(1.5 * self.spare, MOST_SPARE) if found.missed else max(0.97 * self.spare, LEAST_SPARE)
