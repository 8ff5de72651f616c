"""Answers computed by hand, and the promise that threads, blocking and instruction sets do not change a bit."""

import math

import pytest
import torch
from cases.children import run_python
from cases.golden import digests

import darkmatter_ext as dm

NAN, INF = math.nan, math.inf


def test_topk_by_hand():
    # h = (x - b_dec) W_enc + b_enc with x - b_dec = (1, 2): columns give 1 + 0.5, 2, 3, -3
    W_enc = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -2.0]])
    acts = dm.topk_encode(
        torch.tensor([[2.0, 1.0]]), W_enc, torch.tensor([0.5, 0.0, 0.0, 0.0]), 4, b_dec=torch.tensor([1.0, -1.0])
    )
    assert acts.indices.tolist() == [[2, 1, 0, 3]]
    assert acts.values.tolist() == [[3.0, 2.0, 1.5, 0.0]]


def test_ties_go_to_the_lower_index_and_negatives_keep_their_order():
    W_enc = torch.tensor([[1.0, 3.0, 1.0, 3.0, -1.0, -2.0, -1.0]])
    acts = dm.topk_encode(torch.ones(1), W_enc, torch.zeros(7), 7)
    assert acts.indices.tolist() == [1, 3, 0, 2, 4, 6, 5]
    assert acts.values.tolist() == [3.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_zeros_of_both_signs_tie():
    acts = dm.topk_encode(torch.ones(1), torch.tensor([[-0.0, 0.0, -0.0]]), torch.tensor([-0.0, 0.0, -0.0]), 3)
    assert acts.indices.tolist() == [0, 1, 2]
    assert not torch.signbit(acts.values).any()


def test_bias_is_folded_in_float64():
    """x and b_dec near 1e8: their float32 difference is exact here, but x W alone would lose everything in float32."""
    x, b_dec = torch.tensor([1e8 + 8.0, 3.0]), torch.tensor([1e8, 1.0])
    acts = dm.topk_encode(x, torch.tensor([[1.0], [0.5]]), torch.zeros(1), 1, b_dec=b_dec)
    assert acts.values.tolist() == [9.0]


def test_rounded_once():
    """1 + 2^-24 + 2^-24: in float32 each addition is lost, in float64 the sum rounds to the next float32."""
    x = torch.tensor([1.0, 2.0**-24, 2.0**-24])
    acts = dm.topk_encode(x, torch.ones(3, 1), torch.zeros(1), 1)
    assert acts.values.item() == 1.0 + 2.0**-23
    assert dm.sparse_decode(dm.SparseActs.fixed(x, torch.arange(3), 3), torch.ones(3, 1)).item() == 1.0 + 2.0**-23


def test_selection_is_of_the_rounded_values():
    """Two sums that differ in float64 but not in bfloat16 tie, and the lower index wins."""
    W_enc = torch.tensor([[1.0, 1.0], [0.0, 2.0**-12]], dtype=torch.bfloat16)
    acts = dm.topk_encode(torch.ones(2, dtype=torch.bfloat16), W_enc, torch.zeros(2, dtype=torch.bfloat16), 1)
    assert acts.indices.tolist() == [0]


def test_threshold_is_strict_and_keeps_nan():
    x = torch.tensor([[1.0], [NAN], [2.0]])
    acts = dm.threshold_encode(x, torch.tensor([[1.0, 0.5, -1.0]]), torch.zeros(3), torch.tensor([1.0, 0.25, -5.0]))
    assert acts.crow_indices.tolist() == [0, 2, 5, 8]
    assert acts.col_indices.tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    assert acts.values[:2].tolist() == [0.5, 0.0]  # relu of -1, above its threshold of -5
    assert acts.values[2:5].isnan().all()
    assert acts.values[5:].tolist() == [2.0, 1.0, 0.0]


def test_nan_is_the_largest():
    # x = (1, NaN): W_enc rows (d) by latents; latent 1 and 3 do not read the NaN coordinate, but 0 * NaN is NaN
    x = torch.tensor([[1.0, NAN], [1.0, INF]])
    W_enc = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    acts = dm.topk_encode(x, W_enc, torch.zeros(3), 3)
    assert acts.indices[0].tolist() == [0, 1, 2]
    assert acts.values[0].isnan().all()
    assert acts.indices[1].tolist() == [0, 1, 2]  # 0 * Inf is NaN, then +Inf, then -Inf
    assert acts.values[1, 0].isnan()
    assert acts.values[1, 1:].tolist() == [INF, 0.0]


def test_infinite_weights_follow_ieee():
    acts = dm.topk_encode(torch.ones(1, 1), torch.tensor([[INF, 1.0, -INF]]), torch.zeros(3), 2)
    assert acts.values.tolist() == [[INF, 1.0]]
    assert acts.indices.tolist() == [[0, 1]]


def test_decode_by_hand():
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    acts = dm.SparseActs.ragged(
        torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([3.0, 0.5, -1.0]), 3, (3,)
    )
    assert dm.sparse_decode(acts, W_dec, torch.tensor([10.0, 20.0])).tolist() == [
        [14.0, 21.0],
        [10.0, 20.0],
        [10.0, 19.0],
    ]


def test_decode_reads_no_row_for_a_stored_zero():
    """A latent that relu set to zero is inactive, whatever its row of W_dec holds; an active one passes NaN on."""
    W_dec = torch.tensor([[1.0], [NAN]])
    acts = dm.SparseActs.fixed(torch.tensor([[2.0, 0.0]]), torch.tensor([[0, 1]]), 2)
    assert dm.sparse_decode(acts, W_dec).tolist() == [[2.0]]
    acts = dm.SparseActs.fixed(torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 1]]), 2)
    assert dm.sparse_decode(acts, W_dec).isnan().all()


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 0, 3)])
def test_leading_shapes(shape):
    x, W_enc, b_enc = torch.randn(*shape, 3), torch.randn(3, 5), torch.randn(5)
    acts = dm.topk_encode(x, W_enc, b_enc, 2)
    assert acts.values.shape == acts.indices.shape == (*shape, 2)
    assert acts.indices.dtype == torch.int64
    ragged = dm.threshold_encode(x, W_enc, b_enc, 0.0)
    assert ragged.shape == acts.shape == (*shape, 5)
    for active in (acts, ragged):
        assert dm.sparse_decode(active, torch.randn(5, 3)).shape == (*shape, 3)
        assert active.to_dense().shape == (*shape, 5)
        assert active.l0().shape == shape


def test_k_of_zero_decodes_to_the_bias():
    acts = dm.topk_encode(torch.randn(2, 3), torch.randn(3, 5), torch.randn(5), 0)
    assert acts.values.shape == (2, 0)
    assert dm.sparse_decode(acts, torch.randn(5, 3), torch.ones(3)).tolist() == [[1.0] * 3] * 2


def test_prepared_gives_the_same_and_knows_what_it_is_of():
    x, W_enc, b_enc, b_dec = torch.randn(9, 16), torch.randn(16, 40), torch.randn(40), torch.randn(16)
    prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    plain = dm.topk_encode(x, W_enc, b_enc, 6, b_dec=b_dec)
    packed = dm.topk_encode(x, W_enc, b_enc, 6, b_dec=b_dec, prepared=prepared)
    assert torch.equal(plain.values, packed.values)
    assert torch.equal(plain.indices, packed.indices)
    assert repr(prepared) == "PreparedEncoder(d_in=16, d_sae=40, dtype=torch.float32, device=cpu)"
    W_enc[:] = 0  # a copy: later edits of the weights do not reach it
    assert torch.equal(dm.topk_encode(x, W_enc, b_enc, 6, b_dec=b_dec, prepared=prepared).values, packed.values)


def test_identical_for_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(digests())
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8"])
def test_identical_for_every_instruction_set(isa):
    run = run_python("from cases.golden import digests; print(digests())", check=False, DARKMATTER_CPU_ISA=isa)
    if "DARKMATTER_CPU_ISA: must be supported" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(digests())
