"""The ops without their argument checks, for small calls whose caller has already checked the tensors.

The caller guarantees: plain strided tensors of one floating-point dtype on one device with kernels, `prepared` made from
these weights, shapes as in `ops/encode.py`, no functorch transform, no dispatch mode. Results are those of `ops/encode.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops import _registrations, encode
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.checks import below_autograd, flat_rows
from darkmatter_ext.ops.encode import PreparedEncoder


def _with_gradient(op: Any, save: Callable[..., None], gradients: Callable[..., tuple]) -> Callable[..., Any]:
    """The op with its registered gradients, as a plain autograd function; runs below autograd if no gradient is required."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below_autograd(op, *inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"_{op._opname}", (torch.autograd.Function,), members)

    def run(*inputs: Any) -> Any:
        return function.apply(*inputs) if torch.is_grad_enabled() else below_autograd(op, *inputs)

    return run


_ops = torch.ops.darkmatter
_topk = _with_gradient(_ops.try_topk_encode.default, _registrations.save_topk, _registrations.topk_backward)
_threshold = _with_gradient(
    _ops.try_threshold_encode.default, _registrations.save_threshold, _registrations.threshold_backward
)
_decode = _with_gradient(_ops.sparse_decode.default, _registrations.save_decode, _registrations.decode_backward)
_to_dense = _with_gradient(_ops.to_dense.default, _registrations.save_to_dense, _registrations.to_dense_backward)


class Tried(NamedTuple):
    """Active latents, and the tokens that were handed back: `acts` stores nothing for those."""

    acts: SparseActs
    undecided: Tensor  # [u] int64, numbers of flattened tokens


def try_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, prepared: PreparedEncoder) -> Tried:
    """As `ops.try_topk_encode`."""
    if not x.is_cpu:
        return Tried(*encode.try_topk_encode(x, W_enc, b_enc, k, prepared=prepared))
    values, indices, undecided = _topk(flat_rows(x), W_enc, b_enc, None, k, *prepared.packed)
    if x.ndim != 2:
        shape = (*x.shape[:-1], k)
        values, indices = values.reshape(shape), indices.reshape(shape)
    return Tried(SparseActs(values, indices, W_enc.shape[1]), undecided)


def try_threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, prepared: PreparedEncoder
) -> Tried:
    """As `ops.try_threshold_encode`; threshold [] or [F], without a gradient."""
    if not x.is_cpu:
        return Tried(*encode.try_threshold_encode(x, W_enc, b_enc, threshold, prepared=prepared))
    values, crow, col, undecided = _threshold(flat_rows(x), W_enc, b_enc, None, threshold, *prepared.packed)
    return Tried(SparseActs(values, col, W_enc.shape[1], crow, tuple(x.shape[:-1])), undecided)


def sparse_decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """As `ops.sparse_decode`."""
    x_hat = _decode(*acts.flat(), W_dec, b_dec)
    batch_shape = acts.batch_shape
    return x_hat if len(batch_shape) == 1 else x_hat.reshape(*batch_shape, W_dec.shape[1])


def to_dense(acts: SparseActs) -> Tensor:
    """As `ops.to_dense`."""
    dense = _to_dense(*acts.flat(), acts.d_sae)
    return dense if len(acts.batch_shape) == 1 else dense.reshape(acts.shape)


def find_support(acts: Tensor) -> SparseActs:
    """As `ops.find_support`, without a gradient."""
    flat = flat_rows(acts)
    crow, col = below_autograd(_ops.find_support.default, flat)
    if len(flat) == 1:
        values = flat[0, col]
    else:
        values = flat[torch.repeat_interleave(crow.diff(), output_size=col.shape[0]), col]
    return SparseActs(values, col, acts.shape[-1], crow, tuple(acts.shape[:-1]))
