"""The filters of chunks of scores, run on the CPU by the emulator, against the CPU ops: equal to the bit, by the screen
where latents are left out of it (cases/screened.py).
"""

import math

import pytest
import torch
from cases import emulated
from cases.encoders import NOT_PACKED, SCREENED_DTYPES, gaussian, same
from cases.screened import ROUNDING, SLACK, Screened, check_tokens_of_all_scales

pytestmark = pytest.mark.slow  # emulated thread by thread

INF, NAN = math.inf, math.nan
TILE, LIST, LONG_LIST = 1024, 2048, 4096  # latents of a tile, candidates of a list
SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def one_order(emulated_library, monkeypatch):
    """Without the fused filter; afterwards two multiprocessors and one order of threads."""
    monkeypatch.setenv("DARKMATTER_CUDA_FUSED", "0")
    yield
    emulated_library.darkmatter_emulated_multiprocessors(2)
    emulated_library.darkmatter_emulated_shared(0)
    emulated.set_seed(1)


def scores(*stretches):
    """Weights whose pre-activations of a first unit vector are given, in stretches of (how many, value)."""
    values = torch.cat([torch.full((n,), float(value)) for n, value in stretches])
    W_enc = torch.zeros(32, len(values))
    W_enc[0] = values
    return W_enc, torch.zeros(len(values)), None


def unit(n):
    """n tokens, the first unit vector each."""
    x = torch.zeros(n, 32)
    x[:, 0] = 1
    return x


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"),
    [(9, 40, 4700, 512), (17, 48, 9000, 1), (3, 40, 1030, 2), (8, 40, 4096, 200), (1, 33, 30000, 64)],
)
def test_encodes(dtype, n, d, n_latents, k):
    x, *weights = gaussian(n, d, n_latents, dtype)
    check_tokens_of_all_scales(x, weights, k, threshold=2.2 * d**0.5)


@pytest.mark.parametrize("k", [1, 64, 512])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_tile_better_than_the_one_before(emulated_library, seed, k):
    """Nearly all of each tile is let in, and each tile tightens; in one range and in several."""
    emulated.set_seed(seed)
    emulated_library.darkmatter_emulated_multiprocessors(seed)
    x, W_enc, b_enc, b_dec = gaussian(12, 64, 9001, seed=seed)
    screened = Screened(W_enc * torch.linspace(-4, 4, 9001).exp(), b_enc, b_dec, left_out=slice(3, 9001, 11))
    screened.check_topk(x, k)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_list_leaves_room_for_a_whole_tile(emulated_library, seed):
    """1025 candidates at the end of a tile are one too many, if the next may let in 1024."""
    emulated.set_seed(seed)
    emulated_library.darkmatter_emulated_multiprocessors(1)
    weights = scores(
        (600, 10), (TILE - 600, 0),  # 512 of them are the first limit
        (500, 12), (100, 11), (TILE - 600, 0),  # 1200 candidates: 600 are left, those of 11 tie
        (425, 13), (TILE - 425, 0),  # 1025: 925 are left
        (TILE, 14), (1, 15), (1500, 0),
    )  # fmt: skip
    Screened(*weights, left_out=[4 * TILE]).check_topk(unit(17), 512)  # so many tokens: one range


@pytest.mark.parametrize("seed", SEEDS)
def test_near_ties_fill_a_list_to_its_end(emulated_library, seed):
    """As many ties as a list holds are screened, whatever tile they are in; one more is not."""
    emulated.set_seed(seed)
    emulated_library.darkmatter_emulated_multiprocessors(1)
    x = unit(19)  # so many tokens: one range
    x[3:5, 0] = -1  # these have other ties, and too many of them
    fits = scores((1, 2), (700, 0), (LIST, 1), (1300, 0), (LIST + 1, -1), (300, 0))
    Screened(*fits, left_out=[0]).check_topk(x, 512, exact=[3, 4])
    Screened(*fits, left_out=[0]).check_topk(x, 1, exact=[3, 4])


@pytest.mark.parametrize("dtype", SCREENED_DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n_latents"), [(513, 4104), (600, 8192), (1000, 8200), (1024, 9001)])
def test_long_lists(dtype, k, n_latents):
    x, W_enc, b_enc, b_dec = gaussian(5, 40, n_latents, dtype)
    x *= torch.logspace(0, -2, 5)[:, None].to(dtype)
    Screened(W_enc, b_enc, b_dec, left_out=slice(5, n_latents, 7)).check_topk(x, k)


@pytest.mark.parametrize(("k", "n_latents", "kilobytes"), [(1024, 8192, 70), (64, 1024, 37)])
def test_rows_that_do_not_fit_beside_the_lists(emulated_library, k, n_latents, kilobytes):
    """The row of a token stays in device memory then, as at d 4096 on sm_86, 89 and 120, whose blocks have 99 KB."""
    emulated_library.darkmatter_emulated_shared(kilobytes << 10)
    x, W_enc, b_enc, _ = gaussian(2, 700, n_latents)
    Screened(W_enc, b_enc, None, left_out=slice(3, n_latents, 9)).check_topk(x, k)


@pytest.mark.parametrize("seed", SEEDS)
def test_long_lists_whose_every_tile_is_better(emulated_library, seed):
    emulated.set_seed(seed)
    emulated_library.darkmatter_emulated_multiprocessors(seed)
    x, W_enc, b_enc, b_dec = gaussian(9, 64, 9001, seed=seed)
    screened = Screened(W_enc * torch.linspace(-4, 4, 9001).exp(), b_enc, b_dec, left_out=slice(3, 9001, 11))
    screened.check_topk(x, 1024)


@pytest.mark.parametrize("seed", SEEDS)
def test_near_ties_fill_a_long_list_to_its_end(emulated_library, seed):
    emulated.set_seed(seed)
    emulated_library.darkmatter_emulated_multiprocessors(1)
    x = unit(19)
    x[3:5, 0] = -1
    fits = scores((1, 2), (700, 0), (LONG_LIST, 1), (1300, 0), (LONG_LIST + 1, -1), (300, 0))
    Screened(*fits, left_out=[0]).check_topk(x, 1024, exact=[3, 4])


@pytest.mark.parametrize("k", [600, 1024])
@pytest.mark.parametrize("seed", SEEDS)
def test_hundreds_of_tokens_that_become_exact(seed, k):
    """Twenty groups of marked tokens, whose latents tie, are not finite or too large, and others between them."""
    emulated.set_seed(seed)
    x, W_enc, b_enc, b_dec = gaussian(170, 32, 8300, seed=seed)
    b_enc[:] = 0.25
    x[:, 0] += 1
    odd = [token for token in range(170) if token % 17 != 3]
    x[odd] = b_dec  # all scores tie
    x[4, 7], x[12, 0], x[16] = NAN, INF, 1e38
    Screened(W_enc, b_enc, b_dec, left_out=slice(0, 8300, 13)).check_topk(x, k, odd)


@pytest.mark.parametrize("k", [1, 30])
@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_that_become_exact_between_others(seed, k):
    """Overflowing in the middle, not finite, or zero: their neighbours in the block are still screened."""
    emulated.set_seed(seed)
    x, W_enc, b_enc, b_dec = gaussian(17, 40, 5000, seed=seed)
    b_enc[:] = 0.25
    x[2], x[9] = b_dec, b_dec  # all scores tie
    x[4, 7], x[12, 0], x[16] = NAN, INF, 1e38
    exact = [2, 4, 9, 12, 16]
    screened = Screened(W_enc, b_enc, b_dec, left_out=slice(0, 5000, 13))
    screened.check_topk(x, k, exact)
    screened.check_threshold(x, torch.tensor(12.0), [4, 12, 16])  # none of the ties is above
    screened.check_threshold(x, torch.tensor(0.2), range(17))  # half of all latents
    limits = torch.full((5000,), 14.0)
    limits[:2500] = INF
    limits[9], limits[4990], limits[3000] = -INF, -INF, 3e38
    screened.check_threshold(x, limits, [4, 12, 16])


def test_behind_the_last_latent_of_a_chunk():
    """A second chunk that ends within a tile, where the scores of the first are left behind; tokens that end within a
    block; latents of the first chunk that are above all of the second."""
    x, W_enc, b_enc, _ = gaussian(2045, 32, 4096 + 900)
    x[torch.arange(2045) % 53 != 0] = 0
    x[::53] = x[::53].abs() + 0.1
    W_enc[:, 900:TILE] = W_enc[:, 900:TILE].abs() * 9  # behind the last latent, in the first chunk
    b_enc += torch.arange(4996) * 1e-3  # zero tokens have an order
    screened = Screened(W_enc, b_enc, None, left_out=slice(901, 4996, 10))
    screened.check_topk(x, 12)
    assert screened.check_threshold(x[:300], torch.tensor(20.0)) > 6


@pytest.mark.parametrize("at", [0, 255, 256, 1023, 1024, 2047, 2999])
@pytest.mark.parametrize("row", [ROUNDING, SLACK])
def test_a_latent_known_badly_is_a_candidate_by_its_error(row, at):
    """The codes of one latent say nothing, its bounds say so: it is best, and only its error tells that it may be."""
    x, W_enc, b_enc, _ = gaussian(9, 40, 3000)
    W_enc[:, at] = x.sum(0) * 4
    x[x @ W_enc[:, at] < 300] *= 0.01
    worse = torch.tensor([at + 5 if at < 2000 else 7])
    screened = Screened(W_enc, b_enc, None, left_out=worse)
    screened.codes[at] = 0
    norm = W_enc[:, at].norm() * 1.01
    screened.bounds[row, at] = norm if row == ROUNDING else norm * x.norm(dim=1).max()
    screened.check_topk(x, 3)
    screened.check_topk(x, 1)
    screened.check_threshold(x, torch.tensor(100.0))


def test_each_of_the_best_known_badly():
    """Codes of every other latent say nothing: what is kept rests on errors alone."""
    x, W_enc, b_enc, b_dec = gaussian(10, 40, 2600)
    screened = Screened(W_enc, b_enc, b_dec, left_out=slice(1, 2600, 50))
    screened.codes[::2] = 0
    screened.bounds[ROUNDING, ::2] = W_enc[:, ::2].norm(dim=0) * 1.01
    screened.check_topk(x, 40)
    screened.check_threshold(x, torch.tensor(18.0))


def test_limits_of_a_token_over_many_chunks(emulated_library):
    """Lists and limits go on from chunk to chunk; few multiprocessors and many give the same."""
    x, W_enc, b_enc, b_dec = gaussian(520, 32, 20000)
    x[torch.arange(520) % 103 != 0] = 0
    b_enc += torch.arange(20000) % 997 * 1e-3
    given = x, W_enc, b_enc, b_dec
    expected = torch.ops.darkmatter.topk_encode(*given, 33, *NOT_PACKED)
    for multiprocessors in (1, 132):
        emulated_library.darkmatter_emulated_multiprocessors(multiprocessors)
        same(torch.ops.darkmatter_emulated.topk_encode(*given, 33, *NOT_PACKED), expected)
