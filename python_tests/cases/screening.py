"""Kinds of data that a screen's bound must survive, and the checks on them: screened and exact answers are the same."""

from __future__ import annotations

import dataclasses

import torch

import darkmatter_ext as dm
from darkmatter_ext.ops.encode import screen_intervals

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = (
    "gaussian", "heavy_tailed", "outlier_dimensions", "near_duplicates", "tied", "zero", "huge", "tiny", "denormal",
    "offset", "not_finite",
)  # fmt: skip


def without_codes(prepared):
    return dataclasses.replace(
        prepared, codes=prepared.codes[:0], sums=prepared.sums[:0], bounds=prepared.bounds[:, :0].contiguous()
    )


def make_data(kind, n, d, n_latents, dtype, seed):
    """x [n, d], W_enc [d, F], b_enc [F], b_dec [d] of one kind of difficulty, in float64 until the end."""
    g = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((n, d), (d, n_latents)))
    b_enc, b_dec = 0.1 * torch.randn(n_latents, generator=g).double(), torch.randn(d, generator=g).double()
    W /= d**0.5
    if kind == "heavy_tailed":
        x, W = x * torch.randn(x.shape, generator=g).double().exp() ** 2, W * torch.randn(W.shape, generator=g).exp()
    elif kind == "outlier_dimensions":
        x[:, :3] *= 300
    elif kind == "near_duplicates":
        half = n_latents // 2
        W[:, half : 2 * half] = W[:, :half] * (1 + 1e-7 * torch.randn(half, generator=g).double())
        b_enc[half : 2 * half] = b_enc[:half]
    elif kind == "tied":
        x, W, b_enc = x.round(), (W * d**0.5).round(), torch.zeros_like(b_enc)
        b_dec = b_dec.round()
    elif kind == "zero":
        x[::2], W[:, ::3], b_enc = b_dec, 0, torch.zeros_like(b_enc)
    elif kind in ("huge", "tiny", "denormal"):
        # as far as the dtype goes: products must not overflow it in general, or nothing but infinities is left
        limit = {torch.float16: 60.0, torch.bfloat16: 1e15, torch.float32: 1e15, torch.float64: 1e100}[dtype]
        scale = {"huge": limit, "tiny": 1 / limit, "denormal": torch.finfo(dtype).tiny / 8}[kind]
        x, b_dec, b_enc = x * scale, b_dec * scale, b_enc * scale
        W = W if kind == "denormal" else W * min(scale, 1e15)
    elif kind == "offset":
        x, b_dec = x + 1000, b_dec + 1000
    elif kind == "not_finite":
        x[0], x[1, 0], x[-1, -1] = torch.nan, torch.inf, -torch.inf
        W[0, 5], W[-1, 7], b_enc[9], b_enc[11] = torch.inf, -torch.inf, torch.inf, -torch.inf
    return [tensor.to(dtype) for tensor in (x, W, b_enc, b_dec)]


def _same(a, b):
    return torch.equal(a, b) or torch.equal(a.nan_to_num(nan=12.5), b.nan_to_num(nan=12.5))


def check_screened(kind, n, d, n_latents, k, dtype, seed, centred):
    x, W_enc, b_enc, b_dec = make_data(kind, n, d, n_latents, dtype, seed)
    b_dec = b_dec if centred else None
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    assert prepared.screens
    exact = without_codes(prepared)
    ours, theirs = (dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=p) for p in (prepared, exact))
    assert torch.equal(ours.indices, theirs.indices)
    assert _same(ours.values, theirs.values)
    spread = theirs.values[theirs.values.isfinite()]
    middle = spread.median() if spread.numel() else torch.zeros((), dtype=dtype)
    per_latent = middle * torch.rand(n_latents, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for threshold in (middle, per_latent):
        ours, theirs = (
            dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, prepared=p) for p in (prepared, exact)
        )
        assert torch.equal(ours.crow_indices, theirs.crow_indices)
        assert torch.equal(ours.col_indices, theirs.col_indices)
        assert _same(ours.values, theirs.values)


def count_violations(kind, dtype, n, d, n_latents, seed):
    """Pairs outside their certified interval, and pairs looked at."""
    x, W_enc, b_enc, b_dec = make_data(kind, n, d, n_latents, dtype, seed)
    found = screen_intervals(x, W_enc, b_enc, b_dec=b_dec)
    exact = (x.double() - b_dec.double()) @ W_enc.double() + b_enc.double()
    inside = (found.lower.double() <= exact) & (exact <= found.upper.double())
    known = found.screened[:, None] & exact.isfinite() & found.lower.isfinite()
    return int((known & ~inside).sum()), int(known.sum())
