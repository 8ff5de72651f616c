"""What others do, written anew in plain torch from their published approach, so that all run in one process.

Shapes: N tokens, d model dimension, F latents, k active.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # latents a chunk of the chunked matmul: scores stay in the cache (KERNELS: faster than the whole product)


def matmul_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The dense encoder everyone starts from: [N, F] pre-activations, torch.topk, relu."""
    values, indices = (x @ W_enc + b_enc).topk(k)
    return values.relu(), indices


def chunked_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """A matmul alone, weight [F, d], in chunks of latents whose scores are overwritten: the floor of a dense encoder."""
    scores = torch.empty(len(x), min(CHUNK, len(weight)), dtype=x.dtype)
    for part in weight.split(CHUNK):
        torch.mm(x, part.mT, out=scores[:, : len(part)])
    return scores


def embedding_bag_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The decoder as a weighted embedding bag: x_hat [N, d] from acts [N, k]."""
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")


class FusedEncoder(torch.autograd.Function):
    """EleutherAI sparsify's approach: dense forward, and a backward that gathers the k active rows of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [N, d], weight [F, d], bias [F]."""
        values, indices = F.linear(x, weight, bias).relu().topk(k, sorted=False)
        ctx.save_for_backward(x, weight, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _indices: Any) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        """Gradients of x, weight, bias from the gradient of the k values."""
        x, weight, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_x = embedding_bag_decode(grad, indices, weight)
        flat = indices.flatten()
        contributions = (grad.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)  # [N k, d]
        grad_weight = torch.zeros_like(weight).index_add_(0, flat, contributions)
        grad_bias = torch.zeros(len(weight), dtype=grad.dtype).index_add_(0, flat, grad.flatten())
        return grad_x, grad_weight, grad_bias, None


def sparsify_step(x: Tensor, weight: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """Encode and decode as sparsify trains: x_hat [N, d]."""
    values, indices = FusedEncoder.apply(x, weight, b_enc, k)
    return embedding_bag_decode(values, indices, W_dec)


def dense_gradient_pursuit(x: Tensor, dictionary: Tensor, l0: int) -> Tensor:
    """Gradient pursuit as it is released: dense weights [N, F] and three dense products a step."""
    weights = x.new_zeros(len(x), len(dictionary))
    for _ in range(l0):
        residual = x - weights @ dictionary
        products = residual @ dictionary.mT
        support = (weights != 0).scatter_(1, products.argmax(1, keepdim=True), True)
        gradient = products * support
        direction = gradient @ dictionary
        step = (direction * residual).sum(1) / direction.square().sum(1)
        weights = (weights + step[:, None] * gradient).clamp_(min=0)
    return weights


def sae_lens_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """The arithmetic of SAELens' TopKSAE.encode: dense acts [N, F] (for machines without sae_lens)."""
    values, indices = torch.topk(x @ W_enc + b_enc, k=k, dim=-1)
    acts = torch.zeros(len(x), W_enc.shape[1], dtype=x.dtype, device=x.device)
    return acts.scatter_(-1, indices, values.relu())


def sae_lens_jumprelu(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    """The arithmetic of SAELens' JumpReLUSAE.encode: dense acts [N, F]."""
    hidden = x @ W_enc + b_enc
    return torch.relu(hidden) * (hidden > threshold).to(hidden.dtype)


def gathered_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The decode of the Triton kernels (flex-sae, sparsify): a weighted sum of gathered rows, here rows first, then the sum."""
    return torch.bmm(values[:, None], W_dec[indices])[:, 0]
