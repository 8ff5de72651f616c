"""What torch needs to know about the compiled ops besides their kernels: shapes (fakes), gradients and vmap rules.

sparse_decode, decoder_dot and decoder_outer are the three partial derivatives of one trilinear form, the
sum over the active (i, j) of v_ij <r_i, w_j>. The gradients of each are therefore the other two, and gradients of any
order exist.
(torch.func.grad and jacrev are not supported: torch.library's gradients do not run inside functorch's.)

Shapes: N tokens, d model dimension, F latents, k active latents per token, z active latents in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from darkmatter_ext.ops import _fixed_form, _library  # noqa: F401  (the first registers kernels)
from darkmatter_ext.ops.checks import attempt

_ops = torch.ops.darkmatter
# weight, bias, codes, sums, bounds, groups are derived from W_enc, b_enc, b_dec; gain has no gradient
_NO_PACKED_GRADIENTS = (None,) * 7


# Fakes


@register_fake("darkmatter::prepare_encoder")
def _(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, gain: Tensor | None = None) -> tuple[Tensor, ...]:
    return W_enc.new_empty(W_enc.shape[::-1]), *_prepare_rows_fake(W_enc.mT, b_enc, b_dec, gain)


@register_fake("darkmatter::prepare_rows")
def _prepare_rows_fake(
    rows: Tensor, b_enc: Tensor, b_dec: Tensor | None, gain: Tensor | None = None
) -> tuple[Tensor, ...]:
    n_latents, d = rows.shape
    # What is stored for screening depends on the machine that runs, so its sizes are unknown here. (Requesting a size
    # and not using it is an error in torch.)
    size = torch.library.get_ctx().new_dynamic_size
    padded = size()
    if rows.is_cuda:
        codes = rows.new_empty(padded, -(-d // 64) * 64, dtype=torch.float16)  # screen_padded of certificate.cuh
        n_sums = n_groups = 0
    else:
        codes, n_sums, n_groups = rows.new_empty(size(), dtype=torch.int8), padded, size()
    return (
        rows.new_empty(n_latents, dtype=torch.float64),
        codes,
        rows.new_empty(n_sums, dtype=torch.int32),
        rows.new_empty(_library.BOUND_ROWS, padded, dtype=torch.float32),
        rows.new_empty(n_groups, dtype=torch.int32),
    )


@register_fake("darkmatter::topk_encode")
def _(x, W_enc, b_enc, b_dec, k, *packed) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


@register_fake("darkmatter::threshold_encode")
def _(x, W_enc, b_enc, b_dec, threshold, *packed) -> tuple[Tensor, Tensor, Tensor]:
    n_active = torch.library.get_ctx().new_dynamic_size()
    crow = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return x.new_empty(n_active), crow, x.new_empty(n_active, dtype=torch.int64)


@register_fake("darkmatter::threshold_encode_fixed")
def _(x, W_enc, b_enc, b_dec, threshold, capacity, *packed) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens = x.shape[0]
    indices = x.new_empty(n_tokens, capacity, dtype=torch.int64)
    return x.new_empty(n_tokens, capacity), indices, x.new_empty(n_tokens, dtype=torch.int64)


@register_fake("darkmatter::find_support_fixed")
def _(acts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    shapes = (acts.shape[0], capacity), (acts.shape[0],)
    return acts.new_empty(shapes[0], dtype=torch.int64), acts.new_empty(shapes[1], dtype=torch.int64)


@register_fake("darkmatter::try_topk_encode")
def _(x, W_enc, b_enc, b_dec, k, *packed) -> tuple[Tensor, Tensor, Tensor]:
    undecided = torch.library.get_ctx().new_dynamic_size()
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    return values, indices, x.new_empty(undecided, dtype=torch.int64)


@register_fake("darkmatter::try_threshold_encode")
def _(x, W_enc, b_enc, b_dec, threshold, *packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_active, undecided = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    crow, col = (x.new_empty(size, dtype=torch.int64) for size in (x.shape[0] + 1, n_active))
    return x.new_empty(n_active), crow, col, x.new_empty(undecided, dtype=torch.int64)


@register_fake("darkmatter::find_support")
def _(acts: Tensor) -> tuple[Tensor, Tensor]:
    n_active = torch.library.get_ctx().new_dynamic_size()
    return acts.new_empty(acts.shape[0] + 1, dtype=torch.int64), acts.new_empty(n_active, dtype=torch.int64)


@register_fake("darkmatter::to_dense")
def _(values, indices, crow, n_latents) -> Tensor:
    return values.new_empty(indices.shape[0] if crow is None else crow.shape[0] - 1, n_latents)


@register_fake("darkmatter::screen_intervals")
def _(x, W_enc, b_enc, b_dec, *packed) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], W_enc.shape[1])
    bounds = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return (*bounds, x.new_empty(x.shape[0], dtype=torch.bool))


@register_fake("darkmatter::sparse_decode")
def _(values, indices, crow, W_dec, b_dec) -> Tensor:
    n_tokens = indices.shape[0] if crow is None else crow.shape[0] - 1
    return W_dec.new_empty(n_tokens, W_dec.shape[1])


@register_fake("darkmatter::decoder_dot")
def _(rows, indices, crow, W_dec) -> Tensor:
    return W_dec.new_empty(indices.shape)


@register_fake("darkmatter::decoder_outer")
def _(values, indices, crow, rows, n_latents) -> Tensor:
    return rows.new_empty(n_latents, rows.shape[1])


@register_fake("darkmatter::wide_decode")
def _(values, indices, W_dec) -> Tensor:
    return values.new_empty(values.shape[0], W_dec.shape[1])


@register_fake("darkmatter::wide_dot")
def _(rows, indices, W_dec) -> Tensor:
    return rows.new_empty(indices.shape)


@register_fake("darkmatter::pursuit_choose")
def _(residual, _dictionary, _codes, _bounds, _noise, l0, *_others) -> Tensor:
    return l0.new_empty(residual.shape[0])


@register_fake("darkmatter::pursuit_step")
def _(*_arguments) -> None:  # works in place
    return None


# Gradients of the sparse ops


def save_decode(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, indices, crow, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, crow, W_dec)
    ctx.has_bias = b_dec is not None


def decode_backward(ctx: Any, grad: Tensor) -> tuple:
    """x_hat = sum_a value_a W_dec[index_a] + b_dec: gradients of values [N, k] or [z], W_dec [F, d], b_dec [d]."""
    values, indices, crow, W_dec = ctx.saved_tensors
    wants_values, _, _, wants_weights, wants_bias = ctx.needs_input_grad
    return (
        attempt(_ops.decoder_dot, grad, indices, crow, W_dec) if wants_values else None,
        None,
        None,
        attempt(_ops.decoder_outer, values, indices, crow, grad, W_dec.shape[0]) if wants_weights else None,
        grad.sum(0) if wants_bias and ctx.has_bias else None,
    )


def _save_dot(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dot_backward(ctx: Any, grad: Tensor) -> tuple:
    """products_a = <rows_token(a), W_dec[index_a]>: gradients of rows [N, d] and W_dec [F, d]."""
    rows, indices, crow, W_dec = ctx.saved_tensors
    wants_rows, _, _, wants_weights = ctx.needs_input_grad
    return (
        attempt(_ops.sparse_decode, grad, indices, crow, W_dec, None) if wants_rows else None,
        None,
        None,
        attempt(_ops.decoder_outer, grad, indices, crow, rows, W_dec.shape[0]) if wants_weights else None,
    )


def _save_outer(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _outer_backward(ctx: Any, grad: Tensor) -> tuple:
    """sums_j = sum_a value_a rows_token(a) over the a of latent j: gradients of values and rows [N, d]; grad [F, d]."""
    values, indices, crow, rows = ctx.saved_tensors
    wants_values, _, _, wants_rows, _ = ctx.needs_input_grad
    return (
        attempt(_ops.decoder_dot, rows, indices, crow, grad) if wants_values else None,
        None,
        None,
        attempt(_ops.sparse_decode, values, indices, crow, grad, None) if wants_rows else None,
        None,
    )


def save_to_dense(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def to_dense_backward(ctx: Any, grad: Tensor) -> tuple:
    """The gradient [N, F] at the active latents."""
    indices, crow = ctx.saved_tensors
    if crow is None:
        return grad.gather(1, indices), None, None, None
    tokens = torch.repeat_interleave(crow.diff(), output_size=indices.shape[0])
    return grad[tokens, indices], None, None, None


register_autograd("darkmatter::to_dense", to_dense_backward, setup_context=save_to_dense)
register_autograd("darkmatter::sparse_decode", decode_backward, setup_context=save_decode)
register_autograd("darkmatter::decoder_dot", _dot_backward, setup_context=_save_dot)
register_autograd("darkmatter::decoder_outer", _outer_backward, setup_context=_save_outer)


# Gradients of the encoders


def _latent_sums(grad: Tensor, indices: Tensor, crow: Tensor | None, n_tokens: int, n_latents: int) -> Tensor:
    """Sum of the gradients of each latent [F], in float64. On CUDA this is decoder_outer with ones, because index_add
    is not deterministic there."""
    if grad.is_cuda:
        return attempt(_ops.decoder_outer, grad, indices, crow, grad.new_ones(n_tokens, 1), n_latents)[:, 0]
    sums = torch.zeros(n_latents, dtype=torch.float64)
    return sums.index_add(0, indices.reshape(-1), grad.reshape(-1).double())


def _encoder_gradients(
    needs: Sequence[bool],
    grad: Tensor,
    indices: Tensor,
    crow: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc, b_enc, b_dec, given the gradient g of the selected pre-activations.

    h_ij = sum_d (x_id - b_dec_d) W_dj + b_enc_j only for the selected (i, j), so everything is sparse:
    dx_i = sum_j g_ij w_j, db_j = sum_i g_ij, dW_j = sum_i g_ij x_i - db_j b_dec, db_dec = -sum_j db_j w_j.
    `weight` [F, d] holds the rows packed in the forward pass. Second derivatives go through W_enc instead, because the
    packed rows cannot pass them on.
    """
    wants_x, wants_weights, wants_b_enc, wants_b_dec = needs[:4]
    n_latents = W_enc.shape[1]
    grad_x = grad_weights = grad_b_dec = None
    if wants_x:
        rows = W_enc.mT if weight is None or torch.is_grad_enabled() else weight
        grad_x = attempt(_ops.sparse_decode, grad, indices, crow, rows, None)  # [N, d]
    sums = _latent_sums(grad, indices, crow, len(x), n_latents).double()  # [F]
    if wants_b_dec and b_dec is not None:
        wide = torch.promote_types(W_enc.dtype, torch.float32)  # a 16-bit product would be slow and imprecise
        grad_b_dec = -(W_enc.to(wide) @ sums.to(wide)).to(W_enc.dtype)
    sums = sums.to(W_enc.dtype)
    if wants_weights:
        grad_weights = attempt(_ops.decoder_outer, grad, indices, crow, x, n_latents)  # [F, d]
        if b_dec is not None:
            grad_weights = grad_weights - torch.outer(sums, b_dec)
        grad_weights = grad_weights.mT
    return grad_x, grad_weights, sums if wants_b_enc else None, grad_b_dec


def _relu_gradient(grad: Tensor, values: Tensor) -> Tensor:
    """As torch.relu: where relu gave 0 nothing passes, whatever comes in (Inf times 0 would be NaN); where it gave NaN,
    everything does."""
    return grad.masked_fill(values <= 0, 0)


def _through_gain(grad: Tensor, gain: Tensor | None, indices: Tensor) -> Tensor:
    """The gradient of the pre-activations before multiplication by their gains."""
    return grad if gain is None else grad * gain[indices]


def save_topk(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, weight = inputs[:6]
    values, *rest = output  # indices; undecided of try_topk_encode
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(values, rest[0], x, W_enc, b_dec, weight, inputs[-1])


def topk_backward(ctx: Any, grad_values: Tensor, *_rest: Any) -> tuple:
    values, indices, x, W_enc, b_dec, weight, gain = ctx.saved_tensors
    grad = _through_gain(_relu_gradient(grad_values, values), gain, indices)
    return (
        *_encoder_gradients(ctx.needs_input_grad, grad, indices, None, x, W_enc, b_dec, weight),
        None,
        *_NO_PACKED_GRADIENTS,
    )


def save_threshold(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, weight = inputs[:6]
    values, *rest = output  # crow, col; undecided of try_threshold_encode
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(values, *rest[:2], x, W_enc, b_dec, weight, inputs[-1])


def threshold_backward(ctx: Any, grad_values: Tensor, *_rest: Any) -> tuple:
    values, crow, col, x, W_enc, b_dec, weight, gain = ctx.saved_tensors
    grad = _through_gain(_relu_gradient(grad_values, values), gain, col)  # the threshold gets none (step function)
    gradients = _encoder_gradients(ctx.needs_input_grad, grad, col, crow, x, W_enc, b_dec, weight)
    return (*gradients, None, *_NO_PACKED_GRADIENTS)


def _save_fixed(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, _, weight = inputs[:7]
    values, *rest = output  # indices, found
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(values, rest[0], x, W_enc, b_dec, weight, inputs[-1])


def _fixed_backward(ctx: Any, grad_values: Tensor, *_rest: Any) -> tuple:
    return (*topk_backward(ctx, grad_values), None)  # one more argument; the places left over hold zeros


register_autograd("darkmatter::threshold_encode_fixed", _fixed_backward, setup_context=_save_fixed)
for _name in ("topk_encode", "try_topk_encode"):
    register_autograd(f"darkmatter::{_name}", topk_backward, setup_context=save_topk)
for _name in ("threshold_encode", "try_threshold_encode"):
    register_autograd(f"darkmatter::{_name}", threshold_backward, setup_context=save_threshold)


# vmap: a batch of tokens is just more tokens. Batches of weights are not supported; ragged results have no common shape.


def _only_batched(in_dims: tuple, allowed: Sequence[int], names: str, op: str) -> None:
    if any(dim is not None for place, dim in enumerate(in_dims) if place not in allowed):
        raise RuntimeError(f"{op}: vmap may batch {names} only, got another batched argument")


def _batch_first(batch: int, dim: int | None, tensor: Tensor) -> Tensor:
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _topk_vmap(info: Any, in_dims: tuple, x, W_enc, b_enc, b_dec, k, *packed) -> tuple:
    _only_batched(in_dims, (0,), "x", "topk_encode")
    x = x.movedim(in_dims[0], 0)  # [B, N, d]
    values, indices = _ops.topk_encode(x.flatten(0, 1), W_enc, b_enc, b_dec, k, *packed)
    return (values.unflatten(0, x.shape[:2]), indices.unflatten(0, x.shape[:2])), (0, 0)


register_vmap("darkmatter::topk_encode", _topk_vmap)


def _fixed_vmap(info: Any, in_dims: tuple, x, *others) -> tuple:
    _only_batched(in_dims, (0,), "x", "threshold_encode")
    x = x.movedim(in_dims[0], 0)  # [B, N, d]
    results = _ops.threshold_encode_fixed(x.flatten(0, 1), *others)
    return tuple(result.unflatten(0, x.shape[:2]) for result in results), (0, 0, 0)


register_vmap("darkmatter::threshold_encode_fixed", _fixed_vmap)


def _decode_vmap(info: Any, in_dims: tuple, values, indices, crow, W_dec, b_dec) -> tuple:
    _only_batched(in_dims, (0, 1), "values and indices", "sparse_decode")
    if crow is not None:
        raise RuntimeError("sparse_decode: vmap needs acts with a fixed k, got ragged acts")
    values = _batch_first(info.batch_size, in_dims[0], values)  # [B, N, k]
    indices = _batch_first(info.batch_size, in_dims[1], indices)
    x_hat = _ops.sparse_decode(values.flatten(0, 1), indices.flatten(0, 1), None, W_dec, b_dec)
    return x_hat.unflatten(0, (info.batch_size, -1)), 0


register_vmap("darkmatter::sparse_decode", _decode_vmap)


def _threshold_vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    # Without a rule torch would loop over the batch, then fail to stack tensors of different lengths.
    raise RuntimeError(
        "threshold_encode: vmap needs results of one length, got ragged ones; give it a capacity, "
        "or call it on the whole batch"
    )


register_vmap("darkmatter::threshold_encode", _threshold_vmap)
