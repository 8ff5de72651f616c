"""Inputs that are screened, and the worst of them: shared by the emulated and the real CUDA tests."""

from __future__ import annotations

import math

import torch

from darkmatter_ext.ops import _registrations  # noqa: F401  (defines torch.ops.darkmatter)

SCREENED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INF, NAN = math.inf, math.nan
NOT_PACKED = (None,) * len(torch.ops.darkmatter.prepare_encoder.default._schema.returns)


def same(mine, theirs):
    """Equal to the bit, NaN to NaN; tensors of any device."""
    mine, theirs = (value if isinstance(value, tuple) else (value,) for value in (mine, theirs))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu().nan_to_num(nan=12345.0), other.cpu().nan_to_num(nan=12345.0))


def gaussian(n=9, d=40, n_latents=1500, dtype=torch.float32, seed=0):
    """x [n, d], W_enc [d, F], b_enc [F], b_dec [d] of a size that is screened."""
    torch.manual_seed(seed)
    parts = torch.randn(n, d), torch.randn(d, n_latents), torch.randn(n_latents), torch.randn(d)
    return tuple(part.to(dtype) for part in parts)


def check_encoders(ops, x, W_enc, b_enc, b_dec=None, *, k=5, threshold=9.0, packed=True, device="cpu", fixed=True):
    """The encoders of `ops` on a device against the CPU's; CPU tensors in.

    fixed: with a capacity too, too few for some tokens. The CPU's own libraries have no such op: ops/_fixed_form.py.
    """
    threshold = torch.as_tensor(threshold).to(x.dtype)
    given = [None if part is None else part.to(device) for part in (x, W_enc, b_enc, b_dec)]
    parts = ops.prepare_encoder(*given[1:]) if packed else NOT_PACKED
    same(ops.topk_encode(*given, k, *parts), torch.ops.darkmatter.topk_encode(x, W_enc, b_enc, b_dec, k, *NOT_PACKED))
    same(
        ops.threshold_encode(*given, threshold.to(device), *parts),
        ragged := torch.ops.darkmatter.threshold_encode(x, W_enc, b_enc, b_dec, threshold, *NOT_PACKED),
    )
    if not fixed:
        return
    lengths = ragged[1].diff()
    capacity = int(lengths.double().quantile(0.7)) if len(lengths) else 0
    same(
        ops.threshold_encode_fixed(*given, threshold.to(device), capacity, *parts),
        torch.ops.darkmatter.threshold_encode_fixed(x, W_enc, b_enc, b_dec, threshold, capacity, *NOT_PACKED),
    )


def _ties():
    x, W_enc, b_enc, b_dec = gaussian()
    W_enc[:, 100:900] = W_enc[:, 7:8]  # 800 equal latents
    b_enc[100:900] = b_enc[7]
    return x, W_enc, b_enc, b_dec


def _near_duplicates():
    x, W_enc, b_enc, b_dec = gaussian(n_latents=2600)
    W_enc[:, :] = W_enc[:, :1] + 1e-7 * W_enc  # more candidates than a list holds: the exact path
    b_enc[:] = 0
    return x[:3], W_enc, b_enc, b_dec


def _odd_tokens():
    x, W_enc, b_enc, b_dec = gaussian()
    x[0], x[1], x[2], x[3, 4], x[4, 0] = 0.0, 1e30, 1e-30, NAN, INF
    x[5] *= 1e-20
    return x, W_enc, b_enc, b_dec


def _odd_latents():
    x, W_enc, b_enc, _ = gaussian()
    W_enc[:, 3], W_enc[:, 4], W_enc[:, 5], W_enc[0, 6] = 0.0, 1e25, 1e-25, INF
    b_enc[10:200], b_enc[7] = -INF, INF
    return x, W_enc, b_enc, None  # with a b_dec, CUDA folds Inf into the bias and gives NaN (README, Limits)


def _ascending():
    x, W_enc, b_enc, b_dec = gaussian(n_latents=4200)
    return x, W_enc * torch.linspace(0, 3, 4200), b_enc, b_dec


WORST = {f.__name__: f for f in (_ties, _near_duplicates, _odd_tokens, _odd_latents, _ascending)}


def worst(name, dtype):
    """x, W_enc, b_enc and b_dec or None of one of WORST."""
    return tuple(part if part is None else part.to(dtype) for part in WORST[name]())
