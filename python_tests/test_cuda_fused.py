"""The fused filter of Hopper, run on the CPU by the emulator, against the CPU ops: equal to the bit.

An encode that screening cannot help takes the exact path, which would hide a fused filter that loses candidates. So most
tests leave some latents out of the *screen* alone, by a bias of -inf among its bounds: the screened answer is the one
without them, and the exact path, which knows nothing of the screen, would let them in.
"""

import ctypes
import math

import emulated
import pytest
import torch

from darkmatter_ext import ops

INF, NAN = math.inf, math.nan
BIAS = 1  # of csrc/screening.h's BoundRow
NONE = (None,) * 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def library():
    """Memory that nobody wrote is NaN, so that reading it shows."""
    library = ctypes.CDLL(str(emulated.library()))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield library
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fused(library, monkeypatch):
    """torch.ops.darkmatter_emulated with the fused filter, which must have run; two multiprocessors, one order."""
    monkeypatch.setenv("DARKMATTER_CUDA_FUSED", "1")
    before = library.darkmatter_emulated_cluster_launches()
    yield torch.ops.darkmatter_emulated
    assert library.darkmatter_emulated_cluster_launches() > before
    library.darkmatter_emulated_multiprocessors(2)
    emulated.set_seed(1)


def gaussian(n, d, n_latents, dtype=torch.float32, *, centred=True, seed=0):
    """x [n, d], W_enc [d, F], b_enc [F], b_dec [d]."""
    torch.manual_seed(seed)
    parts = torch.randn(n, d), torch.randn(d, n_latents), torch.randn(n_latents), torch.randn(d)
    x, W_enc, b_enc, b_dec = (part.to(dtype) for part in parts)
    return x, W_enc, b_enc, b_dec if centred else None


def packed_without(cuda, W_enc, b_enc, b_dec, left_out):
    """What pack_encoder makes, with latents left out of the screen."""
    *parts, bounds = cuda.pack_encoder(W_enc, b_enc, b_dec)
    bounds[BIAS, left_out] = -INF
    return *parts, bounds


def others_of(n_latents, left_out):
    kept = torch.ones(n_latents, dtype=torch.bool)
    kept[left_out] = False
    return kept.nonzero().squeeze(1)


def check_topk(cuda, x, W_enc, b_enc, b_dec, k, left_out=slice(0, 0)):
    """Best k by the screen alone: the best k of the latents that are not left out of it."""
    others = others_of(W_enc.shape[1], left_out)
    values, indices = cuda.topk_encode(
        x, W_enc, b_enc, b_dec, k, *packed_without(cuda, W_enc, b_enc, b_dec, left_out)
    )
    expected, positions = ops._ops.topk_encode(x, W_enc[:, others], b_enc[others], b_dec, k, *NONE)
    assert torch.equal(indices, others[positions])
    assert torch.equal(values.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


def check_threshold(cuda, x, W_enc, b_enc, b_dec, threshold, left_out=slice(0, 0)):
    """Those above a threshold by the screen alone. Returns how many."""
    others = others_of(W_enc.shape[1], left_out)
    values, crow, col = cuda.threshold_encode(
        x, W_enc, b_enc, b_dec, threshold, *packed_without(cuda, W_enc, b_enc, b_dec, left_out)
    )
    own = threshold if threshold.dim() == 0 else threshold[others]
    expected = ops._ops.threshold_encode(x, W_enc[:, others], b_enc[others], b_dec, own, *NONE)
    assert torch.equal(crow, expected[1])
    assert torch.equal(col, others[expected[2]])
    assert torch.equal(values.nan_to_num(nan=12345.0), expected[0].nan_to_num(nan=12345.0))
    return values.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k", "centred"),
    [(9, 70, 9000, 40, True), (3, 40, 33000, 1, False), (5, 128, 8192, 300, True), (1, 33, 4224, 7, False)],
)
def test_encodes(fused, dtype, n, d, n_latents, k, centred):
    given = gaussian(n, d, n_latents, dtype, centred=centred)
    left_out = torch.arange(5, n_latents, 7)
    check_topk(fused, *given, k, left_out)
    threshold = torch.tensor(2.0 * d**0.5, dtype=dtype)
    assert check_threshold(fused, *given, threshold, left_out) > n
    check_threshold(fused, *given, (threshold * torch.rand(n_latents)).to(dtype) + threshold, left_out)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_order_of_threads(fused, library, seed):
    """Several tiles of tokens, the last not whole; several clusters, which take turns."""
    emulated.set_seed(seed)
    library.darkmatter_emulated_multiprocessors(2 * seed)
    given = gaussian(270, 64, 4500, torch.bfloat16)
    given[0][torch.arange(270) % 5 != 0] = 0  # zero tokens cost the emulator nothing
    check_topk(fused, *given, 12, slice(0, 4500, 9))
    check_threshold(fused, *given, torch.tensor(18.0, dtype=torch.bfloat16), slice(0, 4500, 9))


def test_bands_of_tokens(fused, library):
    """More clusters of tokens than are side by side."""
    library.darkmatter_emulated_multiprocessors(8)
    x, W_enc, b_enc, _ = gaussian(2300, 64, 1300)
    x[torch.arange(2300) % 61 != 0] = 0
    check_threshold(fused, x, W_enc, b_enc, None, torch.tensor(16.0), slice(0, 1300, 9))


@pytest.mark.parametrize("sign", [-1, 1])
def test_dictionary_sorted_by_importance(fused, sign):
    """Every launch samples the whole dictionary, so that no list overflows: the exact path would show."""
    x, W_enc, b_enc, b_dec = gaussian(4, 64, 33000)
    W_enc *= torch.linspace(-3, 3, 33000).mul(sign).exp()
    check_topk(fused, x, W_enc, b_enc, b_dec, 64, slice(3, 33000, 11))


def test_more_hits_than_a_warp_has_room_for(fused):
    """Everything is let in: the warps look through their tiles many times, and still no list overflows."""
    given = gaussian(40, 64, 1400)
    left_out = slice(100, 1400, 3)
    everything = torch.tensor(-1e6)
    n_kept = check_threshold(fused, *given, everything, left_out)
    assert n_kept == 40 * len(others_of(1400, left_out))


def test_overflowing_lists_go_the_exact_way(fused):
    x, W_enc, b_enc, b_dec = gaussian(3, 64, 8192)
    check_threshold(fused, x, W_enc, b_enc, b_dec, torch.tensor(-1e6))
    x, W_enc = torch.ones(2, 64), torch.full((64, 8192), 0.1)  # nothing but ties
    check_topk(fused, x, W_enc, torch.zeros(8192), None, 5)


def test_ties(fused):
    """Each latent four times, among the tiles and within one; the lower latent first."""
    x, W_enc, b_enc, b_dec = gaussian(6, 48, 2304)
    W_enc, b_enc = W_enc.repeat(1, 4), b_enc.repeat(4)
    W_enc[:, 1::2], b_enc[1::2] = W_enc[:, ::2], b_enc[::2]
    check_topk(fused, x, W_enc, b_enc, b_dec, 33, slice(64, 9216, 128))
    check_threshold(fused, x, W_enc, b_enc, b_dec, torch.tensor(15.0), slice(64, 9216, 128))


def test_numbers_that_are_not_finite(fused):
    x, W_enc, b_enc, b_dec = gaussian(8, 64, 9000)
    x[1, 3], x[3, 0], x[5] = NAN, INF, 1e38
    b_enc[10], b_enc[7000], b_enc[8999] = INF, -INF, 3e38
    check_topk(fused, x, W_enc, b_enc, None, 9)
    check_threshold(fused, x, W_enc, b_enc, b_dec, torch.tensor(20.0))
    W_enc[5, 4000], W_enc[:, 8000] = INF, 0
    check_topk(fused, x, W_enc, b_enc, None, 9)
    thresholds = torch.full((9000,), 20.0)
    thresholds[3], thresholds[4], thresholds[8998] = INF, -INF, 3e38
    check_threshold(fused, x, W_enc, b_enc, None, thresholds)


def test_off_unless_asked_for(library, monkeypatch):
    monkeypatch.delenv("DARKMATTER_CUDA_FUSED", raising=False)
    before = library.darkmatter_emulated_cluster_launches()
    check_topk(torch.ops.darkmatter_emulated, *gaussian(2, 40, 8192), 5)
    assert library.darkmatter_emulated_cluster_launches() == before


def test_codes_that_copies_cannot_take(library, monkeypatch):
    """The copies want rows at multiples of 16 bytes: others are screened without the fused filter."""
    monkeypatch.setenv("DARKMATTER_CUDA_FUSED", "1")
    cuda = torch.ops.darkmatter_emulated
    x, W_enc, b_enc, b_dec = gaussian(2, 40, 8192)
    weight, bias, codes, sums, bounds = cuda.pack_encoder(W_enc, b_enc, b_dec)
    moved = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes).copy_(codes)
    before = library.darkmatter_emulated_cluster_launches()
    values, _ = cuda.topk_encode(x, W_enc, b_enc, b_dec, 5, weight, bias, moved, sums, bounds)
    assert library.darkmatter_emulated_cluster_launches() == before
    assert torch.equal(values, ops._ops.topk_encode(x, W_enc, b_enc, b_dec, 5, *NONE)[0])
