"""Threshold encode and find_support with a capacity: the entries of the ragged form in a shape that is known beforehand."""

import pytest
import torch
from cases.ops import DTYPES, encoder, gaussian

import darkmatter_ext as dm
from darkmatter_ext.ops import reference

D, F = 40, 300


def problem(dtype=torch.float32, n=7):
    """x [n, d], W_enc [d, F], b_enc [F], b_dec [d] and a threshold for each latent; one token keeps nothing, one has NaN."""
    W_enc, b_enc, b_dec = encoder(dtype, D, F)
    x = gaussian(n, D, seed=4, dtype=dtype)
    x[1], x[2, 3] = b_dec, float("nan")
    return (x, W_enc, b_enc), b_dec, gaussian(F, seed=9, dtype=dtype).abs() * 4 + 3


def same(acts, twin):
    """Values up to rounding, all else exactly."""
    assert torch.equal(acts.indices, twin.indices)
    assert torch.equal(acts.found, twin.found)
    assert torch.equal(acts.overflowed, twin.overflowed)
    torch.testing.assert_close(acts.values, twin.values, rtol=1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [0, 1, 40, F])
def test_threshold_is_that_of_the_twin(dtype, capacity):
    given, b_dec, threshold = problem(dtype)
    acts = dm.threshold_encode(*given, threshold, b_dec=b_dec, capacity=capacity)
    ragged = dm.threshold_encode(*given, threshold, b_dec=b_dec)
    assert torch.equal(acts.found, ragged.crow_indices.diff())
    if dtype in (torch.float32, torch.float64):  # a 16-bit value may be rounded across its threshold
        same(acts, reference.threshold_encode(*given, threshold, b_dec=b_dec, capacity=capacity))
    if capacity == F:
        dense = ragged.to_dense()
        torch.testing.assert_close(acts.to_dense(), dense, rtol=0, atol=0, equal_nan=True)
        assert not acts.overflowed.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [0, 1, 12, F])
def test_support_is_that_of_the_twin(dtype, capacity):
    acts = gaussian(2, 3, F, dtype=dtype)
    acts[acts.abs() < 2] = 0
    acts[0, 1], acts[1, 0, :4], acts[1, 1, 5] = 0.0, -0.0, float("nan")
    found = dm.find_support(acts, capacity=capacity)
    same(found, reference.find_support(acts, capacity=capacity))
    assert torch.equal(found.found, dm.find_support(acts).crow_indices.diff().reshape(2, 3))


def test_a_token_with_too_many_latents_is_told():
    """Its first latents are stored; the others' answers are whole."""
    (x, W_enc, b_enc), _, _ = problem()
    ragged = dm.threshold_encode(x, W_enc, b_enc, 6.0)
    lengths = ragged.crow_indices.diff()
    capacity = int(lengths.sort().values[4])
    acts = dm.threshold_encode(x, W_enc, b_enc, 6.0, capacity=capacity)
    assert acts.overflowed.tolist() == (lengths > capacity).tolist()
    assert 0 < acts.overflowed.sum() < len(x)
    for token, length in enumerate(lengths.tolist()):
        own = ragged.col_indices[ragged.crow_indices[token] :][: min(length, capacity)]
        assert acts.indices[token, : len(own)].tolist() == own.tolist()
        assert (acts.values[token, length:] == 0).all()


def test_decode_and_gradients_are_those_of_the_ragged_form():
    (x, W_enc, b_enc), b_dec, threshold = problem(torch.float64)
    x = torch.cat([x[:2], x[3:]]).reshape(2, 3, D)
    W_dec = gaussian(F, D, seed=7, dtype=torch.float64)
    variables = [each.requires_grad_() for each in (x, W_enc, b_enc, b_dec, W_dec)]

    def gradients(**options):
        acts = dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, **options)
        x_hat = dm.sparse_decode(acts, W_dec, b_dec)
        return x_hat, *torch.autograd.grad((x_hat - x).square().sum(), variables)

    for mine, ragged in zip(gradients(capacity=F), gradients(), strict=True):
        torch.testing.assert_close(mine, ragged, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_support_reaches_what_is_stored():
    acts = torch.tensor([[0.0, 2.0, -3.0, 4.0], [0.0, 0.0, 5.0, 0.0]], requires_grad=True)
    found = dm.find_support(acts, capacity=2)
    (gradient,) = torch.autograd.grad((found.values * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum(), acts)
    assert gradient.tolist() == [[0, 1, 10, 0], [0, 0, 100, 0]]


def test_vmap():
    (x, W_enc, b_enc), _, threshold = problem(n=6)
    given = W_enc, b_enc, None, threshold, 20, *(None,) * 7
    batched = torch.vmap(lambda own: torch.ops.darkmatter.threshold_encode_fixed(own, *given))(x.view(2, 3, D))
    for mine, flat in zip(batched, torch.ops.darkmatter.threshold_encode_fixed(x, *given), strict=True):
        assert torch.equal(mine.flatten(0, 1).nan_to_num(), flat.nan_to_num())


@pytest.mark.slow
def test_compiles_into_one_graph():
    """No size depends on the data."""
    (x, W_enc, b_enc), _, threshold = problem()
    W_dec = W_enc.mT.contiguous()

    def reconstruct(x):
        acts = dm.threshold_encode(x * 2, W_enc, b_enc, threshold, capacity=30)
        return dm.sparse_decode(acts, W_dec) + 1, acts.overflowed

    for mine, plain in zip(torch.compile(reconstruct, fullgraph=True)(x), reconstruct(x), strict=True):
        torch.testing.assert_close(mine, plain, equal_nan=True)


def test_what_is_not_of_a_call_with_a_capacity_has_no_overflow():
    (x, W_enc, b_enc), _, _ = problem()
    acts = dm.topk_encode(x.reshape(7, 1, D), W_enc, b_enc, 3)
    assert acts.found is None
    assert acts.overflowed.tolist() == [[False]] * 7
    assert dm.threshold_encode(x, W_enc, b_enc, 3.0).overflowed.tolist() == [False] * 7


def test_a_copy_keeps_what_was_found():
    (x, W_enc, b_enc), _, _ = problem()
    acts = dm.threshold_encode(x, W_enc, b_enc, 9.0, capacity=4)
    for copy in (acts.to("cpu"), acts.detach(), acts.scaled(torch.ones(F))):
        assert torch.equal(copy.overflowed, acts.overflowed)


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        (F + 1, ValueError, f"capacity: must be from 0 to {F} (latents), got {F + 1}"),
        (-1, ValueError, f"capacity: must be from 0 to {F} (latents), got -1"),
        (2.0, TypeError, "capacity: must be an int or None, got float"),
        (True, TypeError, "capacity: must be an int or None, got bool"),
    ],
)
def test_capacities_that_are_refused(capacity, error, message):
    (x, W_enc, b_enc), _, _ = problem()
    for refused in (
        lambda: dm.threshold_encode(x, W_enc, b_enc, 1.0, capacity=capacity),
        lambda: dm.find_support(torch.zeros(2, F), capacity=capacity),
    ):
        with pytest.raises(error) as raised:
            refused()
        assert str(raised.value) == message


def test_the_ops_themselves_refuse_a_capacity():
    with pytest.raises(RuntimeError, match=r"^capacity: must be from 0 to 4 \(latents\), got 5"):
        torch.ops.darkmatter.find_support_fixed(torch.zeros(2, 4), 5)


def test_a_threshold_that_is_nan_is_refused():
    (x, W_enc, b_enc), _, threshold = problem()
    with pytest.raises(ValueError, match=r"^threshold: must not contain NaN, got nan$"):
        dm.threshold_encode(x, W_enc, b_enc, float("nan"), capacity=4)
    threshold[3] = float("nan")
    with pytest.raises(ValueError, match=r"^threshold: must not contain NaN"):
        dm.threshold_encode(x, W_enc, b_enc, threshold, capacity=4)
