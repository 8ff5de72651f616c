"""Latents that need no work for every token (zero, equal, not finite), tokens of zeros, gains, and tokens left undecided.

Small whole numbers make every sum exact in any order, so the plain-torch reference decides to the bit, ties included.
"""

import pytest
import torch
from cases.places import EDITS, edited, whole
from hypothesis import given, settings
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops import reference
from darkmatter_ext.ops.encode import try_threshold_encode, try_topk_encode

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _same(mine, theirs):
    return torch.equal(mine.nan_to_num(nan=-77.0), theirs.nan_to_num(nan=-77.0))


def _assert_reference(x, W_enc, b_enc, *, k=7, threshold=3.0, b_dec=None, gain=None):
    """Both encoders, with packed weights and (where there is no gain) with weights packed in the call."""
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec, gain=gain)
    top = reference.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, gain=gain)
    above = reference.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, gain=gain)
    for packed in (prepared, None) if gain is None else (prepared,):
        found = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=packed)
        assert torch.equal(found.indices, top.indices)
        assert _same(found.values, top.values)
        found = dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, prepared=packed)
        assert torch.equal(found.crow_indices, above.crow_indices)
        assert torch.equal(found.col_indices, above.col_indices)
        assert _same(found.values, above.values)
    return prepared


@pytest.mark.runs
@pytest.mark.parametrize("kind", EDITS)
@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(6, 40),
    d=st.integers(32, 70),
    n_latents=st.integers(256, 500),
    k=st.integers(1, 30),
    seed=st.integers(0, 1000),
    centred=st.booleans(),
    per_latent=st.booleans(),
)
def test_edited_weights_give_the_reference(kind, dtype, n, d, n_latents, k, seed, centred, per_latent):
    x, W_enc = whole((n, d), seed).to(dtype), whole((d, n_latents), seed + 1, 1).to(dtype)
    b_enc, b_dec = whole((n_latents,), seed + 2).to(dtype), whole((d,), seed + 3, 1).to(dtype)
    edited(kind, x, W_enc, b_enc, torch.Generator().manual_seed(seed))
    threshold = whole((n_latents,), seed + 4).to(dtype) + 4 if per_latent else 3.0
    _assert_reference(x, W_enc, b_enc, k=k, threshold=threshold, b_dec=b_dec if centred else None)


@pytest.mark.parametrize("centred", [False, True])
def test_infinite_weights_meet_the_difference_not_a_folded_bias(centred):
    """float16 weights that overflowed: (x - b_dec) * Inf is an infinity, x * Inf - b_dec * Inf would be NaN."""
    x, W_enc = torch.ones(80, 40).half(), torch.zeros(40, 300).half()
    W_enc[0, 3], W_enc[1, 4] = torch.inf, -torch.inf
    b_dec = torch.full((40,), 0.5).half() if centred else None
    _assert_reference(x, W_enc, torch.zeros(300).half(), b_dec=b_dec)
    acts = dm.topk_encode(x, W_enc, torch.zeros(300).half(), 1, b_dec=b_dec)
    assert bool((acts.indices == 3).all())
    assert bool(acts.values.isposinf().all())


def test_dead_and_copied_latents_take_no_place():
    W_enc, b_enc = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)), torch.zeros(1000)
    W_enc[:, :400] = 0
    W_enc[:, 500:800] = W_enc[:, 500:501].clone()
    n_places, n_twins, n_constant, n_odd = dm.prepare_encoder(W_enc, b_enc).groups[:4].tolist()
    assert (n_places, n_twins, n_constant, n_odd) == (301, 299, 400, 0)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 30),
    d=st.integers(32, 90),
    n_latents=st.integers(256, 600),
    k=st.integers(1, 32),
    seed=st.integers(0, 1000),
    centred=st.booleans(),
)
def test_gains_multiply_the_rounded_pre_activation(dtype, n, d, n_latents, k, seed, centred):
    """As SAELens' rescale_acts_by_decoder_norm: hidden_pre * W_dec.norm(dim=-1), each rounded to the dtype."""
    g = torch.Generator().manual_seed(seed)
    x, W_enc = whole((n, d), seed).to(dtype), whole((d, n_latents), seed + 1, 1).to(dtype)
    b_enc, b_dec = whole((n_latents,), seed + 2).to(dtype), whole((d,), seed + 3, 1).to(dtype)
    gain = (torch.rand(n_latents, generator=g) * 3).to(dtype)
    gain[::5] = 1
    W_enc[:, 1::4], gain[1::8] = W_enc[:, 1:2].clone(), gain[1].clone()
    _assert_reference(x, W_enc, b_enc, k=k, b_dec=b_dec if centred else None, gain=gain)


def test_gains_reach_the_gradients():
    g = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randn(shape, generator=g).requires_grad_() for shape in ((70, 48), (48, 400), (400,)))
    gain = torch.rand(400, generator=g) + 0.5
    prepared, grads = dm.prepare_encoder(W_enc, b_enc, gain=gain), []
    for acts in (
        dm.topk_encode(x, W_enc, b_enc, 9, prepared=prepared),
        reference.topk_encode(x, W_enc, b_enc, 9, gain=gain),
    ):
        grads.append(torch.autograd.grad((acts.values * torch.arange(9)).sum(), (x, W_enc, b_enc)))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# Tokens that screening does not help


def _mixed(n=70, d=64, n_latents=4000):
    """Sparse tokens; the first three have most latents above 1."""
    g = torch.Generator().manual_seed(0)
    W_enc = torch.nn.functional.normalize(torch.randn(d, n_latents, generator=g), dim=0)
    W_enc[0] = W_enc[0].abs()
    x = 0.2 * torch.randn(n, d, generator=g)
    x[:3, 0] = 1000
    return x, W_enc, torch.zeros(n_latents)


def test_dense_tokens_are_left_undecided_and_the_others_are_not():
    x, W_enc, b_enc = _mixed()
    prepared = dm.prepare_encoder(W_enc, b_enc)
    acts, undecided = try_threshold_encode(x, W_enc, b_enc, 1.0, prepared=prepared)
    assert undecided.tolist() == [0, 1, 2]
    exact = dm.threshold_encode(x, W_enc, b_enc, 1.0, prepared=prepared)
    assert acts.crow_indices[3] == 0
    assert torch.equal(acts.values, exact.values[exact.crow_indices[3] :])
    assert torch.equal(acts.col_indices, exact.col_indices[exact.crow_indices[3] :])


def test_top_k_of_near_equal_latents_is_left_undecided():
    """Latents that differ by less than any bound, but differ: only exact sums of all can tell."""
    x, W_enc, b_enc = _mixed()
    W_enc[:, :3000] = W_enc[:, :1] + 1e-6 * torch.randn(64, 3000, generator=torch.Generator().manual_seed(1))
    x[10:20] = 5 * W_enc[:, 0]
    prepared = dm.prepare_encoder(W_enc, b_enc)
    acts, undecided = try_topk_encode(x, W_enc, b_enc, 8, prepared=prepared)
    exact = dm.topk_encode(x, W_enc, b_enc, 8, prepared=prepared)
    decided = torch.ones(len(x), dtype=torch.bool).index_fill(0, undecided, False)
    assert 0 < len(undecided) < len(x)
    assert torch.equal(acts.indices[decided], exact.indices[decided])
    assert torch.equal(acts.values[decided], exact.values[decided])


def test_where_nothing_screens_everything_is_left_undecided():
    x, W_enc, b_enc = torch.randn(5, 8), torch.randn(8, 30), torch.zeros(30)
    prepared = dm.prepare_encoder(W_enc, b_enc)
    assert not prepared.screens
    assert try_topk_encode(x, W_enc, b_enc, 3, prepared=prepared)[1].tolist() == list(range(5))
    acts, undecided = try_threshold_encode(x, W_enc, b_enc, 1.0, prepared=prepared)
    assert undecided.tolist() == list(range(5))
    assert acts.values.numel() == 0


def test_shared_rows_are_the_weights_themselves():
    rows = torch.randn(300, 40)
    prepared = dm.prepare_encoder(rows.mT, torch.zeros(300), share_rows=True)
    copied = dm.prepare_encoder(rows.mT, torch.zeros(300))
    assert prepared.weight.data_ptr() == rows.data_ptr() != copied.weight.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(prepared.packed[1:6], copied.packed[1:6], strict=True))


def test_groups_of_other_weights_are_refused():
    prepared = dm.prepare_encoder(torch.randn(40, 300), torch.zeros(300))
    groups = prepared.groups.clone()
    groups[5] = 5000  # the first place, after the head
    with pytest.raises(RuntimeError, match="groups: must hold latents from 0 to 299"):
        torch.ops.darkmatter.topk_encode(
            torch.randn(2, 40), torch.randn(40, 300), torch.zeros(300), None, 3, *prepared.packed[:5], groups
        )
