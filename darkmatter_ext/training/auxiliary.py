"""Losses that bring dead latents back, and their gradients.

In the auxiliary loss of a batch the dead latents alone explain the error (2406.04093, A.2); the pre-activation loss takes the
thresholds of JumpReLU's to their pre-activations.

k is half of the model dimension by default, so a few dead latents nearly all take part at every token: 288 of 300 for d 576.
Dense products then cost a tenth of an exact encoding and sums over the entries; with 16 k dead latents they cost as much.
Where two latents are equal up to float32's rounding, they may choose the other one.

Shapes: N tokens (of this process), d model dimension, m dead latents. Memory of the dense form: two arrays [N, m].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.batch_topk import EncoderRows
from darkmatter_ext.ops.decode import decoder_dot, decoder_outer, sparse_decode
from darkmatter_ext.ops.ragged import latent_sums
from darkmatter_ext.runtime.processes import ALONE, Processes

# Up to this many dead latents for each that takes part, all is dense. Two Xeon cores, float32, 4096 tokens, d 576, k 288, loss
# and gradients in ms, dense and sparse: m 288: 39, 488; 600: 115, 681; 2400: 441, 872; 3456: 558, 789; 5000: 829, 779.
DENSE_BELOW = 12


class OfDead(NamedTuple):
    """The dead latents' weights, or the gradients by them: W_enc (as rows) and W_dec [m, d], b_enc [m]."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


class _Acts(Protocol):
    """What the dead latents do at each token."""

    def decode(self, W_dec: Tensor) -> Tensor:
        """The error [N, d] that they explain."""
        ...

    def gradients(self, grad: Tensor, W_dec: Tensor, x: Tensor) -> OfDead:
        """Of a loss whose gradient by what `decode` gave is grad [N, d]; x [N, d] was encoded."""
        ...


@dataclass(frozen=True)
class _Sparse:
    acts: SparseActs

    def decode(self, W_dec: Tensor) -> Tensor:
        return sparse_decode(self.acts, W_dec)

    def gradients(self, grad: Tensor, W_dec: Tensor, x: Tensor) -> OfDead:
        rows = grad.to(W_dec.dtype)
        values = decoder_dot(rows, self.acts, W_dec).reshape(self.acts.values.shape)
        scored = replace(self.acts, values=values.masked_fill(self.acts.values <= 0, 0))
        return OfDead(decoder_outer(scored, x), latent_sums(scored.values, scored), decoder_outer(self.acts, rows))


@dataclass(frozen=True)
class _Dense:
    acts: Tensor  # [N, m], float32 or float64: torch multiplies 16-bit matrices slowly on many processors

    def decode(self, W_dec: Tensor) -> Tensor:
        return self.acts @ W_dec.to(self.acts.dtype)

    def gradients(self, grad: Tensor, W_dec: Tensor, x: Tensor) -> OfDead:
        rows = grad.to(self.acts.dtype)
        scores = (rows @ W_dec.to(rows.dtype).mT).masked_fill_(self.acts <= 0, 0)
        return OfDead(scores.mT @ x.to(rows.dtype), scores.sum(0), self.acts.mT @ rows)


def _acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> _Acts:
    """The k largest of the dead latents at each token."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if len(b_enc) > DENSE_BELOW * k:
        return _Sparse(EncoderRows(W_enc, b_enc).topk(x, k))
    scores = torch.addmm(b_enc.to(wide), x.to(wide), W_enc.mT.to(wide)).relu_()
    if k >= len(b_enc):
        return _Dense(scores)
    best = scores.topk(k, sorted=False)
    return _Dense(torch.zeros_like(scores).scatter_(1, best.indices, best.values))


def auxiliary_loss(
    x: Tensor, error: Tensor, dead: OfDead, k: int, weight: float, own: Processes = ALONE
) -> tuple[Tensor, OfDead]:
    """How badly the k best dead latents of each token alone explain the error, relative to its variance.

    Args:
        x: [N, d], what the encoder sees: b_dec is subtracted.
        error: [N, d], the activations minus x_hat, in the dtype of the losses; a constant here.
        dead: weights of the dead latents.

    Returns:
        The loss [], this part's share of the whole batch's, and the gradients of `weight` times it. 0 for an error that does
        not vary, of which there is nothing to explain.
    """
    acts = _acts(x, dead.W_enc, dead.b_enc, k)
    missed = acts.decode(dead.W_dec).to(error.dtype) - error
    count, variance = _count_and_variance(error, own)
    scale = torch.where(variance > torch.finfo(error.dtype).tiny, 1 / (count * variance), 0.0)  # NaN of one number too
    loss = missed.square().sum() * scale
    grad = missed * (2 * weight * scale)
    return loss, acts.gradients(grad, dead.W_dec, x)


def _count_and_variance(values: Tensor, own: Processes) -> tuple[int, Tensor]:
    """The number of values in the parts of all processes, and their variance [] (with Bessel's correction)."""
    if own.size == 1:
        return values.numel(), values.var()
    mean = values.mean(dtype=torch.float64)
    squares = (values.double() - mean).square().sum()
    parts, _ = own.joined(torch.stack([mean.new_tensor(values.numel()), mean, squares])[None])
    counts, means, squares = parts.unbind(1)
    count = counts.sum()
    between = counts * (means - (counts * means).sum() / count).square()
    return int(count), ((squares + between).sum() / (count - 1)).to(values.dtype)


class OfThresholds(NamedTuple):
    """Gradients of the pre-activation loss by the dead latents' W_enc (as rows) [m, d], b_enc and thresholds [m]."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor


def pre_activation_loss(
    x: Tensor, dead: OfDead, threshold: Tensor, weight: float, n_tokens: int
) -> tuple[Tensor, OfThresholds]:
    """How far the dead latents' pre-activations are below their thresholds: mean over tokens, sum over latents.

    Of "Dictionary Learning Optimization Techniques" (Transformer Circuits, January 2025): sum over dead j of
    ReLU(theta_j - h_j) ||w_j||, with the norms as constants. A latent that fires at a token of the batch is not dead, so all
    ReLUs pass (one of exactly 0 too), and mean and gradients follow from the mean of x alone: m d multiply-adds, whatever N.

    Args:
        x: [N, d], what the encoder sees, of this process.
        dead: weights of latents that fire nowhere in the batch.
        threshold: [m], theirs.
        n_tokens: of the whole batch.

    Returns:
        The loss [], this part's share of the whole batch's, and the gradients of `weight` times it.
    """
    dtype = threshold.dtype
    norms, share = dead.W_dec.to(dtype).norm(dim=1), len(x) / n_tokens
    mean = x.to(dtype).sum(0) / n_tokens
    below = share * (threshold - dead.b_enc.to(dtype)) - dead.W_enc.to(dtype) @ mean
    grad = weight * norms
    return below @ norms, OfThresholds(-grad[:, None] * mean, -share * grad, share * grad)
