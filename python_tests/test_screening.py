"""Certified screening gives the exact path's answer to the bit, whatever the data does to its bound.

The exact path is the same op with a PreparedEncoder that carries no screening codes; `reference.py` is checked elsewhere.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext import _C
from darkmatter_ext.ops import screen_intervals

pytestmark = pytest.mark.skipif(
    _C.cpu_isa() == "scalar",
    reason="the scalar instruction set has no integer dot products: nothing screens",
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = (
    "gaussian", "heavy_tailed", "outlier_dimensions", "near_duplicates", "tied", "zero", "huge", "tiny", "denormal",
    "offset", "not_finite",
)  # fmt: skip


def _without_codes(prepared):
    return dataclasses.replace(
        prepared, codes=prepared.codes[:0], sums=prepared.sums[:0], bounds=prepared.bounds[:, :0].contiguous()
    )


def _data(kind, n, d, n_latents, dtype, seed):
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


def _check(kind, n, d, n_latents, k, dtype, seed, centred):
    x, W_enc, b_enc, b_dec = _data(kind, n, d, n_latents, dtype, seed)
    b_dec = b_dec if centred else None
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    assert prepared.screens
    exact = _without_codes(prepared)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_exact_answer(kind, dtype):
    for seed, (n, d, n_latents, k) in enumerate([(21, 64, 700, 5), (9, 300, 2500, 32), (130, 40, 513, 17)]):
        _check(kind, n, d, n_latents, k, dtype, seed, centred=seed % 2 == 0)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(3, 20),
    d=st.integers(32, 200),
    n_latents=st.integers(256, 900),
    k=st.integers(1, 32),
    seed=st.integers(0, 10_000),
    centred=st.booleans(),
)
def test_any_shape_gives_the_exact_answer(kind, dtype, n, d, n_latents, k, seed, centred):
    _check(kind, n, d, n_latents, k, dtype, seed, centred)


def test_threads_do_not_change_the_answer():
    x, W_enc, b_enc, _ = _data("heavy_tailed", 200, 96, 3000, torch.float32, 0)
    prepared, threads = dm.prepare_encoder(W_enc, b_enc), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dm.topk_encode(x, W_enc, b_enc, 16, prepared=prepared))
            results.append(dm.topk_encode(x[:1], W_enc, b_enc, 16, prepared=prepared))
    finally:
        torch.set_num_threads(threads)
    for many, one in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(many.values, results[0].values)
        assert torch.equal(many.indices, results[0].indices)
        assert torch.equal(one.indices[0], results[0].indices[0])


def test_all_latents_alike_overflow_into_the_exact_path():
    """Equal latents: no bound can tell them apart, every token has more candidates than the buffer holds."""
    row = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    W_enc, b_enc = row.expand(64, 9000).contiguous(), torch.zeros(9000)
    acts = dm.topk_encode(torch.randn(5, 64), W_enc, b_enc, 8, prepared=dm.prepare_encoder(W_enc, b_enc))
    assert torch.equal(acts.indices, torch.arange(8).expand(5, 8))


@pytest.mark.parametrize("strong", ["few_all_sampled", "many_none_sampled", "ascending", "descending"])
def test_a_misleading_sample_costs_time_not_correctness(strong):
    """The first limit is guessed from every 16th panel of 48 latents: here that sample is as wrong as can be."""
    n_latents, k = 48 * 22 * 16, 32
    x, W_enc, b_enc, _ = _data("gaussian", 40, 64, n_latents, torch.float32, 1)
    panel = torch.arange(n_latents) // 48
    if strong == "few_all_sampled":  # fewer than k, so that the k-th best lies far below the guess
        b_enc[torch.arange(20) + 48 * 16] += 100
    elif strong == "many_none_sampled":
        b_enc[panel % 16 != 0] += 100
    else:
        order = torch.arange(n_latents).float() * 0.01
        b_enc += order if strong == "ascending" else -order
    prepared = dm.prepare_encoder(W_enc, b_enc)
    ours = dm.topk_encode(x, W_enc, b_enc, k, prepared=prepared)
    theirs = dm.topk_encode(x, W_enc, b_enc, k, prepared=_without_codes(prepared))
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.values, theirs.values)


def _violations(kind, dtype, n, d, n_latents, seed):
    """Pairs outside their certified interval, and pairs looked at."""
    x, W_enc, b_enc, b_dec = _data(kind, n, d, n_latents, dtype, seed)
    found = screen_intervals(x, W_enc, b_enc, b_dec=b_dec)
    exact = (x.double() - b_dec.double()) @ W_enc.double() + b_enc.double()
    inside = (found.lower.double() <= exact) & (exact <= found.upper.double())
    known = found.screened[:, None] & exact.isfinite() & found.lower.isfinite()
    return int((known & ~inside).sum()), int(known.sum())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not_finite"])
def test_the_bound_holds(kind):
    for dtype in (torch.float32, torch.bfloat16):
        violations, pairs = _violations(kind, dtype, 24, 96, 600, seed=3)
        assert violations == 0
        assert pairs > 0 or kind in ("denormal", "zero", "tiny")


@pytest.mark.slow
def test_the_bound_holds_on_a_hundred_million_pairs():
    """About half a minute. The bound is rigorous: not one pair may lie outside."""
    total = 0
    shapes = [(512, 768, 8192), (256, 2304, 8192), (512, 576, 8192)]
    kinds = ("gaussian", "heavy_tailed", "outlier_dimensions", "near_duplicates", "offset")
    for seed in range(3):
        for kind in kinds:
            for shape in shapes:
                violations, pairs = _violations(kind, torch.float32, *shape, seed=seed)
                assert violations == 0, (kind, shape, seed)
                total += pairs
    assert total >= 100_000_000


def test_intervals_are_tight_enough_to_be_of_use():
    """In standard deviations of the scores of Gaussian data at d 768: 0.43 expected of 8 bits, 0.01 of 16."""
    x, W_enc, b_enc, _ = _data("gaussian", 64, 768, 2000, torch.float32, 0)
    found = screen_intervals(x, W_enc, b_enc)
    bound = (found.upper - found.lower).mean() / 2 / (x @ W_enc).std()
    low, high = (0.2, 0.6) if _C.cpu_isa() == "avx512_vnni" else (0.005, 0.015)
    assert low < bound < high
