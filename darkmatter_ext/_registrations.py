"""What torch needs to know about the compiled ops besides their kernels: shapes (fakes), gradients, vmap.

Shapes: N tokens, d model dimension, F latents, k active latents, z active latents in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from darkmatter_ext import _library  # noqa: F401  (defines torch.ops.darkmatter)

_ops = torch.ops.darkmatter


@register_fake("darkmatter::pack_encoder")
def _(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
    d, n_latents = W_enc.shape
    return W_enc.new_empty(n_latents, d), W_enc.new_empty(n_latents, dtype=torch.float64)


@register_fake("darkmatter::topk_encode")
def _(x, W_enc, b_enc, b_dec, k, weight, bias) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


@register_fake("darkmatter::threshold_encode")
def _(x, W_enc, b_enc, b_dec, threshold, weight, bias) -> tuple[Tensor, Tensor, Tensor]:
    n_active = torch.library.get_ctx().new_dynamic_size()
    crow = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return crow, x.new_empty(n_active, dtype=torch.int64), x.new_empty(n_active)


@register_fake("darkmatter::sparse_decode")
def _(values, indices, crow, W_dec, b_dec) -> Tensor:
    n_tokens = indices.shape[0] if crow is None else crow.shape[0] - 1
    return W_dec.new_empty(n_tokens, W_dec.shape[1])


@register_fake("darkmatter::sparse_dot")
def _(rows, indices, crow, W_dec) -> Tensor:
    return W_dec.new_empty(indices.shape)


@register_fake("darkmatter::sparse_outer")
def _(values, indices, crow, rows, n_latents) -> Tensor:
    return rows.new_empty(n_latents, rows.shape[1])


def _save_decode(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, indices, crow, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, crow, W_dec)
    ctx.has_bias = b_dec is not None


def _decode_backward(ctx: Any, grad: Tensor) -> tuple:
    """x_hat = sum_a value_a W_dec[index_a] + b_dec: gradients of values [.., k] or [z], W_dec [F, d], b_dec [d]."""
    values, indices, crow, W_dec = ctx.saved_tensors
    wants_values, _, _, wants_weights, wants_bias = ctx.needs_input_grad
    return (
        _ops.sparse_dot(grad, indices, crow, W_dec) if wants_values else None,
        None,
        None,
        _ops.sparse_outer(values, indices, crow, grad, W_dec.shape[0]) if wants_weights else None,
        grad.sum(0) if wants_bias and ctx.has_bias else None,
    )


register_autograd("darkmatter::sparse_decode", _decode_backward, setup_context=_save_decode)


def _encoder_gradients(
    needs: Sequence[bool],
    grad: Tensor,
    indices: Tensor,
    crow: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc, b_enc, b_dec, given the gradient of the selected pre-activations.

    h_ij = sum_d (x_id - b_dec_d) W_dj + b_enc_j for the selected (i, j) only, so everything is sparse:
    dx_i = sum_j g_ij w_j, dW_j = sum_i g_ij (x_i - b_dec), db_j = sum_i g_ij, db_dec = -sum_i dx_i.
    """
    wants_x, wants_weights, wants_b_enc, wants_b_dec = needs[:4]
    wants_b_dec = wants_b_dec and b_dec is not None
    n_latents = W_enc.shape[1]
    grad_x = grad_weights = grad_b_enc = grad_b_dec = None
    if wants_x or wants_b_dec:
        grad_x = _ops.sparse_decode(grad, indices, crow, W_enc.mT, None)  # [N, d]
        grad_b_dec = -grad_x.sum(0) if wants_b_dec else None
    if wants_weights or wants_b_enc:
        sums = torch.zeros(n_latents, dtype=torch.float64, device=grad.device)
        sums.index_add_(0, indices.reshape(-1), grad.reshape(-1).double())  # [F]
        grad_b_enc = sums.to(W_enc.dtype) if wants_b_enc else None
        if wants_weights:
            grad_weights = _ops.sparse_outer(grad, indices, crow, x, n_latents)  # [F, d]
            if b_dec is not None:
                grad_weights = grad_weights - torch.outer(sums.to(W_enc.dtype), b_dec)
            grad_weights = grad_weights.mT
    return grad_x if wants_x else None, grad_weights, grad_b_enc, grad_b_dec


def _save_topk(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, b_dec, _, _, _ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, x, W_enc, b_dec)


def _topk_backward(ctx: Any, grad_values: Tensor, _grad_indices: Any) -> tuple:
    values, indices, x, W_enc, b_dec = ctx.saved_tensors
    grad = grad_values * (values > 0)  # relu
    return (*_encoder_gradients(ctx.needs_input_grad, grad, indices, None, x, W_enc, b_dec), None, None, None)


register_autograd("darkmatter::topk_encode", _topk_backward, setup_context=_save_topk)


def _save_threshold(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_dec, _, _, _ = inputs
    crow, col, values = output
    ctx.mark_non_differentiable(crow, col)
    ctx.save_for_backward(crow, col, values, x, W_enc, b_dec)


def _threshold_backward(ctx: Any, _grad_crow: Any, _grad_col: Any, grad_values: Tensor) -> tuple:
    crow, col, values, x, W_enc, b_dec = ctx.saved_tensors
    grad = grad_values * (values > 0)  # relu; the threshold itself has no gradient (a step)
    return (*_encoder_gradients(ctx.needs_input_grad, grad, col, crow, x, W_enc, b_dec), None, None, None)


register_autograd("darkmatter::threshold_encode", _threshold_backward, setup_context=_save_threshold)


def _only_batched(in_dims: tuple, allowed: Sequence[int], names: str, op: str) -> None:
    if any(dim is not None for place, dim in enumerate(in_dims) if place not in allowed):
        raise RuntimeError(f"{op}: vmap may batch {names} only, got a batched weight")


def _topk_vmap(info: Any, in_dims: tuple, x, W_enc, b_enc, b_dec, k, weight, bias) -> tuple:
    """A batch of x [B, N, d] is more tokens: one call over [B N, d]."""
    _only_batched(in_dims, (0,), "x", "topk_encode")
    x = x.movedim(in_dims[0], 0)  # [B, N, d]
    values, indices = _ops.topk_encode(x.flatten(0, 1), W_enc, b_enc, b_dec, k, weight, bias)
    return (values.unflatten(0, x.shape[:2]), indices.unflatten(0, x.shape[:2])), (0, 0)


register_vmap("darkmatter::topk_encode", _topk_vmap)


def _decode_vmap(info: Any, in_dims: tuple, values, indices, crow, W_dec, b_dec) -> tuple:
    """A batch of fixed-k acts [B, N, k] is more tokens; ragged acts have no common shape to batch."""
    _only_batched(in_dims, (0, 1), "values and indices", "sparse_decode")
    batch = info.batch_size
    values, indices = (
        tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((values, indices), in_dims[:2], strict=True)
    )
    if crow is not None:
        raise RuntimeError("sparse_decode: vmap needs acts with a fixed k, got ragged acts")
    x_hat = _ops.sparse_decode(values.flatten(0, 1), indices.flatten(0, 1), None, W_dec, b_dec)
    return x_hat.unflatten(0, (batch, -1)), 0


register_vmap("darkmatter::sparse_decode", _decode_vmap)
