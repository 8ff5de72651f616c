"""The bound of truncating accumulation that CUDA screening will rest on, against an emulation of tensor cores.

A tensor core multiplies a block of 16-bit numbers exactly, aligns the products and the running sum to the largest
exponent among them, cuts everything below the last kept bit (truncation, not rounding) and adds. What is kept differs
between chips (measured in the literature: 24 bits and few guard bits, 25 on H100), so the bound must hold for the worst,
24 bits. Claimed: |computed - exact| <= 2 d 2^-24 sum |x_e w_e|, hence at most gamma ||x|| ||w|| with gamma = 2 d 2^-24.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

KEPT_BITS = 24
UNIT = 2.0**-24


def gamma(d: int) -> float:
    return 2 * d * UNIT


def truncating_dot(x: np.ndarray, w: np.ndarray, block: int) -> float:
    """<x, w> as a tensor core with `block` products an instruction sums it; exact products (16-bit inputs)."""
    total = 0.0
    for start in range(0, len(x), block):
        terms = [total, *(x[start : start + block] * w[start : start + block])]
        largest = max(abs(term) for term in terms)
        if largest == 0.0:
            continue
        quantum = 2.0 ** (math.frexp(largest)[1] - KEPT_BITS)
        total = sum(math.trunc(term / quantum) for term in terms) * quantum
        # the sum itself goes back into 24 bits, again by truncation
        quantum = 2.0 ** (math.frexp(total)[1] - KEPT_BITS) if total else 1.0
        total = math.trunc(total / quantum) * quantum
    return total


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to 8 significant bits, so that products are exact in float64."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def _data(kind: str, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, w = rng.standard_normal(d), rng.standard_normal(d)
    if kind == "heavy_tailed":
        x, w = x * np.exp(3 * rng.standard_normal(d)), w * np.exp(3 * rng.standard_normal(d))
    elif kind == "all_positive":  # every truncation goes the same way: the worst case
        x, w = abs(x), abs(w)
    elif kind == "cancelling":
        x[d // 2 : 2 * (d // 2)], w[d // 2 : 2 * (d // 2)] = x[: d // 2], -w[: d // 2]
    elif kind == "one_large":
        x[0], w[0] = 3e4, 2e3
    return bfloat16(x), bfloat16(w)


def _check(kind: str, d: int, block: int, rng: np.random.Generator) -> float:
    """Error in units of the claimed bound; also checks the two steps of the bound."""
    x, w = _data(kind, d, rng)
    exact = math.fsum(x * w)
    error = abs(truncating_dot(x, w, block) - exact)
    size = math.fsum(abs(x * w))
    assert error <= gamma(d) * size
    assert size <= np.linalg.norm(x) * np.linalg.norm(w) * (1 + 1e-12)
    return error / (gamma(d) * size)


KINDS = ("gaussian", "heavy_tailed", "all_positive", "cancelling", "one_large")


@pytest.mark.parametrize("block", [4, 8, 16, 32])  # products an instruction, from Volta to Hopper
@pytest.mark.parametrize("kind", KINDS)
def test_gamma_bounds_truncating_accumulation(kind, block):
    rng = np.random.default_rng(0)
    for d in (64, 768, 2304):
        for _ in range(5):
            _check(kind, d, block, rng)


@given(kind=st.sampled_from(KINDS), d=st.integers(1, 200), block=st.integers(1, 32), seed=st.integers(0, 10_000))
def test_gamma_bounds_any_shape(kind, d, block, seed):
    _check(kind, d, block, np.random.default_rng(seed))


def test_the_emulation_truncates():
    """Without truncation the test above would prove nothing: sums of positive numbers come out low, and visibly so."""
    rng = np.random.default_rng(1)
    x, w = _data("all_positive", 4096, rng)
    computed, exact = truncating_dot(x, w, 16), math.fsum(x * w)
    assert computed < exact
    assert exact - computed > 20 * UNIT * exact  # far beyond the half unit of one rounding
