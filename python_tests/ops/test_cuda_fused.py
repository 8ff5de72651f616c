"""The fused filter of Hopper, run on the CPU by the emulator, against the CPU ops: equal to the bit, by the screen where
latents are left out of it (cases/screened.py)."""

import math

import pytest
import torch
from cases import emulated
from cases.screened import Screened, check_tokens_of_all_scales

pytestmark = pytest.mark.slow  # emulated thread by thread

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def hopper(emulated_library, monkeypatch):
    """The emulated device is of compute capability 9.0."""
    monkeypatch.delenv("DARKMATTER_CUDA_FUSED", raising=False)
    emulated_library.darkmatter_emulated_capability(90)
    yield emulated_library
    emulated_library.darkmatter_emulated_capability(80)


@pytest.fixture
def fused(hopper, monkeypatch):
    """The emulated ops take the fused filter, which must have run; afterwards two multiprocessors and one order."""
    monkeypatch.setenv("DARKMATTER_CUDA_FUSED", "1")  # of few tokens too
    before = hopper.darkmatter_emulated_cluster_launches()
    yield hopper
    assert hopper.darkmatter_emulated_cluster_launches() > before
    hopper.darkmatter_emulated_multiprocessors(2)
    emulated.set_seed(1)


def gaussian(n, d, n_latents, dtype=torch.float32, *, centred=True, seed=0):
    """x [n, d], W_enc [d, F], b_enc [F], b_dec [d]."""
    torch.manual_seed(seed)
    parts = torch.randn(n, d), torch.randn(d, n_latents), torch.randn(n_latents), torch.randn(d)
    x, W_enc, b_enc, b_dec = (part.to(dtype) for part in parts)
    return x, W_enc, b_enc, b_dec if centred else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k", "centred"),
    [(21, 70, 9000, 40, False), (3, 40, 17000, 1, False), (5, 128, 8192, 300, True), (1, 33, 4224, 7, True)],
)
def test_encodes(fused, dtype, n, d, n_latents, k, centred):
    x, *weights = gaussian(n, d, n_latents, dtype, centred=centred)
    check_tokens_of_all_scales(x, weights, k, threshold=2.0 * d**0.5)


@pytest.mark.parametrize(("k", "n_latents"), [(513, 4300), (700, 8192), (1024, 17000)])
def test_long_lists(fused, k, n_latents):
    x, W_enc, b_enc, b_dec = gaussian(3, 64, n_latents)
    Screened(W_enc, b_enc, b_dec, left_out=slice(5, n_latents, 7)).check_topk(x, k)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_order_of_threads(fused, seed):
    """Several tiles of tokens, the last not whole; several clusters, which take turns."""
    emulated.set_seed(seed)
    fused.darkmatter_emulated_multiprocessors(2 * seed)
    x, *weights = gaussian(270, 64, 4500, torch.bfloat16)
    x[torch.arange(270) % 5 != 0] = 0  # zero tokens cost the emulator little
    screened = Screened(*weights, left_out=slice(0, 4500, 9))
    screened.check_topk(x, 12)
    screened.check_threshold(x, torch.tensor(18.0, dtype=torch.bfloat16))


def test_bands_of_tokens(fused):
    """More clusters of tokens than are side by side."""
    fused.darkmatter_emulated_multiprocessors(8)
    x, *weights = gaussian(2300, 64, 1300, centred=False)
    x[torch.arange(2300) % 61 != 0] = 0
    Screened(*weights, left_out=slice(0, 1300, 9)).check_threshold(x, torch.tensor(16.0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_dictionary_sorted_by_importance(fused, sign):
    """Every launch samples the whole dictionary, so that no list overflows: the exact path would show."""
    x, W_enc, b_enc, b_dec = gaussian(4, 64, 17000)
    W_enc *= torch.linspace(-3, 3, 17000).mul(sign).exp()
    Screened(W_enc, b_enc, b_dec, left_out=slice(3, 17000, 11)).check_topk(x, 64)


def test_more_hits_than_a_warp_has_room_for(fused):
    """Everything is let in: the warps look through their tiles many times, and still no list overflows."""
    x, *weights = gaussian(40, 64, 1400)
    screened = Screened(*weights, left_out=slice(100, 1400, 3))
    assert screened.check_threshold(x, torch.tensor(-1e6)) == 40 * len(screened.others)


def test_overflowing_lists_go_the_exact_way(fused):
    x, *weights = gaussian(3, 64, 8192)
    assert Screened(*weights).check_threshold(x, torch.tensor(-1e6)) == 3 * 8192
    ties = torch.full((64, 8192), 0.1), torch.zeros(8192), None
    Screened(*ties).check_topk(torch.ones(2, 64), 5)


def test_ties(fused):
    """Each latent eight times, among the tiles and within one; the lower latent first."""
    x, W_enc, b_enc, b_dec = gaussian(6, 48, 2304)
    W_enc, b_enc = W_enc.repeat(1, 4), b_enc.repeat(4)
    W_enc[:, 1::2], b_enc[1::2] = W_enc[:, ::2], b_enc[::2]
    screened = Screened(W_enc, b_enc, b_dec, left_out=slice(64, 9216, 128))
    screened.check_topk(x, 33)
    screened.check_threshold(x, torch.tensor(15.0))


def test_numbers_that_are_not_finite(fused):
    x, W_enc, b_enc, b_dec = gaussian(8, 64, 9000)
    x[1, 3], x[3, 0], x[5] = NAN, INF, 1e38
    b_enc[10], b_enc[7000], b_enc[8999] = INF, -INF, 3e38
    screened = Screened(W_enc, b_enc, b_dec)
    screened.check_topk(x, 9)
    screened.check_threshold(x, torch.tensor(20.0))
    thresholds = torch.full((9000,), 20.0)
    thresholds[3], thresholds[4], thresholds[8998] = INF, -INF, 3e38
    screened.check_threshold(x, thresholds)
    W_enc[5, 4000], W_enc[:, 8000] = INF, 0
    Screened(W_enc, b_enc, None).check_topk(x, 9)  # with a b_dec, CUDA folds Inf into the bias and gives NaN


@pytest.mark.parametrize(
    ("n", "asked", "capability", "taken"),
    [(257, None, 90, True), (256, None, 90, False), (2, "1", 90, True), (257, "0", 90, False), (257, "1", 89, False)],
)
def test_when_it_is_taken(hopper, monkeypatch, n, asked, capability, taken):
    if asked is not None:
        monkeypatch.setenv("DARKMATTER_CUDA_FUSED", asked)
    hopper.darkmatter_emulated_capability(capability)
    before = hopper.darkmatter_emulated_cluster_launches()
    x, *weights = gaussian(n, 40, 3000)
    x[2:] = 0  # which cost the emulator little
    Screened(*weights).check_topk(x, 5)
    assert (hopper.darkmatter_emulated_cluster_launches() > before) == taken


def test_codes_that_copies_cannot_take(hopper, monkeypatch):
    """The copies want rows at multiples of 16 bytes: others are screened without the fused filter."""
    monkeypatch.setenv("DARKMATTER_CUDA_FUSED", "1")
    x, *weights = gaussian(2, 40, 8192)
    screened = Screened(*weights)
    weight, bias, codes, *rest = screened.packed
    moved = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes).copy_(codes)
    screened.packed = weight, bias, moved, *rest
    before = hopper.darkmatter_emulated_cluster_launches()
    screened.check_topk(x, 5)
    assert hopper.darkmatter_emulated_cluster_launches() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choices_of_pursuit(fused, dtype):
    """The atom of the largest product, as float64 products say; tokens that rest get none."""
    torch.manual_seed(1)
    dictionary, residual = torch.randn(9000, 72).to(dtype), torch.randn(150, 72, dtype=torch.float64)
    residual[3] = dictionary[4321] * 1e-9
    packed = torch.ops.darkmatter_emulated.prepare_encoder(dictionary.mT, torch.zeros(9000, dtype=dtype), None)
    noise, done = 1e-12 * residual.norm(dim=1), (torch.arange(150) % 5 == 0).int()
    l0 = torch.full((150,), 2)
    choice = torch.ops.darkmatter_emulated.pursuit_choose(
        residual, dictionary, packed[2], packed[4], noise, l0, 1, done
    )
    expected = (residual @ dictionary.double().mT).argmax(1).masked_fill(done != 0, -1)
    assert torch.equal(choice, expected)
