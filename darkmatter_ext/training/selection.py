"""Which latents fire at each token of a batch, exactly and without [N, F] arrays, and how gradients pass.

- TopK: the k largest of each token.
- BatchTopK: the N k largest of the batch (2412.06410). Encode everything above a bound that is certainly too low, and find
  the batch's threshold among the result. A guess from the last batch is nearly always such a bound; the number of entries
  shows whether it was.
- JumpReLU: latents above a threshold each, learned with straight-through estimators (2407.14435). Besides the active
  latents, these need only those within half a bandwidth of their threshold.

A batch may be divided among processes; decisions about the whole batch then use the whole batch.

Shapes: N tokens (of this process), d model dimension, F latents, z stored entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.batch_topk import EncoderRows, Guess, batch_topk
from darkmatter_ext.ops.ragged import latent_sums, token_sums
from darkmatter_ext.runtime.processes import Processes
from darkmatter_ext.training.config import TrainingConfig

# Decay of the running mean of batch thresholds, which BatchTopK uses outside training. Thresholds fall during training and
# vary little between batches: a mean over 100 steps (0.99) was above the last ones and gave L0 29 for a k of 32.
THRESHOLD_DECAY = 0.9


@dataclass(frozen=True)
class Fired:
    """The latents of a batch that take part in its step."""

    acts: SparseActs  # those that fire; for JumpReLU also those about to, with value 0
    penalty: Tensor  # sparsity loss, []
    # dL/d(acts' values) -> dL/d(pre-activations), in the same shape, and dL/d(threshold) [F] if there is one
    backward: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @classmethod
    def through_relu(cls, acts: SparseActs) -> Fired:
        values = acts.values
        return cls(acts, values.new_zeros(()), lambda grad: (grad.masked_fill(values <= 0, 0), None))


class Selection(Protocol):
    """How an architecture chooses latents."""

    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Set up from the first batch [N, d] before training."""
        ...

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        """The choice in a training step."""
        ...

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        """The choice that the saved SAE makes."""
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


class BatchTopK:
    """The N k largest of the batch. Outside training a single threshold: the mean of the smallest of recent batches."""

    def __init__(self, config: TrainingConfig, device: torch.device, own: Processes) -> None:
        self._k, self._own = config.k, own
        self._guess = Guess()
        decayed = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the thresholds, and of their weights
        self.state = {"thresholds": decayed}

    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Nothing to set."""

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        found = batch_topk(x, encoder, self._k, self._guess.value, self._guess.spare, self._own)
        self._guess.after(found)
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
    """Latents above a threshold each, learned by straight-through estimators with a rectangular window (2407.14435).

    With theta the threshold, w the bandwidth, h a pre-activation and v = h 1[h > theta] its value: where
    |h - theta| < w / 2, dv/dtheta is taken to be -theta / w and dL0/dtheta -1 / w. h gets only the gradient of v.
    """

    def __init__(self, config: TrainingConfig, threshold: Tensor, own: Processes) -> None:
        self._config, self._own = config, own
        self.threshold = threshold  # [F], trained as the weights are
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, x: Tensor, encoder: EncoderRows) -> None:
        """Start where k latents per token fire. Near 0, as in the paper, half of all would, which costs as much as all."""
        self.threshold.fill_(batch_topk(x, encoder, self._config.k, own=self._own).smallest.item())

    def fired(self, x: Tensor, encoder: EncoderRows) -> Fired:
        width = self._config.bandwidth
        threshold = self.threshold.detach().to(x.dtype)
        stored = encoder.above(x, threshold - width / 2)
        own = threshold[stored.stored_indices]
        active = stored.values > own
        inside = stored.values < own + width / 2
        l0 = token_sums(active.to(self.threshold.dtype), stored)
        penalty, slope = self._penalty(l0)

        def backward(grad: Tensor) -> tuple[Tensor, Tensor]:
            of_l0 = slope.repeat_interleave(stored.crow_indices.diff(), output_size=len(active))
            of_threshold = -(own * grad + of_l0) / width * inside
            return grad * active, latent_sums(of_threshold.to(self.threshold.dtype), stored)

        return Fired(replace(stored, values=stored.values * active), penalty, backward)

    def _penalty(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """This part's share of the mean penalty of l0 [N], and its derivative by each entry [N]."""
        k, weight = self._config.k, self._config.l0_coefficient / self._own.total(len(l0), l0.device)
        if self._config.l0_penalty == "count":
            return weight * l0.sum(), torch.full_like(l0, weight)
        excess = l0 / k - 1
        return weight * excess.square().sum(), 2 * weight / k * excess

    def outside_training(self, x: Tensor, encoder: EncoderRows) -> SparseActs:
        return encoder.above(x, self.threshold.detach().to(x.dtype))


def selection_of(config: TrainingConfig, weights: Mapping[str, Tensor], own: Processes) -> Selection:
    """The selection for the configured architecture; JumpReLU's threshold [F] is among the weights."""
    if config.architecture == "jumprelu":
        return JumpReLU(config, weights["threshold"], own)
    return TopK(config) if config.architecture == "topk" else BatchTopK(config, weights["b_dec"].device, own)
