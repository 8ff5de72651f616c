"""Fits of numbers on planted states: a helix of known R2, its periods, digits alone, a line alone, values and rows."""

import pytest
import torch

from darkmatter_ext.estimators.ridge import dealt_folds, held_out
from darkmatter_ext.estimators.value_fits import (
    beyond,
    ceiling_sums,
    digit_columns,
    fit_sums,
    helix_columns,
    null_r2,
    polynomial_columns,
    r2,
    spectrum,
    states_of,
    waves,
)
from darkmatter_ext.runtime.inputs import InputError

VALUES, T, D = torch.arange(10, 100), 8, 24
PERIODS = (2, 5, 10, 100)
FOLDS = dealt_folds(len(VALUES), 4, seed=0)


def _planted(columns, share, seed=0):
    """[v, t, d]: a random linear image of the columns, which has a known share of the variance, and noise; templates apart."""
    generator = torch.Generator().manual_seed(seed)
    columns = (columns - columns.mean(0)) / columns.std(0)
    signal = columns @ torch.randn(columns.shape[1], D, generator=generator).double()
    signal = signal / signal.square().mean().sqrt()
    noise = torch.randn(len(columns), T, D, generator=generator).double()
    h = share**0.5 * signal[:, None] + (1 - share) ** 0.5 * noise
    return h + 5 * torch.randn(1, T, D, generator=generator)


def _r2(h, columns, folds=FOLDS):
    return r2(fit_sums(states_of(h), columns, folds).sum(0)).item()


def test_a_helix_of_known_r2_is_recovered_and_is_the_ceiling():
    h = _planted(helix_columns(VALUES, PERIODS), 0.7)
    assert _r2(h, helix_columns(VALUES, PERIODS)) == pytest.approx(0.7, abs=0.02)
    ceiling = r2(ceiling_sums(h).sum(0)).item()
    assert ceiling == pytest.approx(1 - 0.3 * (1 + 1 / (T - 1)), abs=0.02)  # the mean of seven others is noisy itself
    null = null_r2(states_of(h), FOLDS, helix_columns(VALUES, PERIODS), digit_columns(VALUES), draws=19, seed=0)
    assert abs(null["permuted"].mean()) < 0.03
    assert null["permuted"].max() < 0.1


def test_a_period_is_found_by_leaving_it_out():
    h = _planted(waves(VALUES, 7), 0.6)
    every = _r2(h, helix_columns(VALUES, (2, 7, 10)))
    assert every - _r2(h, helix_columns(VALUES, (2, 10))) == pytest.approx(0.6, abs=0.04)
    assert abs(every - _r2(h, helix_columns(VALUES, (2, 7)))) < 0.01


@pytest.mark.runs
def test_digits_alone_make_a_helix_that_holds_nothing_beyond_them():
    h = _planted(digit_columns(VALUES)[:, digit_columns(VALUES).std(0) > 0], 0.8)
    helix, digits = helix_columns(VALUES, PERIODS), digit_columns(VALUES)
    assert _r2(h, digits) == pytest.approx(0.8, abs=0.03)
    left = fit_sums(states_of(h), digits, FOLDS)[:, 0].sum()
    share = 1 - fit_sums(states_of(h), torch.cat([digits, beyond(helix, digits)], 1), FOLDS)[:, 0].sum() / left
    null = null_r2(states_of(h), FOLDS, helix, digits, draws=25, seed=1)
    assert share < null["beyond_digits"].quantile(0.95)
    assert _r2(h, helix) > null["permuted"].max() + 0.1  # a helix, one would say
    # It has no place of its own among the columns of the digits. Random periods are worse: they do not tell.
    assert _r2(h, helix) < null["digit_columns"].quantile(0.95)
    assert _r2(h, helix) > null["periods"].max()


@pytest.mark.runs
def test_what_is_beyond_digits_is_found():
    generator = torch.Generator().manual_seed(4)
    tens_and_units = digit_columns(VALUES)[:, digit_columns(VALUES).std(0) > 0]
    h = _planted(tens_and_units, 0.8) + (waves(VALUES, 7) @ torch.randn(2, D, generator=generator).double())[:, None]
    helix, digits = helix_columns(VALUES, (2, 5, 7, 10)), digit_columns(VALUES)
    left = fit_sums(states_of(h), digits, FOLDS)[:, 0].sum()
    share = 1 - fit_sums(states_of(h), torch.cat([digits, beyond(helix, digits)], 1), FOLDS)[:, 0].sum() / left
    null = null_r2(states_of(h), FOLDS, helix, digits, draws=19, seed=1)
    assert share > 0.5 > null["beyond_digits"].max()


def test_the_spectrum_of_a_line_is_empty_and_that_of_waves_is_not():
    line = _planted(VALUES.double()[:, None], 0.9)
    shares, band = spectrum(states_of(line).means, VALUES, draws=99, level=0.95, seed=0)
    assert sum(share > band for share in shares.values()) <= 1
    assert sum(shares.values()) == pytest.approx(1)
    both = _planted(torch.cat([VALUES.double()[:, None], waves(VALUES, 10), waves(VALUES, 2)], 1), 0.8)
    shares, band = spectrum(states_of(both).means, VALUES, draws=99, level=0.95, seed=0)
    assert {period for period, share in shares.items() if share > band} == {10.0, 2.0}


def test_rows_of_a_value_on_both_sides_let_a_fit_know_it():
    """States that are random by value: by value nothing is predicted, by row the free state of every value is found."""
    h = torch.randn(90, 1, D, generator=torch.Generator().manual_seed(0)).double().expand(-1, T, -1)
    rows = h.flatten(0, 1)
    one_hot = torch.eye(90).double().repeat_interleave(T, 0)
    spread = (rows - rows.mean(0)).square().sum()

    def score(folds):
        return (1 - (rows - held_out(one_hot, rows, folds).predicted).square().sum() / spread).item()

    assert abs(score(FOLDS.repeat_interleave(T))) < 0.1
    assert score(dealt_folds(len(rows), 4, seed=0)) > 0.9
    assert _r2(h, helix_columns(VALUES, PERIODS)) < 0.05


def test_what_columns_hold_beyond_digits():
    digits = digit_columns(VALUES)
    new = beyond(
        helix_columns(VALUES, PERIODS), digits
    )  # the waves of period 100; line, 2, 5 and 10 are sums over digits
    assert new.shape == (90, 2)
    assert (new.mT @ digits).abs().max() < 1e-8
    assert beyond(helix_columns(VALUES, (2, 5, 10)), digits).shape == (90, 0)
    assert beyond(waves(VALUES, 7), digits).shape == (90, 2)


def test_columns_are_what_they_say():
    assert helix_columns(VALUES, PERIODS).shape == (90, 8)  # the sine of period 2 is 0
    assert helix_columns(torch.tensor([0, 25]), (100,)).tolist() == [
        [0, 1, 0], pytest.approx([25, 0, 1], abs=1e-12)
    ]  # fmt: skip
    digits = digit_columns(torch.tensor([7, 40, 205])).unflatten(1, (3, 11))
    assert digits.argmax(2).tolist() == [[7, 10, 10], [0, 4, 10], [5, 0, 2]]
    powers = polynomial_columns(VALUES, 5)
    torch.testing.assert_close(powers.mT @ powers, torch.eye(5).double())
    assert powers.sum(0).abs().max() < 1e-10


def test_ridge_is_least_squares_where_that_is_best_and_the_mean_where_nothing_is_known():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator).double()
    y = x @ torch.randn(3, 2, generator=generator).double() + 4
    folds = dealt_folds(60, 5, seed=1)
    torch.testing.assert_close(held_out(x, y, folds).predicted, y, rtol=1e-4, atol=1e-4)
    for columns in (x[:, :0], torch.ones_like(x)):
        found = held_out(columns, y, folds)
        assert torch.equal(found.predicted, found.mean)
    noise = torch.randn(60, 2, generator=generator).double()
    assert (held_out(x, noise, folds).predicted - held_out(x, noise, folds).mean).square().mean() < 0.05


def test_bad_folds_give_one_line():
    with pytest.raises(InputError, match="count: must be from 2 to the 5 rows, got 6"):
        dealt_folds(5, 6, seed=0)
