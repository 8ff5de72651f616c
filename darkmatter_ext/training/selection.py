"""Which latents fire at each token of a batch, exactly and without [N, F] arrays, and how gradients pass.

- TopK: the k largest of each token.
- BatchTopK: the N k largest of the batch (2412.06410). Everything above a bound that is certainly too low is encoded,
  and the batch's threshold found among it: the last batch's threshold is nearly always such a bound, and whether it was
  shows in the count.
- JumpReLU: above a threshold a latent, which learns through straight-through estimators (2407.14435). Those need the
  latents within half a bandwidth of their threshold besides the active ones, no others.

A batch may be divided among processes: what concerns all of it is then decided from all of it.

Shapes: N tokens (of this process), d model dimension, F latents, z stored entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_outer
from darkmatter_ext.ops.encode import prepare_encoder, threshold_encode, topk_encode
from darkmatter_ext.runtime.processes import ALONE, Processes
from darkmatter_ext.training.config import TrainingConfig

# Of the mean of the batches' thresholds, which BatchTopK uses outside of training. They fall as training goes on and vary
# little between batches: a mean over 100 steps (0.99) was above the last ones, L0 29 for a k of 32.
THRESHOLD_DECAY = 0.9
# BatchTopK's next guess would have encoded this many times the entries it needed. A guess that encodes too few costs a
# second encode, spare entries their exact sums: after a miss there are more of them, then slowly fewer.
LEAST_SPARE, MOST_SPARE = 1.15, 4.0


class EncoderRows:
    """Encoder weights packed for one step: W_enc^T as rows [F, d], b_enc [F]; inputs have b_dec taken off."""

    def __init__(self, rows: Tensor, b_enc: Tensor) -> None:
        self.rows, self.b_enc = rows, b_enc
        self._prepared = prepare_encoder(rows.mT, b_enc, share_rows=True)

    def topk(self, x: Tensor, k: int) -> SparseActs:
        return topk_encode(x, self.rows.mT, self.b_enc, k, prepared=self._prepared)

    def above(self, x: Tensor, threshold: Tensor) -> SparseActs:
        return threshold_encode(x, self.rows.mT, self.b_enc, threshold, prepared=self._prepared)


def latent_sums(values: Tensor, acts: SparseActs) -> Tensor:
    """Sum of the entries of each latent, [F]; values in the shape of acts' own. The same in every run."""
    if values.is_cpu:
        sums = values.new_zeros(acts.d_sae, dtype=torch.float64)
        return sums.index_add_(0, acts.col_indices, values.reshape(-1).double()).to(values.dtype)
    ones = values.new_ones(acts.n_tokens, 1)
    return decoder_outer(replace(acts, values=values), ones)[:, 0]


def _token_sums(values: Tensor, acts: SparseActs) -> Tensor:
    """Sum of the entries of each token of ragged acts, [N]."""
    return torch.segment_reduce(values, "sum", lengths=acts.crow_indices.diff())


def kept(acts: SparseActs, keep: Tensor) -> SparseActs:
    """Some entries [z] bool of ragged acts."""
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return replace(
        acts, values=acts.values[keep], stored_indices=acts.stored_indices[keep], crow=before[acts.crow_indices]
    )


@dataclass(frozen=True)
class Fired:
    """The latents of a batch that take part in its step."""

    acts: SparseActs  # those that fire; of JumpReLU also those about to, with value 0
    penalty: Tensor  # sparsity loss, []
    # dL/d(acts' values) -> dL/d(pre-activations), in the same shape, and dL/d(threshold) [F] where there is one
    backward: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @classmethod
    def through_relu(cls, acts: SparseActs) -> Fired:
        values = acts.values
        return cls(acts, values.new_zeros(()), lambda grad: (grad.masked_fill(values <= 0, 0), None))


class Selection(Protocol):
    """How an architecture chooses latents."""

    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """See the first batch [N, d] before training."""
        ...

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        """In a step of training."""
        ...

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        """As the saved SAE chooses."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps, updated in place."""
        ...


class TopK:
    """The k largest of each token."""

    def __init__(self, config: TrainingConfig) -> None:
        self._k = config.k
        self.state: dict[str, Tensor] = {}

    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Nothing to set."""

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        return Fired.through_relu(encoder.topk(x, self._k))

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        return encoder.topk(x, self._k)


class BatchChoice(NamedTuple):
    """What `batch_topk` finds."""

    acts: SparseActs  # ragged, N k entries; all positive ones where there are fewer
    smallest: Tensor  # of them, []; 0 where there are fewer than N k
    guess: Tensor  # for the next batch, []
    missed: bool  # the guess given was too high


def batch_topk(
    x: Tensor,
    encoder: EncoderRows,
    k: int,
    guess: Tensor | None = None,
    spare: float = LEAST_SPARE,
    own: Processes = ALONE,
) -> BatchChoice:
    """The N k largest activations of a batch x [N, d], ties to the lower token and latent, exactly.

    Args:
        own: processes that each hold a part of the batch; `acts` are then of this part.
        guess: where the smallest of them may be, []; a bad one costs time and changes nothing.
        spare: the next guess would have encoded this many times N k entries here.

    Cost: `threshold_encode` for about spare N k entries; without a guess, or with one too high, also `topk_encode` for 2 k.
    """
    wanted = own.total(len(x), x.device) * k
    acts = None if guess is None else encoder.above(x, guess)
    values, first = own.joined(x.new_zeros(0) if acts is None else acts.values)
    missed = guess is not None and len(values) < wanted and bool(guess > 0)
    some = None
    if acts is None or guess is None or missed:
        # The N k-th largest of any entries is a lower bound of the N k-th largest of all.
        some, _ = own.joined(encoder.topk(x, min(2 * k, len(encoder.rows))).values.flatten())
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


class BatchTopK:
    """The N k largest of the batch; outside of training one threshold, the mean of the last batches' smallest."""

    def __init__(self, config: TrainingConfig, device: torch.device, own: Processes) -> None:
        self._k, self._own = config.k, own
        self._guess: Tensor | None = None  # of the smallest value chosen: costs, not results, depend on it
        self._spare = MOST_SPARE / 2
        decayed = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the thresholds, and of their weights
        self.state = {"thresholds": decayed}

    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Nothing to set."""

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        found = batch_topk(x, encoder, self._k, self._guess, self._spare, self._own)
        self._guess = found.guess
        self._spare = min(1.5 * self._spare, MOST_SPARE) if found.missed else max(0.97 * self._spare, LEAST_SPARE)
        newest = torch.stack([found.smallest.double(), found.smallest.new_ones((), dtype=torch.float64)])
        self.state["thresholds"].mul_(THRESHOLD_DECAY).add_(newest, alpha=1 - THRESHOLD_DECAY)
        return Fired.through_relu(found.acts)

    @property
    def threshold(self) -> float:
        total, weight = self.state["thresholds"].tolist()
        return total / weight if weight else 0.0

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        return encoder.above(x, x.new_tensor(self.threshold))


class JumpReLU:
    """Above a threshold a latent, learned by straight-through estimators with a rectangular window (2407.14435).

    With theta the threshold, w the bandwidth, h a pre-activation and v = h 1[h > theta] its value:
    dv/dtheta is taken to be -theta / w and dL0/dtheta -1 / w, both where |h - theta| < w / 2; h gets no gradient but v's.
    """

    def __init__(self, config: TrainingConfig, threshold: Tensor, own: Processes) -> None:
        self._config, self._own = config, own
        self.threshold = threshold  # [F], trained as the weights are
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Where k latents a token fire: starting near 0, as in the paper, half of all would, at the cost of all."""
        self.threshold.fill_(batch_topk(x, encoder, self._config.k, own=self._own).smallest.item())

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        width = self._config.bandwidth
        threshold = self.threshold.detach().to(x.dtype)
        stored = encoder.above(x, threshold - width / 2)
        own = threshold[stored.stored_indices]
        active = stored.values > own
        inside = stored.values < own + width / 2
        l0 = _token_sums(active.to(self.threshold.dtype), stored)
        penalty, slope = self._penalty(l0)

        def backward(grad: Tensor) -> tuple[Tensor, Tensor]:
            of_l0 = slope.repeat_interleave(stored.crow_indices.diff(), output_size=len(active))
            of_threshold = -(own * grad + of_l0) / width * inside
            return grad * active, latent_sums(of_threshold.to(self.threshold.dtype), stored)

        return Fired(replace(stored, values=stored.values * active), penalty, backward)

    def _penalty(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """This part's share of the mean penalty of l0 [N], and its derivative by each, [N]."""
        k, weight = self._config.k, self._config.l0_coefficient / self._own.total(len(l0), l0.device)
        if self._config.l0_penalty == "count":
            return weight * l0.sum(), torch.full_like(l0, weight)
        excess = l0 / k - 1
        return weight * excess.square().sum(), 2 * weight / k * excess

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        return encoder.above(x, self.threshold.detach().to(x.dtype))


def selection_of(config: TrainingConfig, weights: Mapping[str, Tensor], own: Processes) -> Selection:
    """That of an architecture; JumpReLU's threshold [F] is among the weights."""
    if config.architecture == "jumprelu":
        return JumpReLU(config, weights["threshold"], own)
    return TopK(config) if config.architecture == "topk" else BatchTopK(config, weights["b_dec"].device, own)
