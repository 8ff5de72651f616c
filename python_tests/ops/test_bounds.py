"""Every bound of the screen is rigorous: hard rows at any scale, with and without gains, against rational numbers."""

import pytest
import torch
from cases.bounds import ROWS, Problem, count_outside, random_problem, rows_of, scaled, screened_is_exact
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.ops.facts import fact

CODES = fact("cpu_isa") != "scalar"  # else torch's own float32 product screens: where it overflows, nothing is
CHANCES = st.randoms(use_true_random=False)


@pytest.mark.runs
@settings(max_examples=60, deadline=None)
@given(CHANCES, st.integers(32, 72))
def test_intervals_hold_every_pre_activation(chance, d):
    outside, _ = count_outside(random_problem(chance, 3, d, 256))
    assert outside == 0


@pytest.mark.runs
@settings(max_examples=80, deadline=None)
@given(CHANCES, st.integers(32, 72), st.integers(1, 30))
def test_encoders_give_the_exact_answer(chance, d, k):
    assert screened_is_exact(random_problem(chance, 5, d, 600), k)


@pytest.mark.parametrize("gain", [None, 1e-10, 1e-20, 1e10])
@pytest.mark.parametrize("scales", [(0, 0), (27, -22), (-22, 27), (14, 14), (29, -30), (20, 19)], ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_intervals_at_the_ends_of_float32(kind, scales, gain):
    g = torch.Generator().manual_seed(0)
    x = scaled(rows_of(kind, 2, 32, torch.float32, g), scales[0], torch.float32)
    weights = scaled(rows_of(kind, 256, 32, torch.float32, g), scales[1], torch.float32)
    gains = None if gain is None else gain * (1 + torch.rand(256, generator=g))
    outside, _ = count_outside(Problem(x, weights.mT.contiguous(), torch.zeros(256), None, gains))
    assert outside == 0


def _bare(x, weights, b_enc, gain=None):
    return Problem(x, weights.mT.contiguous(), b_enc, None, gain)


def test_a_scale_that_its_gain_makes_subnormal():
    """Codes without rounding errors, so that nothing but the float32 scale of a latent is wrong."""
    x, weights = torch.full((2, 32), 1e28), torch.full((256, 32), 1e-26)
    problem = _bare(x, weights * torch.linspace(1, 2, 256)[:, None], torch.zeros(256), torch.full((256,), 1e-10))
    outside, looked_at = count_outside(problem)
    assert (outside, looked_at) == (0, 512 if CODES else 0)


def test_a_pre_activation_that_overflows_before_its_gain():
    """In float16 70000 is Inf, and Inf times a small gain is Inf: more than any finite latent."""
    x, weights = torch.full((70, 32), 20.0).half(), 0.1 * torch.randn(600, 32).half()
    weights[300] = 110.0  # 70400
    gain = torch.ones(600).half()
    gain[300], gain[301] = 1e-5, 0
    problem = _bare(x, weights, torch.zeros(600).half(), gain)
    assert screened_is_exact(problem, 4)
    assert topk_encode(x, problem.W_enc, problem.b_enc, 1, prepared=problem.prepared()).indices.unique().item() == 300
    assert count_outside(problem)[0] == 0
    assert problem.intervals().screened.sum() == 0
    problem.x *= 0.5
    assert problem.intervals().screened.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_overflow_float32(dtype):
    g = torch.Generator().manual_seed(0)
    x, weights = (scaled(torch.randn(n, 64, generator=g).double(), 19, dtype) for n in (4, 400))
    problem = _bare(x, weights, torch.zeros(400, dtype=dtype))
    outside, looked_at = count_outside(problem)
    assert outside == 0
    assert (looked_at > 0) == CODES
    b_enc = scaled(torch.randn(400, generator=g).double(), 39, dtype)
    assert count_outside(_bare(x, weights, b_enc))[0] == 0


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["constant", "equal_signs", "half_codes", "one_huge", "two_equal"])
@pytest.mark.parametrize("d", [pytest.param(32_400, marks=pytest.mark.slow), 32_768])
def test_sums_of_products_of_the_largest_rows_fit(kind, d):
    """A token that is its own latent, at the largest d there is: the products of codes add up to just below 2^31."""
    weights = rows_of(kind, 256, d, torch.float32, torch.Generator().manual_seed(0)).float()
    x = torch.cat([weights[:2], -weights[:2]])
    found = _bare(x, weights, torch.zeros(256)).intervals()
    exact = x.double() @ weights.mT.double()
    assert found.screened.all()
    assert bool(((found.lower <= exact) & (exact <= found.upper)).all())


def test_codes_of_another_layout_are_refused():
    """Two kinds of 16-bit codes have as many bytes: those of another machine would be read wrongly."""
    weights = torch.randn(300, 40)
    problem = _bare(torch.randn(3, 40), weights, torch.zeros(300))
    prepared = list(problem.prepared().packed)
    prepared[2] = torch.nn.functional.pad(prepared[2], (0, 64))
    with pytest.raises(RuntimeError, match="codes: must have"):
        torch.ops.darkmatter.topk_encode(problem.x, problem.W_enc, problem.b_enc, None, 3, *prepared)
