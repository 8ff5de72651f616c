"""Top-k and threshold encode.

Definition: the pre-activations h = (x - b_dec) W_enc + b_enc are accumulated in float64 from the given numbers and rounded
to their dtype (16-bit ones through float32, as torch converts). Then the top k are kept (ties go to the lower index, NaN
counts as the largest), or those above the threshold; then relu is applied.
`reference.py` implements the same definition in plain torch. The result does not depend on batching, threads or
instruction set (for float64 input: up to the last bit).

Shapes: x [..., d], W_enc [d, F], b_enc [F], b_dec [d], W_dec [F, d]; N: number of tokens (all leading dimensions flattened).
dtypes: float16, bfloat16, float32 or float64, the same for all floating-point arguments.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops import _registrations  # noqa: F401  (registers fakes and gradients)
from darkmatter_ext.ops._library import MIN_TOKENS_TO_PACK
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.checks import INTEGERS, call, check_capacity, check_tensor, check_weights, flat_rows
from darkmatter_ext.runtime.inputs import InputError

_ops = torch.ops.darkmatter
_NOT_PACKED = (None,) * 7
_MAX_SCREENED_K = 4096  # kMaxScreenK of csrc/cpu/topk_encode.cpp
_MAX_TIMED_K_ON_CUDA = 512  # kShortK of csrc/cuda/screen/filter.cuh; up to kMaxScreenK is screened too, but not timed


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """Encoder weights packed once for many calls: see `prepare_encoder`."""

    weight: Tensor  # [F, d] contiguous rows of W_enc^T
    bias: Tensor  # [F] float64, b_enc - <b_dec, w_j>
    codes: (
        Tensor  # the weights rounded for screening, as bytes (CPU) or float16 (CUDA); empty where nothing is screened
    )
    sums: Tensor  # [places, padded] int32; empty on CUDA
    bounds: Tensor  # [5, places, padded] float32
    groups: Tensor  # int32: which latents are equal or constant (csrc/cpu/screen/places.h); empty on CUDA
    gain: Tensor | None  # [F], multiplies the rounded pre-activations
    has_b_dec: bool

    @property
    def packed(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order the ops take them."""
        by_torch = self._screens_by_torch and not _torch_multiplies_in_full()
        codes = self.codes[:0] if by_torch else self.codes
        return self.weight, self.bias, codes, self.sums, self.bounds, self.groups, self.gain

    @functools.cached_property
    def _screens_by_torch(self) -> bool:
        """Whether torch's own product does the screening: `codes` is then a single byte that marks this."""
        return self.codes.numel() == 1

    @property
    def screens(self) -> bool:
        """Whether calls use low-precision screening (same answer, several times faster) or only the exact path.

        If torch's product does the screening: False while its precision is lowered (`torch.set_float32_matmul_precision`).
        """
        return self.can_screen and not (self._screens_by_torch and not _torch_multiplies_in_full())

    @property
    def can_screen(self) -> bool:
        """Whether there are codes that the encoders can use: codes of float64 weights on CUDA are only for pursuit."""
        return self.codes.numel() > 0 and not (self.weight.is_cuda and self.weight.dtype is torch.float64)

    def screens_topk(self, k: int) -> bool:
        """Whether screening helps a call for the k largest: if k is close to the number of places, nothing can be ruled out.

        A place is one latent, or several equal ones; all-zero latents have none. On CUDA, calls with k from 513 to 1024 are
        screened too, but whether that helps has not been measured.
        """
        most = _MAX_SCREENED_K if self.weight.is_cpu else _MAX_TIMED_K_ON_CUDA
        return k <= most and 8 * k <= self.n_places

    @functools.cached_property
    def n_places(self) -> int:
        """Number of pre-activations computed per token: fewer than d_sae if some latents are equal or zero (CPU)."""
        return int(self.groups[0]) if self.groups.numel() else self.d_sae

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_sae(self) -> int:
        return self.weight.shape[0]

    def __repr__(self) -> str:
        return f"PreparedEncoder(d_in={self.d_in}, d_sae={self.d_sae}, dtype={self.weight.dtype}, device={self.weight.device})"


def _torch_multiplies_in_full() -> bool:
    """Whether torch multiplies float32 in full precision. A product in bfloat16 or TF32 would need another bound."""
    if torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled("cpu"):
        return False
    settings = (getattr(torch.backends, "fp32_precision", "none"), _mkldnn_precision())
    modes = (os.environ.get(name, "STRICT") for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"))
    return all(each in ("none", "ieee") for each in settings) and all(mode.upper() == "STRICT" for mode in modes)


def _mkldnn_precision() -> str:
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none")


def _check_encode(
    op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, prepared: PreparedEncoder | None
) -> None:
    check_weights(op, W_enc, b_enc, b_dec)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim < 1:
        raise InputError("x: must have shape [..., d], got a scalar")
    check_tensor("x", x, (*x.shape[:-1], W_enc.shape[0]), W_enc)
    if prepared is None:
        return
    if not isinstance(prepared, PreparedEncoder):
        raise TypeError(f"prepared: must come from prepare_encoder, got {type(prepared).__name__}")
    if prepared.weight.shape != W_enc.shape[::-1]:
        raise InputError(f"prepared: must be of W_enc {list(W_enc.shape)}, got {[prepared.d_in, prepared.d_sae]}")
    if prepared.weight.dtype != W_enc.dtype or prepared.weight.device != W_enc.device:
        raise InputError(
            f"prepared: must be {W_enc.dtype} on {W_enc.device} as W_enc, "
            f"got {prepared.weight.dtype} on {prepared.weight.device}"
        )
    if prepared.has_b_dec != (b_dec is not None):
        with_or_without = "with" if prepared.has_b_dec else "without"
        raise InputError(f"prepared: must be prepared with the b_dec of the call, got one {with_or_without} b_dec")


@torch.no_grad()
def prepare_encoder(
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    b_dec: Tensor | None = None,
    gain: Tensor | None = None,
    share_rows: bool = False,
) -> PreparedEncoder:
    """Pack encoder weights once for many calls of topk_encode / threshold_encode.

    Args:
        W_enc: [d, F], any strides.
        b_enc: [F].
        b_dec: [d], subtracted from x before encoding (SAELens' apply_b_dec_to_input), or None.
        gain: [F] or None. Pre-activations are rounded, multiplied by it and rounded again before selection
            (SAELens' rescale_acts_by_decoder_norm, with the norms of the decoder rows). It gets no gradient. CPU only.
        share_rows: if W_enc is on the CPU and the transpose of contiguous rows (`W_enc.mT.is_contiguous()`), keep
            those rows instead of a copy. Meant for callers that prepare again after every edit.

    Returns:
        PreparedEncoder, a copy unless rows are shared. After editing the weights, prepare again: calls with the old one
        give the old answer. Gradients still flow to the W_enc, b_enc and b_dec of the call.

    Raises:
        TypeError, ValueError: wrong types, shapes, dtypes or devices; NaN in a weight.

    Cost: a few passes over W_enc. Memory: F d elements unless shared, plus, for screening, F d bytes with AVX-512 VNNI or
    2 F d bytes on other AVX2 processors; latents that are equal or zero count once.
    """
    check_weights("prepare_encoder", W_enc, b_enc, b_dec)
    if gain is not None:
        check_tensor("gain", gain, (W_enc.shape[1],), W_enc)
    if share_rows and W_enc.device.type == "cpu" and W_enc.mT.is_contiguous():
        rows = W_enc.detach().mT
        packed = call(_ops.prepare_rows, rows, b_enc, b_dec, gain)
    else:
        rows, *packed = call(_ops.prepare_encoder, W_enc, b_enc, b_dec, gain)
    bias, codes, sums, bounds, groups = packed
    own_gain = None if gain is None else gain.detach().clone()
    return PreparedEncoder(rows, bias, codes, sums, bounds, groups, own_gain, has_b_dec=b_dec is not None)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    prepared: PreparedEncoder | None = None,
) -> SparseActs:
    """Exact k largest pre-activations of each token, then relu: the encoder of a TopK SAE.

    Equivalent to `((x - b_dec) @ W_enc + b_enc).topk(k)` followed by relu in exact arithmetic, without the [N, F] array.

    Args:
        x: activations [..., d], any leading shape, may be empty.
        W_enc, b_enc, b_dec: encoder weights [d, F], [F], [d].
        k: 0 to F.
        prepared: the same weights, prepared; saves packing them in this call.

    Returns:
        SparseActs with values and indices [..., k], sorted by descending value (before relu), ties by lower index.
        Differentiable in x, W_enc, b_enc and b_dec through the values that pass relu.

    Raises:
        TypeError, ValueError, RuntimeError: one line naming the argument, the rule and the value given.

    Cost: N F d multiply-adds, in 8 bits with AVX-512 VNNI, in 16 bits on other AVX2 processors (in float16 on CUDA), plus
    d float64 ones for each candidate they leave; elsewhere N F d in float64. Equal latents count once, all-zero latents
    not at all. Memory beyond inputs and outputs: the packed weights unless prepared (kept for the backward pass when x
    requires a gradient). On the CPU each thread needs at most 256 (2 d + 4096 * 12) bytes for tokens and candidates (13 MB,
    usually under 4; more for k above 1024), plus their exact sums. CUDA needs 32 MB for scores, the same again for tokens
    that take the exact path, and 2 d + 24 K bytes for each of at most 4096 tokens at a time; for k above 512 twice as much
    for scores and tokens. On CUDA nothing waits for the device, and only `prepare_encoder` checks for NaN.
    """
    _check_encode("topk_encode", x, W_enc, b_enc, b_dec, prepared)
    if type(k) is not int and (isinstance(k, bool) or not isinstance(k, INTEGERS)):
        raise TypeError(f"k: must be an int, got {type(k).__name__}")
    if not 0 <= k <= W_enc.shape[1]:
        raise InputError(f"k: must be from 0 to {W_enc.shape[1]} (latents), got {k}")
    packed = _packed(x, W_enc, b_enc, b_dec, prepared)
    values, indices = call(_ops.topk_encode, flat_rows(x), W_enc, b_enc, b_dec, k, *packed)
    return _fixed(values, indices, x, W_enc)


def _fixed(values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor) -> SparseActs:
    """SparseActs from the values and indices [N, k] that the ops return for x [..., d]; nothing needs checking."""
    if x.ndim != 2:
        shape = (*x.shape[:-1], values.shape[1])
        values, indices = values.reshape(shape), indices.reshape(shape)
    return SparseActs(values, indices, W_enc.shape[1])


def _packed(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, prepared: PreparedEncoder | None
) -> tuple[Tensor | None, ...]:
    """The packed weights of a call. If x requires a gradient, pack them here, because the backward pass reads them too."""
    if prepared is not None:
        return prepared.packed
    shared = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not shared or x.shape[:-1].numel() < MIN_TOKENS_TO_PACK:
        return _NOT_PACKED
    return prepare_encoder(W_enc, b_enc, b_dec=b_dec).packed


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    b_dec: Tensor | None = None,
    prepared: PreparedEncoder | None = None,
    capacity: int | None = None,
) -> SparseActs:
    """Exact pre-activations strictly above a threshold, then relu: JumpReLU, BatchTopK at inference, ReLU (threshold 0).

    Args:
        x: activations [..., d], any leading shape, may be empty.
        W_enc, b_enc, b_dec: encoder weights [d, F], [F], [d].
        threshold: a number, or a tensor [] or [F] of the dtype of x; compared with the rounded pre-activation.
        prepared: the same weights, prepared; saves packing them in this call.
        capacity: None, or the number of latents that each token has room for, 0 to F. Then the shapes of the result do
            not depend on the data, and on CUDA nothing waits for the device: for CUDA graphs, torch.compile, vmap, serving.

    Returns:
        Ragged SparseActs, latents ascending. With a capacity: fixed SparseActs [..., capacity] of the same entries, latents
        ascending, the places left over with value 0 and latent 0. `acts.found` [...] says how many latents a token has. If
        they are more than the capacity, the first are stored and `acts.overflowed` is True there.
        NaN pre-activations are kept: a dense JumpReLU would make the token NaN, and dropping them would hide that. With a
        negative threshold, relu leaves stored zeros. Differentiable in x, W_enc, b_enc and b_dec, but not in the threshold
        (a step function; training needs an estimator).

    Raises:
        TypeError, ValueError, RuntimeError: one line naming the argument, the rule and the value given.

    Cost and memory: as for topk_encode, plus the kept entries once more. On CUDA, without a capacity, the call waits for
    the device once, to learn the number of kept entries. Its pool has room for 1024 kept latents per token (8 KB in
    float32), shared by all tokens. A token that no longer fits, or has more than 2048 candidates, takes the exact path: all
    pre-activations in float64, eight tokens at a time. With a capacity there is no pool, and NaN in a threshold that is a
    CUDA tensor is not refused: nobody looks, and the latents of such thresholds are kept.
    """
    _check_encode("threshold_encode", x, W_enc, b_enc, b_dec, prepared)
    threshold = _checked_threshold(threshold, x, W_enc)
    packed = _packed(x, W_enc, b_enc, b_dec, prepared)
    if capacity is not None:
        check_capacity(capacity, W_enc.shape[1])
        results = call(_ops.threshold_encode_fixed, flat_rows(x), W_enc, b_enc, b_dec, threshold, capacity, *packed)
        values, indices, found = (each.reshape(*x.shape[:-1], *each.shape[1:]) for each in results)
        return SparseActs(values, indices, W_enc.shape[1], found=found)
    values, crow, col = call(_ops.threshold_encode, flat_rows(x), W_enc, b_enc, b_dec, threshold, *packed)
    return SparseActs(values, col, W_enc.shape[1], crow, tuple(x.shape[:-1]))


def _checked_threshold(threshold: Tensor | float, x: Tensor, W_enc: Tensor) -> Tensor:
    """The threshold as a tensor [] or [F] of the dtype of x, without gradient."""
    if isinstance(threshold, int | float) and not isinstance(threshold, bool):
        if math.isnan(threshold):
            raise InputError("threshold: must not contain NaN, got nan")
        threshold = torch.full((), threshold, dtype=x.dtype, device=x.device)  # in a CUDA graph too
    scalar = isinstance(threshold, Tensor) and threshold.ndim == 0
    check_tensor("threshold", threshold, () if scalar else (W_enc.shape[1],), W_enc)
    assert isinstance(threshold, Tensor)  # check_tensor
    return threshold.detach()


def try_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, prepared: PreparedEncoder
) -> tuple[SparseActs, Tensor]:
    """topk_encode for the tokens that screening helps, and the numbers [u] of the others (int64, ascending).

    For callers that also have a dense product, which is faster for those others: their rows here hold zeros. Arguments
    and errors: as `topk_encode` with a prepared encoder without b_dec. On CUDA no token is left undecided.
    """
    if not x.is_cpu:
        return topk_encode(x, W_enc, b_enc, k, prepared=prepared), x.new_empty(0, dtype=torch.int64)
    _check_encode("topk_encode", x, W_enc, b_enc, None, prepared)
    values, indices, undecided = call(_ops.try_topk_encode, flat_rows(x), W_enc, b_enc, None, k, *prepared.packed)
    return _fixed(values, indices, x, W_enc), undecided


def try_threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, *, prepared: PreparedEncoder
) -> tuple[SparseActs, Tensor]:
    """threshold_encode for the tokens that screening helps, and the numbers [u] of the others (int64, ascending).

    As `try_topk_encode`, except that the rows of the others are empty.
    """
    if not x.is_cpu:
        acts = threshold_encode(x, W_enc, b_enc, threshold, prepared=prepared)
        return acts, x.new_empty(0, dtype=torch.int64)
    _check_encode("threshold_encode", x, W_enc, b_enc, None, prepared)
    threshold = _checked_threshold(threshold, x, W_enc)
    values, crow, col, undecided = call(
        _ops.try_threshold_encode, flat_rows(x), W_enc, b_enc, None, threshold, *prepared.packed
    )
    return SparseActs(values, col, W_enc.shape[1], crow, tuple(x.shape[:-1])), undecided


class ScreenIntervals(NamedTuple):
    """What screening knows about every pre-activation."""

    lower: Tensor  # [N, F] float32
    upper: Tensor  # [N, F] float32
    screened: Tensor  # [N] bool; False: the token takes the exact path and its intervals are meaningless


def screen_intervals(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, b_dec: Tensor | None = None, prepared: PreparedEncoder | None = None
) -> ScreenIntervals:
    """The certified interval of every pre-activation, before rounding to the output dtype.

    Used in tests, and to see how tight the bound is on given data: upper - lower is twice the bound. Arguments and errors:
    as topk_encode; x has shape [N, d]. Raises RuntimeError on a machine that cannot screen.

    Cost: N F d multiply-adds of codes, and 8 N F bytes.
    """
    _check_encode("screen_intervals", x, W_enc, b_enc, b_dec, prepared)
    prepared = prepare_encoder(W_enc, b_enc, b_dec=b_dec) if prepared is None else prepared
    return ScreenIntervals(*call(_ops.screen_intervals, flat_rows(x), W_enc, b_enc, b_dec, *prepared.packed))
