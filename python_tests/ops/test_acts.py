"""SparseActs: two forms, one meaning."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import darkmatter_ext as dm
from darkmatter_ext.ops.acts import SparseActs


def fixed():
    return SparseActs.fixed(torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), torch.tensor([[[4, 0], [1, 2]]]), 5)


def ragged():
    return SparseActs.ragged(
        torch.tensor([0, 2, 2, 3]), torch.tensor([0, 4, 1]), torch.tensor([1.0, 3.0, 2.0]), 5, (3, 1)
    )


def test_fixed_form():
    acts = fixed()
    assert (acts.shape, acts.batch_shape, acts.n_tokens, acts.is_ragged) == ((1, 2, 5), (1, 2), 2, False)
    assert acts.crow_indices.tolist() == [0, 2, 4]
    assert acts.col_indices.tolist() == [4, 0, 1, 2]
    assert acts.token_numbers().tolist() == [0, 0, 1, 1]
    assert acts.to_dense().tolist() == [[[1.0, 0.0, 0.0, 0.0, 3.0], [0.0, 2.0, 0.0, 0.0, 0.0]]]
    assert acts.l0().tolist() == [[2, 1]]
    assert repr(acts) == "SparseActs(shape=[1, 2, 5], k=2, dtype=torch.float32, device=cpu)"


def test_ragged_form():
    acts = ragged()
    assert (acts.shape, acts.batch_shape, acts.n_tokens, acts.is_ragged) == ((3, 1, 5), (3, 1), 3, True)
    assert acts.to_dense().tolist() == [[[1.0, 0, 0, 0, 3.0]], [[0.0] * 5], [[0, 2.0, 0, 0, 0]]]
    assert acts.l0().tolist() == [[2], [0], [1]]
    assert repr(acts) == "SparseActs(shape=[3, 1, 5], nnz=3, dtype=torch.float32, device=cpu)"
    with pytest.raises(ValueError, match=r"^indices: ragged acts have col_indices and crow_indices"):
        _ = acts.indices


@given(
    st.sampled_from([(0,), (4,), (3, 5), (2, 0), (2, 3, 7)]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 1000),
)
def test_from_dense_and_back(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator).relu().to(dtype)
    acts = SparseActs.from_dense(dense)
    assert torch.equal(acts.to_dense(), dense)
    assert torch.equal(acts.l0(), (dense != 0).sum(-1))
    for token in range(acts.n_tokens):
        row = acts.col_indices[acts.crow_indices[token] : acts.crow_indices[token + 1]]
        assert (row.diff() > 0).all()


def test_nan_counts_as_active():
    acts = SparseActs.from_dense(torch.tensor([[0.0, math.nan, 1.0]]))
    assert acts.col_indices.tolist() == [1, 2]
    assert acts.l0().tolist() == [2]


def test_gradients_pass_through_dense_forms():
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    (SparseActs.from_dense(dense).to_dense() * torch.tensor([[5.0, 6.0], [7.0, 8.0]])).sum().backward()
    assert dense.grad.tolist() == [[0.0, 6.0], [7.0, 0.0]]
    values = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2], [1, 0]])
    assert torch.autograd.gradcheck(lambda v: SparseActs.fixed(v, indices, 3).to_dense(), values)


def test_a_latent_stored_twice_adds_up_as_in_decode():
    acts = SparseActs.fixed(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]), 3)
    assert acts.to_dense().tolist() == [[0.0, 3.0, 0.0]]
    assert dm.sparse_decode(acts, torch.eye(3)).tolist() == acts.to_dense().tolist()


def test_to_and_detach():
    acts = SparseActs.fixed(torch.ones(1, 2, requires_grad=True), torch.tensor([[0, 1]]), 3)
    assert acts.values.requires_grad
    assert not acts.detach().values.requires_grad
    for form in (acts, ragged()):
        moved = form.to("meta")
        assert moved.values.device.type == moved.col_indices.device.type == moved.crow_indices.device.type == "meta"
        assert moved.shape == form.shape


ERRORS = [
    (
        lambda: SparseActs.fixed(torch.ones(2, 3), torch.ones(2, 2).long(), 4),
        ValueError,
        "indices: must have the shape of values",
    ),
    (lambda: SparseActs.fixed(torch.ones(2), torch.ones(2), 4), TypeError, "indices: must be int64, got torch.float32"),
    (
        lambda: SparseActs.ragged(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(2), 4, (1,)),
        ValueError,
        "col_indices: must have the shape of values [2], got [1]",
    ),
    (
        lambda: SparseActs.ragged(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), 4, (2,)),
        ValueError,
        "crow_indices: must have shape [3] for batch [2], got [2]",
    ),
    (
        lambda: SparseActs.from_dense(torch.ones(3).long()),
        TypeError,
        "acts: must be a floating-point tensor, got torch.int64",
    ),
    (lambda: SparseActs.from_dense([1.0]), TypeError, "acts: must be a floating-point tensor, got list"),
    (lambda: SparseActs.from_dense(torch.tensor(1.0)), ValueError, "acts: must have shape [..., F], got a scalar"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 700), (3, 2, 129), (1, 0), (0, 40), (64,), (17, 4096)], ids=str)
def test_find_support_equals_the_plain_scan(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(shape, generator=generator).to(dtype)
    acts = acts.where(torch.rand(shape, generator=generator) < 0.02, torch.zeros((), dtype=dtype))
    flat = acts.view(-1)
    if flat.numel() > 40:
        flat[3], flat[-1], flat[7], flat[8] = torch.nan, 1.0, -0.0, torch.finfo(dtype).smallest_normal / 4
    ours, plain = dm.find_support(acts), SparseActs.from_dense(acts)
    assert torch.equal(ours.crow_indices, plain.crow_indices)
    assert torch.equal(ours.col_indices, plain.col_indices)
    assert torch.equal(ours.values.nan_to_num(nan=5.0), plain.values.nan_to_num(nan=5.0))
    assert ours.shape == tuple(shape)


def test_find_support_is_differentiable_and_names_bad_input():
    acts = torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    (dm.find_support(acts).values * torch.tensor([10.0, 20.0])).sum().backward()
    assert acts.grad.tolist() == [[0.0, 10.0], [20.0, 0.0]]
    with pytest.raises(TypeError, match=r"acts: must be float16, bfloat16, float32 or float64, got torch.int64"):
        dm.find_support(torch.ones(2, 2).long())
    with pytest.raises(TypeError, match=r"acts: must be a tensor of shape \[..., F\], got list"):
        dm.find_support([1.0])


def test_a_notebook_shows_the_first_tokens_and_their_strongest_latents():
    values, indices = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[7, 3, 0], [5, 1, 2]])
    fixed = dm.SparseActs.fixed(values, indices, 8)
    crow, columns = torch.tensor([0, 2, 3]), torch.tensor([7, 3, 5])
    ragged = dm.SparseActs.ragged(crow, columns, torch.tensor([0.5, 2.0, 1.0]), 8, (2,))
    for acts in (fixed, ragged):
        made = acts._repr_html_()
        assert "<td>0</td><td>2</td><td>3: 2, 7: 0.5</td>" in made
        assert "<td>1</td><td>1</td><td>5: 1</td>" in made
        assert repr(acts) in made
    assert "SparseActs(shape=[0, 8]" in dm.SparseActs.fixed(values[:0], indices[:0], 8)._repr_html_()
