"""Planted states of numbers and of sums through all fits, and what of a helix is in which part of x."""

import dataclasses

import pytest
import torch

from darkmatter_ext.estimators.number_fits import ValueFits, fit_numbers, moves_between, part_numbers, sum_numbers
from darkmatter_ext.estimators.value_fits import digit_columns, helix_columns, waves

FITS = ValueFits(torch.arange(10, 100), (2.0, 5.0, 10.0, 100.0), 4, 19, 0)
T, D = 4, 12


def _states(columns, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal = columns.double() @ torch.randn(columns.shape[1], D, generator=generator).double()
    signal = (signal - signal.mean(0)) / (signal - signal.mean(0)).square().mean().sqrt()
    return signal[:, None] + noise * torch.randn(90, T, D, generator=generator).double()


@pytest.mark.runs
def test_a_number_that_is_its_digits_has_no_helix_beyond_them():
    numbers = fit_numbers(_states(digit_columns(FITS.values)), FITS)
    assert numbers["r2/digits"] > 0.85 * numbers["r2/ceiling"]
    assert numbers["r2/beyond_digits"] <= numbers["null/beyond_digits/high"] + 0.01
    assert numbers["rank/permuted"] == 0.05  # 1 of 20: a helix, one would say
    assert numbers["rank/digit_columns"] > 0.05
    assert abs(numbers["null/permuted"]) < 0.05


@pytest.mark.runs
def test_a_helix_with_a_period_that_digits_do_not_have_is_told():
    own = dataclasses.replace(FITS, periods=(7.0, 10.0))
    numbers = fit_numbers(_states(waves(own.values, 7)), own)
    truth = 1 / 1.09
    assert numbers["r2/helix"] == pytest.approx(truth, abs=0.02)
    assert numbers["drop/7"] == pytest.approx(truth, abs=0.05)
    assert abs(numbers["drop/10"]) < 0.01
    assert numbers["r2/beyond_digits/low"] > 0.5 > numbers["null/beyond_digits/high"]
    assert numbers["rank/beyond_digits"] == numbers["rank/digit_columns"] == 0.05
    assert numbers["r2/helix/low"] < truth < numbers["r2/helix/high"] + 0.02


def test_shares_of_the_helix_add_up_and_are_where_it_was_put():
    """The wave of period 7 is in the "nonlinear error" alone, a line in Sae(x), a part of it in the linear error."""
    own = dataclasses.replace(FITS, periods=(7.0,))
    wave, line = _states(waves(own.values, 7), 0.1), _states(own.values[:, None], 0.1, seed=1)
    parts = {"sae": 0.75 * line, "linear": 0.25 * line, "nonlinear": wave}
    numbers = part_numbers(sum(parts.values()), parts, own)
    shares = {part: numbers[f"share/helix_in_{part}"] for part in parts}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert sum(numbers[f"share/all_in_{part}"] for part in parts) == pytest.approx(1, abs=1e-6)
    assert shares["nonlinear"] == pytest.approx(0.5, abs=0.08)  # both have the same energy
    assert shares["sae"] == pytest.approx(0.375, abs=0.08)
    assert numbers["r2/helix_in_nonlinear"] > 0.9
    nothing = parts | {"nonlinear": torch.zeros_like(wave), "sae": 0.75 * line + wave}
    assert part_numbers(sum(nothing.values()), nothing, own)["share/helix_in_nonlinear"] == pytest.approx(0, abs=1e-9)


def test_what_a_fit_says_of_a_value_it_has_not_seen():
    """Two values of one fold are wrong in the states: the helix, which saw neither, says the same of them as before."""
    h = _states(waves(FITS.values, 10), 0.1)
    one, other = (FITS.folds == 0).nonzero().flatten()[:2].tolist()
    wrong = h.clone()
    wrong[[one, other]] += torch.tensor([100.0, -50.0]).double()[:, None, None]
    start, end = torch.tensor([one]), torch.tensor([other])
    move = moves_between(h, FITS, start, end)["helix"]
    torch.testing.assert_close(move[0], (h[other] - h[one]).mean(0), rtol=0.1, atol=0.3)
    found = moves_between(wrong, FITS, start, end)
    torch.testing.assert_close(
        found["helix"] - move, torch.zeros_like(move), atol=1.0, rtol=0
    )  # templates' means moved
    assert found["value_mean"].norm() > 100


@pytest.mark.runs
def test_what_is_smooth_in_the_value_is_no_helix_beyond_digits():
    """Squares are no sum over digits: a wave of period 100 says much of what they leave, and so do low powers."""
    numbers = fit_numbers(_states(FITS.values.double()[:, None] ** 2, 0.02), FITS)
    assert numbers["r2/beyond_digits/low"] > numbers["null/beyond_digits/high"]
    assert numbers["r2/smooth_beyond_digits"] > numbers["r2/beyond_digits"]
    wave = fit_numbers(_states(waves(FITS.values, 7)), dataclasses.replace(FITS, periods=(7.0, 10.0)))
    assert wave["r2/smooth_beyond_digits"] < 0.1
    assert wave["r2/beyond_digits"] > 0.5


def _sums():
    pairs = [(a, b) for a in range(10, 100) for b in range(1, 10 - a % 10)]
    return torch.tensor(pairs).unbind(1)


@pytest.mark.slow
@pytest.mark.parametrize("truth", ["clock", "digits", "addends", "size of a", "pair"])
def test_a_clock_is_told_from_digits_of_the_sum_and_these_from_functions_of_the_addends_and_of_the_pair(truth):
    a, b = _sums()
    generator = torch.Generator().manual_seed(2)
    columns = {
        "clock": helix_columns(a + b, (10.0, 5.0), line=False),
        "digits": digit_columns(a + b)[:, :10],
        "addends": torch.cat([digit_columns(a), digit_columns(b)], 1),
        "size of a": torch.stack([a**2, (a / 15.0).sin()], 1),  # what a wave of period 100 of the sum has much of
        "pair": torch.randn(100, 6, generator=generator)[10 * (a % 10) + b],  # an answer learned by heart, pair by pair
    }[truth].double()
    signal = (columns - columns.mean(0)) @ torch.randn(columns.shape[1], D, generator=generator).double()
    h = signal / signal.var(0).mean().sqrt() + 0.1 * torch.randn(len(a), D, generator=generator).double()
    numbers = sum_numbers(h, a, b, FITS)
    if truth in ("addends", "size of a"):
        assert numbers["r2/addends"] > 0.9
        assert numbers["r2/sum_digits"] < 0.05
        assert numbers["r2/sum_helix"] < 0.05
    elif truth == "pair":
        assert numbers["r2/addends"] < 0.5
        assert numbers["rank/sum_digits"] > 0.05
        assert numbers["rank/sum_helix"] > 0.05
    else:
        assert numbers["r2/addends"] < 0.6
        assert numbers["r2/sum_digits"] > 0.8
        assert numbers["rank/sum_digits"] == numbers["rank/sum_helix"] == 0.05
    if truth == "clock":
        assert numbers["r2/sum_waves"] > 0.8
        assert numbers["rank/sum_digit_columns"] == 0.05
    if truth == "digits":
        assert numbers["r2/sum_waves"] < 0.8
        assert numbers["rank/sum_digit_columns"] > 0.05


def test_where_the_addends_say_all_nothing_is_said_of_the_sum():
    a, b = _sums()
    numbers = sum_numbers(torch.cat([digit_columns(a), digit_columns(b)], 1), a, b, FITS)
    assert numbers["r2/addends"] > 1 - 1e-6
    assert not any("sum" in name for name in numbers)
