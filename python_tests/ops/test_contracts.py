"""More of what callers rely on: fakes, gradients of the public functions, compile and vmap of decode, odd weights, errors.

`test_ops` asks torch's own questions of every case; here are the promises of the public functions that those do not
reach. Shapes: N tokens, d model dimension, F latents, k active latents a token, z active latents in all.
"""

import math

import pytest
import torch
from cases.ops import CASES, DTYPES, F, K, encoder, gaussian
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import darkmatter_ext as dm
from darkmatter_ext.ops import reference
from darkmatter_ext.ops.acts import SparseActs

CASE_IDS = [case.id for case in CASES]


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)


# Fakes


@pytest.mark.runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results(case, dtype):
    arguments = case.make(dtype)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        fake_results = tuple_of(case.call()(*fakes))
    for fake, result in zip(fake_results, tuple_of(case.call()(*arguments)), strict=True):
        assert (fake.ndim, fake.dtype, fake.device) == (result.ndim, result.dtype, result.device)
        for axis, size in enumerate(fake.shape):
            assert not isinstance(size, int) or size == result.shape[axis]  # the others depend on the data
        assert fake.is_contiguous()
        assert result.is_contiguous()


# Gradients of the public functions, float64


def test_gradient_cases_have_no_near_ties():
    """A finite difference must not change which latents are selected, or it compares two different functions."""
    for case in CASES:
        if case.op not in ("topk_encode", "threshold_encode", "threshold_encode_fixed") or case.name == "gains":
            continue
        x, W_enc, b_enc, b_dec, selector = case.make(torch.float64)[:5]
        if not len(x):
            continue
        h = reference.pre_activations(x, W_enc, b_enc, b_dec=b_dec)
        assert h.abs().min() > 1e-4, case.id  # the kink of relu
        if isinstance(selector, torch.Tensor):
            assert (h - selector).abs().min() > 1e-4, case.id
        else:
            assert h.sort(-1).values.diff(dim=-1).min() > 1e-4, case.id


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_gradcheck_of_encode(kind, prepared):
    """Also with prepared=: the packed copy carries no gradient, W_enc, b_enc and b_dec of the call do."""
    W_enc, b_enc, b_dec = encoder(torch.float64)
    x = gaussian(2, 2, len(W_enc), seed=4, dtype=torch.float64)

    def encode(x, W_enc, b_enc, b_dec):
        extra = {"prepared": dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)} if prepared else {}
        if kind == "topk":
            return dm.topk_encode(x, W_enc, b_enc, K, b_dec=b_dec, **extra).values
        return dm.threshold_encode(x, W_enc, b_enc, 0.5, b_dec=b_dec, **extra).values

    variables = tuple(tensor.requires_grad_() for tensor in (x, W_enc, b_enc, b_dec))
    assert torch.autograd.gradcheck(encode, variables, atol=1e-8, rtol=1e-6)


def decode_acts(form, dtype=torch.float64):
    """Unsorted latents, one of them stored twice for a token, and a ragged token without any."""
    values = gaussian(6, seed=6, dtype=dtype)
    if form == "fixed":
        return SparseActs.fixed(values.reshape(2, 1, 3), torch.tensor([[[4, 0, 4]], [[2, 9, 1]]]), F)
    return SparseActs.ragged(torch.tensor([0, 4, 4, 6]), torch.tensor([4, 0, 4, 10, 2, 1]), values, F, (3,))


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_gradcheck_of_decode(form):
    acts = decode_acts(form)
    W_dec, b_dec = gaussian(F, 4, seed=7, dtype=torch.float64), gaussian(4, seed=8, dtype=torch.float64)

    def decode(values, W_dec, b_dec):
        if form == "fixed":
            again = SparseActs.fixed(values, acts.indices, F)
        else:
            again = SparseActs.ragged(acts.crow_indices, acts.col_indices, values, F, acts.batch_shape)
        return dm.sparse_decode(again, W_dec, b_dec)

    variables = tuple(tensor.requires_grad_() for tensor in (acts.values, W_dec, b_dec))
    assert torch.autograd.gradcheck(decode, variables, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", ["topk", "threshold"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_relu_stops_any_gradient_and_nan_latents_pass_it(kind, value):
    """As torch.relu does: an infinite gradient of a zero is not NaN, and a NaN latent does not look like a dead one."""

    def gradients(module, x, incoming):
        x = torch.tensor([[x]], requires_grad=True)
        W_enc, b_enc = torch.tensor([[2.0, -3.0]]), torch.zeros(2, requires_grad=True)
        if kind == "topk":
            acts = module.topk_encode(x, W_enc, b_enc, 2)
        else:
            acts = module.threshold_encode(x, W_enc, b_enc, -10.0)
        acts.values.backward(torch.tensor(incoming).reshape(acts.values.shape))
        return x.grad.tolist(), b_enc.grad.tolist()

    stopped = gradients(dm, 1.0, [1.0, value])  # latent 1 is -3, relu gives 0
    assert stopped == gradients(reference, 1.0, [1.0, value]) == ([[2.0]], [1.0, 0.0])
    passed = gradients(dm, math.nan, [1.0, 10.0])
    assert passed == gradients(reference, math.nan, [1.0, 10.0]) == ([[-28.0]], [1.0, 10.0])


# compile and vmap


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_compile_forward_and_backward(kind):
    def loss(x, W_enc, b_enc, b_dec, W_dec):
        if kind == "topk":
            acts = dm.topk_encode(x, W_enc, b_enc, K, b_dec=b_dec)
        else:
            acts = dm.threshold_encode(x, W_enc, b_enc, 0.5, b_dec=b_dec)
        return (dm.sparse_decode(acts, W_dec, b_dec) - x).square().sum()

    def inputs():
        W_enc, b_enc, b_dec = encoder(torch.float64)
        tensors = gaussian(3, 2, len(W_enc), dtype=torch.float64), W_enc, b_enc, b_dec, W_enc.mT.contiguous()
        return [tensor.requires_grad_() for tensor in tensors]

    eager, traced = inputs(), inputs()
    expected = loss(*eager)
    expected.backward()
    result = torch.compile(loss, backend="aot_eager", fullgraph=True)(*traced)
    result.backward()
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)
    for ours, other in zip(traced, eager, strict=True):
        assert other.grad.abs().sum() > 0
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("values_dim", "indices_dim"), [(0, 0), (0, None), (None, 0), (1, 2)])
def test_vmap_of_decode_equals_a_loop(values_dim, indices_dim):
    batch, n = 4, 3
    values = gaussian(batch, n, K, seed=1)
    indices = torch.randint(0, F, (batch, n, K), generator=torch.Generator().manual_seed(2))
    W_dec, b_dec = gaussian(F, 5, seed=3), gaussian(5, seed=4)

    def decode(values, indices):
        return dm.sparse_decode(SparseActs.fixed(values, indices, F), W_dec, b_dec)

    def given_as(tensor, dim):
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    mapped = torch.vmap(decode, in_dims=(values_dim, indices_dim))(
        given_as(values, values_dim), given_as(indices, indices_dim)
    )
    looped = [
        decode(values[0 if values_dim is None else b], indices[0 if indices_dim is None else b]) for b in range(batch)
    ]
    assert torch.equal(mapped, torch.stack(looped))


# Answers


def test_prepare_encoder_by_hand():
    W_enc = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weight, bias = torch.ops.darkmatter.prepare_encoder(
        W_enc, torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, -1.0])
    )[:2]
    assert weight.tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    assert bias.tolist() == [13.0, 23.0, 33.0]  # 10 - (1 - 4), and so on
    assert bias.dtype == torch.float64


def test_the_gradients_of_decode_by_hand():
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    fixed, crow, flat = torch.tensor([[2, 0], [1, 1]]), torch.tensor([0, 3, 4]), torch.tensor([2, 0, 1, 1])
    decoder_dot, decoder_outer = torch.ops.darkmatter.decoder_dot, torch.ops.darkmatter.decoder_outer
    assert decoder_dot(rows, fixed, None, W_dec).tolist() == [[6.0, 1.0], [-1.0, -1.0]]
    assert decoder_dot(rows, flat, crow, W_dec).tolist() == [6.0, 1.0, 2.0, -1.0]
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    outer = decoder_outer(values.reshape(2, 2), fixed, None, rows, 3)
    assert outer.tolist() == [[10.0, 20.0], [3300.0, -1100.0], [1.0, 2.0]]
    outer = decoder_outer(values, flat, crow, rows, 4)
    assert outer.tolist() == [[10.0, 20.0], [3100.0, -800.0], [1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_latents", [30, 400], ids=["small", "screened"])
def test_dead_and_disabled_latents(dtype, n_latents):
    """Zero columns with one bias tie, lower index first; -inf in b_enc is last in top-k and above no threshold."""
    x, W_enc = gaussian(6, 40, dtype=dtype), gaussian(40, n_latents, seed=1, dtype=dtype)
    b_enc = torch.full((n_latents,), 0.25, dtype=dtype)
    W_enc[:, ::2] = 0
    b_enc[1::4] = -math.inf
    prepared = dm.prepare_encoder(W_enc, b_enc)
    ours, twin = (
        dm.topk_encode(x, W_enc, b_enc, n_latents, prepared=prepared),
        reference.topk_encode(x, W_enc, b_enc, n_latents),
    )
    if dtype != torch.float64:  # whose live latents may swap places in the last bit
        assert torch.equal(ours.indices, twin.indices)
    for row in ours.indices:
        dead = row[row % 2 == 0]
        assert torch.equal(dead, torch.arange(0, n_latents, 2))
        last = row[-len(b_enc[1::4]) :]
        assert torch.equal(last, torch.arange(1, n_latents, 4))
    kept = dm.threshold_encode(x, W_enc, b_enc, -1e4, prepared=prepared)
    assert (kept.col_indices % 4 != 1).all()
    assert kept.values.numel() == len(x) * (n_latents - len(b_enc[1::4]))


@given(
    dtype=st.sampled_from(DTYPES[:3]),
    n=st.integers(1, 40),
    d=st.integers(1, 80),
    n_latents=st.integers(1, 400),
    centred=st.booleans(),
    prepared=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_gaussian_answers_are_the_twins_to_the_bit(dtype, n, d, n_latents, centred, prepared, seed, data):
    """One rounding to 32 bits or fewer hides the order of a float64 sum, save once in about 1e8 values."""
    k = data.draw(st.integers(0, n_latents))
    x, W_enc = gaussian(n, d, seed=seed, dtype=dtype), gaussian(d, n_latents, seed=seed + 1, dtype=dtype)
    b_enc, b_dec = gaussian(n_latents, seed=seed + 2, dtype=dtype), gaussian(d, seed=seed + 3, dtype=dtype)
    b_dec = b_dec if centred else None
    packed = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec) if prepared else None
    ours = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=packed)
    twin = reference.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
    assert torch.equal(ours.indices, twin.indices)
    assert torch.equal(ours.values, twin.values)
    ours = dm.threshold_encode(x, W_enc, b_enc, 0.5, b_dec=b_dec, prepared=packed)
    twin = reference.threshold_encode(x, W_enc, b_enc, 0.5, b_dec=b_dec)
    assert torch.equal(ours.crow_indices, twin.crow_indices)
    assert torch.equal(ours.col_indices, twin.col_indices)
    assert torch.equal(ours.values, twin.values)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=9), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_decode_of_unsorted_and_repeated_latents(lengths, dtype, seed):
    """Against a dense sum made here, entry by entry; small integers, so every order of summing is exact."""
    generator = torch.Generator().manual_seed(seed)
    z = sum(lengths)
    values, col = (torch.randint(low, 4, (z,), generator=generator) for low in (-3, 0))
    W_dec, b_dec = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((4, 9), (9,)))
    crow = torch.tensor([0, *lengths]).cumsum(0)
    acts = SparseActs.ragged(crow, col, values.to(dtype), 4, (len(lengths),))
    dense = torch.zeros(len(lengths), 4, dtype=torch.float64)
    for token in range(len(lengths)):
        for entry in range(crow[token], crow[token + 1]):
            dense[token, col[entry]] += values[entry]
    assert torch.equal(dm.sparse_decode(acts, W_dec), (dense @ W_dec.double()).to(dtype))
    assert torch.equal(dm.sparse_decode(acts, W_dec, b_dec), (dense @ W_dec.double() + b_dec.double()).to(dtype))
    if lengths and len(set(lengths)) == 1:
        fixed = SparseActs.fixed(values.to(dtype).reshape(len(lengths), -1), col.reshape(len(lengths), -1), 4)
        assert torch.equal(dm.sparse_decode(fixed, W_dec), dm.sparse_decode(acts, W_dec))


@pytest.mark.parametrize("n", [2048, 2049])
def test_tokens_on_both_sides_of_a_group_do_not_mix(n):
    """Candidates of 2048 tokens live at a time; the answer for a token is the one it has alone."""
    x, W_enc, b_enc = gaussian(n, 5), gaussian(5, 40, seed=1), gaussian(40, seed=2)
    acts, twin = dm.topk_encode(x, W_enc, b_enc, 3), reference.topk_encode(x, W_enc, b_enc, 3)
    assert torch.equal(acts.indices, twin.indices)
    assert torch.equal(acts.values, twin.values)
    assert torch.equal(dm.topk_encode(x[-1], W_enc, b_enc, 3).indices, acts.indices[-1])
