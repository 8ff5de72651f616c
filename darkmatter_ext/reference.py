"""Plain-torch twins of the ops: the oracle of the tests, and the definition in a few lines.

Same names, same arguments, same answer, another way: dense float64 matrix products and stable sorts. They build the
dense [N, F] pre-activations, so they are for checking, not for use at size. All are differentiable by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from darkmatter_ext.sparse import SparseActs


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, b_dec: Tensor | None = None) -> Tensor:
    """h = (x - b_dec) W_enc + b_enc in float64, rounded to the dtype of x (as torch converts): [..., F]."""
    centred = x.double() if b_dec is None else x.double() - b_dec.double()
    return (centred @ W_enc.double() + b_enc.double()).to(x.dtype)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, b_dec: Tensor | None = None) -> SparseActs:
    """The k largest pre-activations of each token, ties to the lower index, NaN largest; then relu."""
    h = pre_activations(x, W_enc, b_enc, b_dec=b_dec)
    # A stable descending sort keeps equal values in index order, and torch sorts NaN first.
    indices = h.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return SparseActs.fixed(h.gather(-1, indices).relu(), indices, W_enc.shape[1])


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, *, b_dec: Tensor | None = None
) -> SparseActs:
    """The pre-activations strictly above the threshold (scalar or [F]), and those that are NaN; then relu."""
    h = pre_activations(x, W_enc, b_enc, b_dec=b_dec)
    threshold = torch.as_tensor(threshold, dtype=x.dtype, device=x.device)
    flat = h.reshape(math.prod(x.shape[:-1]), W_enc.shape[1])
    token, latent = (~(flat.detach() <= threshold)).nonzero(as_tuple=True)
    crow = torch.searchsorted(token, torch.arange(len(flat) + 1, device=x.device))
    return SparseActs.ragged(crow, latent, flat[token, latent].relu(), W_enc.shape[1], tuple(x.shape[:-1]))


def sparse_decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """acts @ W_dec + b_dec with dense acts in float64, then rounded: [..., d]."""
    x_hat = acts.to_dense().double() @ W_dec.double()
    return (x_hat if b_dec is None else x_hat + b_dec.double()).to(W_dec.dtype)
