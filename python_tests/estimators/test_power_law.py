"""The power law on planted curves: constants, intervals that cover as they say, refusals."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter_ext.estimators.power_law import fit_power_law

WIDTHS = [512, 1024, 2048, 4096, 8192, 16384]


@pytest.mark.runs
@settings(max_examples=15)  # a third of a second each
@given(c=st.floats(0, 0.3), a=st.floats(0.5, 20), m=st.floats(-1.2, -0.15))
def test_a_planted_law_is_found(c, a, m):
    law = fit_power_law(WIDTHS, [c + a * width**m for width in WIDTHS])
    assert law.c.value == pytest.approx(c, abs=2e-4)
    assert law.m.value == pytest.approx(m, rel=2e-2, abs=1e-3)
    assert law.a.value == pytest.approx(a, rel=0.1)
    assert law(3000) == pytest.approx(c + a * 3000**m, rel=1e-4)
    assert law.r2 > 1 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draws", "low", "high"), [(30, 0.8, 1), pytest.param(300, 0.91, 0.985, marks=pytest.mark.slow)]
)
def test_intervals_cover_the_planted_constants_as_often_as_they_say(draws, low, high):
    """Gaussian residuals of 0.002: 95 % intervals of each constant hold it in 95 % of 300 draws (binomial error 1.3 %)."""
    generator, planted = np.random.default_rng(0), {"c": 0.1, "a": 3.0, "m": -0.45}
    curve = np.array([planted["c"] + planted["a"] * width ** planted["m"] for width in WIDTHS])
    held = dict.fromkeys(planted, 0)
    for _ in range(draws):
        law = fit_power_law(WIDTHS, (curve + 0.002 * generator.normal(size=len(WIDTHS))).tolist())
        for name, value in planted.items():
            interval = getattr(law, name)
            assert interval.low <= interval.value <= interval.high
            held[name] += interval.low <= value <= interval.high
    for name, count in held.items():
        assert low < count / draws <= high, (name, count / draws)


def test_an_interval_admits_what_the_points_do_not_say():
    """A pure power law seen over one octave of noise: c may be 0, and the interval says so; a noisy flat line has no law."""
    law = fit_power_law([1000, 1200, 1400, 1600, 2000], [0.2012, 0.1897, 0.1786, 0.1722, 0.1570])
    assert law.c.low == 0
    assert law.c.high > 0.05
    flat = fit_power_law([512, 1024, 2048, 4096], [0.10, 0.1003, 0.0998, 0.1001])
    assert flat.c.low <= 0.1 <= flat.c.high
    numbers = flat.numbers("law")
    assert all(math.isnan(value) or math.isfinite(value) for value in numbers.values())
    assert {"law/c", "law/c/low", "law/m/high", "law/a", "law/r2", "law/widths"} <= set(numbers)


def test_units_of_width_do_not_matter():
    fvu = [0.21, 0.17, 0.145, 0.13, 0.121]
    small, large = fit_power_law([1, 2, 4, 8, 16], fvu), fit_power_law([1000, 2000, 4000, 8000, 16000], fvu)
    for name in ("value", "low", "high"):
        assert getattr(small.c, name) == pytest.approx(getattr(large.c, name), abs=1e-5)
        assert getattr(small.m, name) == pytest.approx(getattr(large.m, name), rel=1e-3)


@pytest.mark.parametrize(
    ("widths", "fvu", "message"),
    [
        ([512, 1024, 2048], [0.2, 0.15, 0.13], "widths: must be at least 4 different ones for c + a W^m, got 3"),
        ([512, 512, 1024, 2048], [0.2] * 4, "widths: must be at least 4 different ones for c + a W^m, got 3"),
        ([512, 1024, 2048, 4096], [0.2] * 3, "fvu: must have one value a width (4), got 3"),
        ([512, 1024, 2048, 4096], [0.2, math.nan, 0.1, 0.1], "widths, fvu: must be finite, widths at least 1"),
    ],
)
def test_too_few_points_and_bad_ones_are_refused(widths, fvu, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_power_law(widths, fvu)
