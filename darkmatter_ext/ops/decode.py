"""From active latents back to activations, and between dense and sparse acts.

Shapes: acts with N tokens, F latents and z entries in total; x [..., d]; W_dec [F, d]; b_dec [d].
Sums are accumulated in float64 in stored order, then rounded to the dtype of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkmatter_ext.ops import _registrations  # noqa: F401  (registers fakes and gradients)
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.checks import attempt, call, check_capacity, check_device, check_tensor, flat_rows

_ops = torch.ops.darkmatter


def sparse_decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruct from active latents: equivalent to `acts.to_dense() @ W_dec + b_dec`, reading only the active rows.

    Args:
        acts: SparseActs with F latents, fixed or ragged.
        W_dec: [F, d]. Rows are gathered, so a non-contiguous W_dec is copied in every call: store it contiguous.
        b_dec: [d] or None.

    Returns:
        x_hat [..., d], summed in float64 in stored order, then rounded. Differentiable in acts.values, W_dec and b_dec,
        with deterministic gradients.

    Raises:
        TypeError, ValueError, RuntimeError: one line naming the argument, the rule and the value given.

    Cost: z d multiply-adds for z active latents, and z d elements of W_dec read; no [N, F] array.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"acts: must be SparseActs (SparseActs.from_dense converts), got {type(acts).__name__}")
    check_tensor("W_dec", W_dec, (acts.d_sae, None), acts.values)
    check_device("sparse_decode", "W_dec", W_dec)
    if b_dec is not None:
        check_tensor("b_dec", b_dec, (W_dec.shape[1],), W_dec)
    x_hat = call(_ops.sparse_decode, *acts.flat(), W_dec, b_dec)
    batch_shape = acts.batch_shape
    return x_hat if len(batch_shape) == 1 else x_hat.reshape(*batch_shape, W_dec.shape[1])


def decoder_dot(x: Tensor, acts: SparseActs, W_dec: Tensor) -> Tensor:
    """<x_i, W_dec_j> for every stored (i, j) of ragged acts: the gradient of their values if x is the gradient of x_hat.

    x [..., d], W_dec [F, d]; returns [z]. Differentiable. Cost: z d multiply-adds.
    """
    return call(_ops.decoder_dot, flat_rows(x), acts.col_indices, acts.crow_indices, W_dec)


def decoder_outer(acts: SparseActs, x: Tensor) -> Tensor:
    """Sum of acts_ij x_i over the tokens, [F, d]: the gradient of W_dec if x [..., d] is the gradient of x_hat.

    Deterministic; differentiable. Cost: z d multiply-adds and one write of F d elements.
    """
    return call(
        _ops.decoder_outer, acts.values.reshape(-1), acts.col_indices, acts.crow_indices, flat_rows(x), acts.d_sae
    )


def find_support(acts: Tensor, *, capacity: int | None = None) -> SparseActs:
    """The nonzero entries of dense acts as ragged SparseActs: the fast form of `SparseActs.from_dense`.

    Args:
        acts: dense latent activations [..., F].
        capacity: None, or the number of entries that each token has room for, 0 to F, as in `threshold_encode`.

    Returns:
        Ragged SparseActs, latents ascending. NaN counts as an entry, -0 does not. Differentiable in the values. With a
        capacity: fixed SparseActs [..., capacity] of the same entries, the places left over with value 0 and latent 0.
        `acts.found` [...] says how many entries a token has. If they are more than the capacity, the first are stored and
        `acts.overflowed` is True there.

    Raises:
        TypeError, ValueError, RuntimeError: one line naming the argument, the rule and the value given.

    Cost: one read of acts, two on CUDA. There the call waits for the device once, but with a capacity nothing does.
    """
    if not isinstance(acts, Tensor) or acts.ndim < 1:
        given = "a scalar" if isinstance(acts, Tensor) else type(acts).__name__
        raise TypeError(f"acts: must be a tensor of shape [..., F], got {given}")
    check_tensor("acts", acts, tuple(acts.shape), None)
    check_device("find_support", "acts", acts)
    flat = flat_rows(acts)
    if capacity is not None:
        check_capacity(capacity, acts.shape[-1])
        return _support_within(acts, flat, capacity)
    crow, col = attempt(_ops.find_support, flat.detach())
    token = torch.repeat_interleave(crow.diff(), output_size=col.shape[0])
    return SparseActs.ragged(crow, col, flat[token, col], acts.shape[-1], tuple(acts.shape[:-1]))


def _support_within(acts: Tensor, flat: Tensor, capacity: int) -> SparseActs:
    indices, found = attempt(_ops.find_support_fixed, flat.detach(), capacity)
    left_over = torch.arange(capacity, device=acts.device) >= found.unsqueeze(1)
    values = flat.gather(1, indices).masked_fill(left_over, 0)
    batch = acts.shape[:-1]
    values, indices = values.reshape(*batch, capacity), indices.reshape(*batch, capacity)
    return SparseActs(values, indices, acts.shape[-1], found=found.reshape(batch))


def to_dense(acts: SparseActs) -> Tensor:
    """Dense acts [..., F]: `acts.to_dense()`, on the CPU in one pass without page faults; differentiable in the values.

    Raises TypeError / ValueError if acts is not SparseActs or an index is out of range. Cost: one write of N F elements.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"acts: must be SparseActs, got {type(acts).__name__}")
    check_device("to_dense", "acts", acts.values)
    dense = call(_ops.to_dense, *acts.flat(), acts.d_sae)
    return dense.reshape(acts.shape)


def wide_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Sum over k of values [N, k] times W_dec[indices]: `sparse_decode` in float64, not rounded to the dtype of W_dec.

    `values` is float64, W_dec [F, d] has any dtype. Cost: as `sparse_decode`. No gradient.
    """
    if W_dec.dtype == torch.float64:
        return call(_ops.sparse_decode, values, indices, None, W_dec, None)
    return call(_ops.wide_decode, values, indices, W_dec)


def wide_dot(rows: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<rows_i, W_dec_j> [N, k] for j in indices [N, k], in float64, not rounded; dtypes and cost as for `wide_decode`."""
    if W_dec.dtype == torch.float64:
        return call(_ops.decoder_dot, rows, indices, None, W_dec)
    return call(_ops.wide_dot, rows, indices, W_dec)
