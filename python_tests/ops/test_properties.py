"""The ops against their twins on random, tied, empty, strided and odd inputs of every dtype.

Two kinds of input. *Small integers*: every sum is exact in float64 in any order, so ops and twins must agree to the bit,
and ties are everywhere. *Gaussian*: two correct orders of summing may differ in the last bit, so top-k is compared by
meaning: no duplicates, values gathered by index, sorted, nothing larger left out.

Shapes: N tokens, d model dimension, F latents, k active latents a token.
"""

import math

import pytest
import torch
from cases.ops import DTYPES, TOLERANCE
from hypothesis import given
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops import reference

LEADING = st.sampled_from([(), (1,), (0,), (5,), (2, 3), (2, 0), (9,), (67,)])
SIZES = st.sampled_from([0, 1, 3, 8, 17, 33])
SPECIAL = (math.nan, math.inf, -math.inf)


@st.composite
def encoder_inputs(draw, special=False, dtypes=DTYPES):
    """x [..., d], W_enc [d, F], b_enc [F], b_dec [d] or None; small integers, at times strided, at times NaN or Inf in x."""
    dtype, d, n_latents = (
        draw(st.sampled_from(dtypes)),
        draw(SIZES.filter(bool)),
        draw(st.sampled_from([1, 2, 5, 24, 25, 61, 200])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([1, 4]))

    def integers(*shape):
        return torch.randint(-spread, spread + 1, shape, generator=generator).to(dtype)

    x = integers(*draw(LEADING), d)
    W_enc = integers(d, n_latents) if draw(st.booleans()) else integers(n_latents, d).mT
    if draw(st.booleans()) and x.ndim > 1:
        x = x.repeat_interleave(2, dim=0)[::2]
    for _ in range(draw(st.integers(1, 3)) if special and x.numel() else 0):
        place = tuple(draw(st.integers(0, size - 1)) for size in x.shape)
        x[place] = draw(st.sampled_from(SPECIAL))
    return x, W_enc, integers(n_latents), integers(d) if draw(st.booleans()) else None


def assert_same_acts(ours, twins):
    assert ours.shape == twins.shape
    assert torch.equal(ours.crow_indices, twins.crow_indices)
    assert torch.equal(ours.col_indices, twins.col_indices)
    torch.testing.assert_close(ours.values, twins.values, rtol=0, atol=0, equal_nan=True)


@given(encoder_inputs(), st.data())
def test_topk_equals_the_twin_on_integers(inputs, data):
    x, W_enc, b_enc, b_dec = inputs
    k = data.draw(st.integers(0, W_enc.shape[1]))
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec) if data.draw(st.booleans()) else None
    ours = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=prepared)
    assert ours.values.shape == (*x.shape[:-1], k)
    assert_same_acts(ours, reference.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec))


@given(encoder_inputs(), st.data())
def test_threshold_equals_the_twin_on_integers(inputs, data):
    x, W_enc, b_enc, b_dec = inputs
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec) if data.draw(st.booleans()) else None
    levels = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, math.inf, -math.inf])
    if data.draw(st.booleans()):
        threshold = data.draw(levels)
    else:
        threshold = torch.tensor(data.draw(st.lists(levels, min_size=W_enc.shape[1], max_size=W_enc.shape[1])))
        threshold = threshold.to(x.dtype)
    ours = dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, prepared=prepared)
    assert_same_acts(ours, reference.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec))


@given(encoder_inputs(special=True), st.data())
def test_nan_and_infinity_in_x_equal_the_twin(inputs, data):
    """NaN is the largest in top-k and is kept by a threshold: nothing odd is dropped in silence."""
    x, W_enc, b_enc, b_dec = inputs
    k = data.draw(st.integers(0, W_enc.shape[1]))
    ours = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
    assert_same_acts(ours, reference.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec))
    ours = dm.threshold_encode(x, W_enc, b_enc, 1.0, b_dec=b_dec)
    assert_same_acts(ours, reference.threshold_encode(x, W_enc, b_enc, 1.0, b_dec=b_dec))


@given(encoder_inputs(), st.booleans(), st.data())
def test_decode_equals_the_twin_on_integers(inputs, ragged, data):
    x, W_enc, b_enc, _ = inputs
    n_latents, d_out = W_enc.shape[1], data.draw(SIZES)
    if ragged:
        acts = dm.threshold_encode(x, W_enc, b_enc, 1.0)
    else:
        acts = dm.topk_encode(x, W_enc, b_enc, data.draw(st.integers(0, n_latents)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    W_dec = torch.randint(-3, 4, (n_latents, d_out), generator=generator).to(x.dtype)
    W_dec = W_dec.mT.contiguous().mT if data.draw(st.booleans()) else W_dec
    b_dec = torch.randint(-3, 4, (d_out,), generator=generator).to(x.dtype) if data.draw(st.booleans()) else None
    x_hat = dm.sparse_decode(acts, W_dec, b_dec)
    assert x_hat.shape == (*x.shape[:-1], d_out)
    assert torch.equal(x_hat, reference.sparse_decode(acts, W_dec, b_dec))


def gaussian_encoder(dtype, n, d, n_latents, heavy):
    generator = torch.Generator().manual_seed(d + n_latents)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if heavy:  # a few huge coordinates, as in a residual stream with attention sinks
        x = (x * torch.rand(n, d, generator=generator, dtype=torch.float64).pow(-1.5)).clamp(-1e3, 1e3)
    W_enc = torch.randn(d, n_latents, generator=generator, dtype=torch.float64) / d**0.5
    b_enc, b_dec = torch.randn(n_latents, generator=generator), torch.randn(d, generator=generator)
    return tuple(tensor.to(dtype) for tensor in (x, W_enc, b_enc, b_dec))


@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy-tails"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(70, 96, 700, 32), (3, 257, 1500, 64), (1, 40, 3000, 5)])
def test_topk_by_meaning(dtype, heavy, n, d, n_latents, k):
    x, W_enc, b_enc, b_dec = gaussian_encoder(dtype, n, d, n_latents, heavy)
    acts = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
    h = reference.pre_activations(x, W_enc, b_enc, b_dec=b_dec)  # [n, F]
    # One rounding of h, and for the sums an error relative to what is summed, which b_dec folded in may exceed h.
    slack = TOLERANCE[dtype] * h.abs() + 1e-13 * (x.double().abs() @ W_enc.double().abs())
    kept = torch.zeros_like(h, dtype=torch.bool).scatter(-1, acts.indices, True)
    assert kept.sum(-1).eq(k).all(), "an index twice"
    error = (acts.values.double() - h.gather(-1, acts.indices).relu().double()).abs()
    assert (error <= slack.gather(-1, acts.indices)).all()
    assert (acts.values.diff(dim=-1) <= 0).all(), "not sorted"
    tied = acts.values.diff(dim=-1) == 0
    assert (acts.indices.diff(dim=-1)[tied & (acts.values[..., 1:] > 0)] > 0).all(), "ties not by index"
    worst_kept = h.gather(-1, acts.indices).amin(-1, keepdim=True)
    assert (h.masked_fill(kept, -math.inf) <= worst_kept + slack).all(), "something larger was left out"


@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy-tails"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_by_meaning(dtype, heavy):
    x, W_enc, b_enc, b_dec = gaussian_encoder(dtype, 70, 96, 700, heavy)
    threshold = torch.rand(700, generator=torch.Generator().manual_seed(0)).to(dtype)
    acts = dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec)
    h = reference.pre_activations(x, W_enc, b_enc, b_dec=b_dec)
    slack = TOLERANCE[dtype] * h.abs() + 1e-13 * (x.double().abs() @ W_enc.double().abs())
    dense = acts.to_dense().double()
    kept = dense > 0
    assert acts.l0().sum() == acts.values.numel() == kept.sum()
    assert ((dense - h.double()).abs() <= slack)[kept].all()
    sure = (h.double() - threshold.double()).abs() > slack
    assert (kept == (h > threshold))[sure].all()


def test_near_duplicate_latents_are_told_apart():
    """Columns that differ in the last bit of one weight: float32 accumulation mixes them up, float64 does not."""
    d, n_latents = 64, 300
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(d, generator=generator)
    W_enc = column[:, None].repeat(1, n_latents)
    place = torch.arange(n_latents)
    W_enc[place % d, place] *= 1 + 2.0**-20 * (1 + place / n_latents)
    x = torch.randn(20, d, generator=generator)
    b_enc = torch.zeros(n_latents)
    assert_same_acts(dm.topk_encode(x, W_enc, b_enc, 10), reference.topk_encode(x, W_enc, b_enc, 10))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e15])
def test_tiny_and_huge_float32(scale):
    """Denormal to large inputs: products leave the range of float32, their float64 sums do not."""
    x, W_enc, b_enc, _ = gaussian_encoder(torch.float32, 20, 48, 300, False)
    x, b_enc = x * scale, b_enc * 0
    assert_same_acts(dm.topk_encode(x, W_enc, b_enc, 12), reference.topk_encode(x, W_enc, b_enc, 12))
    acts = dm.topk_encode(x * 1e20, W_enc * 1e15, b_enc, 12)  # overflow to infinity is rounded as torch rounds it
    assert_same_acts(acts, reference.topk_encode(x * 1e20, W_enc * 1e15, b_enc, 12))


def test_overflow_of_the_output_type_is_infinity():
    x = torch.full((1, 4), 1e30)
    acts = dm.topk_encode(x, torch.full((4, 2), 1e30) * torch.tensor([1.0, -1.0]), torch.zeros(2), 2)
    assert acts.values.tolist() == [[math.inf, 0.0]]


@pytest.mark.parametrize("module", [dm, reference])
def test_no_model_dimensions(module):
    """d of 0: the pre-activations are the biases."""
    x, W_enc, b_enc = torch.ones(2, 0), torch.ones(0, 3), torch.tensor([1.0, 3.0, 2.0])
    assert module.topk_encode(x, W_enc, b_enc, 2).indices.tolist() == [[1, 2]] * 2
    assert module.threshold_encode(x, W_enc, b_enc, 1.0).col_indices.tolist() == [1, 2] * 2
