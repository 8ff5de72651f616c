"""Intervals against closed forms and against their meaning: how often they hold the truth."""

import math

import pytest
import torch

from darkmatter_ext.estimators.intervals import bootstrap, group_sums, jackknife, seed_interval


def test_group_sums_are_sums():
    values, groups = torch.arange(12.0).view(6, 2), torch.tensor([2, 0, 2, 0, 0, 2])
    sums = group_sums(values, groups, 4)
    assert sums.tolist() == [[2 + 6 + 8, 3 + 7 + 9], [0, 0], [0 + 4 + 10, 1 + 5 + 11], [0, 0]]


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    sums = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    (found,) = bootstrap(torch.cat([sums, torch.ones_like(sums)], 1), lambda s: s[..., :1] / s[..., 1:], seed=1)
    half = 1.96 * sums.std().item() / 20
    assert found.value == pytest.approx(sums.mean().item())
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)


def test_a_ratio_of_sums_covers_the_planted_ratio_about_as_often_as_it_says():
    """Contexts of very different sizes, whose tokens share an effect: intervals over tokens would be far too short."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        size = torch.randint(1, 40, (60,), generator=generator).double()
        shared = torch.randn(60, generator=generator, dtype=torch.float64)
        numerator = size * (3 + shared)
        sums = torch.stack([numerator, size], 1)
        (found,) = bootstrap(sums, lambda s: s[..., :1] / s[..., 1:], seed=seed, resamples=300)
        covered += found.low <= 3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_jackknife_interval_of_a_mean_is_students():
    """For a mean of groups of equal size leaving one out is exactly the t interval."""
    values = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = jackknife(torch.cat([values, torch.ones_like(values)], 1), lambda s: s[..., :1] / s[..., 1:])
    expected = seed_interval(values.flatten().tolist())
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(jackknife(torch.ones(1, 2), lambda s: s[..., :1])[0].low)


def test_the_jackknife_of_a_ratio_covers_as_often_as_it_says():
    """Ten groups of unequal size: R2-like ratios of sums, in 300 draws (binomial error 1.3 %)."""
    covered = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        size = torch.randint(20, 60, (10,), generator=generator).double()
        error = size * (1 + 0.2 * torch.randn(10, generator=generator, dtype=torch.float64))
        (found,) = jackknife(torch.stack([error, 4 * size], 1), lambda s: 1 - s[..., :1] / s[..., 1:])
        covered += found.low <= 0.75 <= found.high
    assert 0.91 <= covered / 300 <= 0.985


def test_one_context_or_one_seed_has_no_interval():
    (found,) = bootstrap(torch.tensor([[4.0, 2.0]]), lambda s: s[..., :1] / s[..., 1:], seed=0)
    assert found.value == 2
    assert math.isnan(found.low)
    assert math.isnan(seed_interval([3.0]).high)


def test_seed_interval_is_students():
    found = seed_interval([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high == pytest.approx(2 + 4.302652729911275 / 3**0.5)  # t(0.975, 2) from a table
    assert found.numbers("fvu") == {"fvu": 2.0, "fvu/low": found.low, "fvu/high": found.high}


def test_nothing_to_draw_is_told():
    with pytest.raises(ValueError, match="sums: must hold at least one context, got none"):
        bootstrap(torch.empty(0, 2), lambda s: s, seed=0)
    with pytest.raises(ValueError, match="values: must hold at least one seed, got none"):
        seed_interval([])
