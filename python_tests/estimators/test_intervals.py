"""Intervals against closed forms and against their meaning: how often they hold the truth."""

import math

import pytest
import torch

from darkmatter_ext.estimators.intervals import bootstrap, group_sums, jackknife, ratio, seed_interval


def test_group_sums_are_sums():
    values, groups = torch.arange(12.0).view(6, 2), torch.tensor([2, 0, 2, 0, 0, 2])
    sums = group_sums(values, groups, 4)
    assert sums.tolist() == [[2 + 6 + 8, 3 + 7 + 9], [0, 0], [0 + 4 + 10, 1 + 5 + 11], [0, 0]]


def test_the_interval_of_a_mean_of_many_documents_is_the_normal_one():
    sums = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    (found,) = bootstrap(torch.cat([sums, torch.ones_like(sums)], 1), lambda s: s[..., :1] / s[..., 1:], seed=1)
    half = 1.96 * sums.std().item() / 20
    assert found.value == pytest.approx(sums.mean().item())
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)


def _mean(sums):
    return sums[..., :1] / sums[..., 1:]


def _documents(n, shared, sigma, generator):
    """Sums [n, 3] over documents of 1 to 4 contexts: of two correlated positive values of mean 1, and of ones.

    `shared`: the part of the variance of a context that is its document's; `sigma`: of the log-normal values.
    """
    sizes = torch.randint(1, 5, (n,), generator=generator)
    owner = torch.arange(n).repeat_interleave(sizes)

    def normal():
        own = torch.randn(n, generator=generator, dtype=torch.float64)[owner] * shared**0.5
        return own + torch.randn(len(owner), generator=generator, dtype=torch.float64) * (1 - shared) ** 0.5

    first, other = normal(), normal()
    values = [(sigma * z - sigma**2 / 2).exp() for z in (first, 0.8 * first + 0.6 * other)]
    return group_sums(torch.stack([*values, torch.ones(len(owner))], 1), owner, n)


def _coverage(n, shared, sigma, repeats):
    """How often the interval of a mean, and of a ratio of two means, holds 1."""
    held = torch.zeros(2)
    for seed in range(repeats):
        sums = _documents(n, shared, sigma, torch.Generator().manual_seed(seed))
        found = bootstrap(sums[:, [0, 2]], _mean, seed=seed, resamples=400)[0], ratio(sums[:, :2])
        held += torch.tensor([interval.low <= 1 <= interval.high for interval in found])
    return (held / repeats).tolist()


@pytest.mark.runs
def test_intervals_cover_as_often_as_they_say():
    """20 documents whose contexts share 60 % of their variance (binomial error of 400: 1.1 %)."""
    mean, of_two = _coverage(20, 0.6, 0.3, 400)
    assert 0.92 <= mean <= 0.98
    assert 0.92 <= of_two <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.3, 0.9])
@pytest.mark.parametrize("n", [12, 20, 34])
def test_intervals_of_few_documents_cover_as_often_as_they_say(n, shared):
    """2000 draws: binomial error 0.5 %. Plain percentiles hold the mean in 0.88 to 0.93."""
    mean, of_two = _coverage(n, shared, 0.3, 2000)
    assert 0.925 <= mean <= 0.97
    assert 0.93 <= of_two <= 0.97


def test_a_ratio_whose_denominator_may_be_zero_is_unknown():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    unknown = ratio(noise)
    assert all(math.isnan(value) for value in (unknown.value, unknown.low, unknown.high))
    assert all(math.isnan(value) for value in vars(ratio(torch.ones(1, 2))).values())
    assert math.isnan(ratio(torch.zeros(5, 2)).value)


def test_fiellers_interval_is_the_set_that_a_t_test_leaves():
    """By its definition: a ratio R is inside if and only if numerator - R denominator is not told from 0."""
    from scipy import stats

    generator = torch.Generator().manual_seed(1)
    for sign in (1, -1):
        sums = torch.randn(9, 2, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 2 * sign])
        found = ratio(sums)
        for candidate in torch.linspace(found.low - 1, found.high + 1, 101).tolist():
            p = stats.ttest_1samp((sums[:, 0] - candidate * sums[:, 1]).numpy(), 0).pvalue
            assert (p > 0.05) == (found.low <= candidate <= found.high)


def test_documents_that_do_not_touch_a_quantity_are_not_counted_for_it():
    """Three documents of ten hold a token: its interval is that of three, Student's t."""
    sums = torch.zeros(10, 2, dtype=torch.float64)
    sums[:3] = torch.tensor([[1.0, 1], [2, 1], [4, 1]])
    (found,), (expected,) = bootstrap(sums, _mean, seed=0), jackknife(sums[:3], _mean)
    assert found == expected


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


def test_one_document_or_one_seed_has_no_interval():
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
    with pytest.raises(ValueError, match="sums: must hold at least one document, got none"):
        bootstrap(torch.empty(0, 2), lambda s: s, seed=0)
    with pytest.raises(ValueError, match="values: must hold at least one seed, got none"):
        seed_interval([])
