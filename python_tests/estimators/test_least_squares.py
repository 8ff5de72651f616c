"""Streaming least squares against torch.linalg.lstsq on the stored matrix, merging, splits, bad input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter_ext.estimators.least_squares import LinearStatistics, fit_linear, lstsq, train_mask


def _data(n, p, q, seed=0, offset=100.0):
    """Predictors of very different scales and large means, as a residual stream has them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, p, dtype=torch.float64)
    x = x + offset * torch.linspace(-1, 1, p, dtype=torch.float64)
    y = x @ torch.randn(p, q, generator=generator, dtype=torch.float64) / 100
    return x, y + torch.randn(n, q, generator=generator, dtype=torch.float64) + 7


def _lstsq(x, y):
    augmented = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return torch.linalg.lstsq(augmented, y, driver="gelsd").solution


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_equals_lstsq_on_the_stored_matrix():
    x, y = _data(4000, 60, 20)
    train = torch.arange(4000) < 2500
    fit = fit_linear((x[i : i + 333], y[i : i + 333], train[i : i + 333]) for i in range(0, 4000, 333))
    solution = _lstsq(x[train], y[train])
    assert _relative(fit.map.weight, solution[:-1]) < 1e-8
    assert _relative(fit.map.bias, solution[-1]) < 1e-8
    residual = y[~train] - x[~train] @ solution[:-1] - solution[-1]
    r2 = 1 - residual.square().sum(0) / (y[~train] - y[~train].mean(0)).square().sum(0)
    assert _relative(fit.test.r2, r2) < 1e-8
    assert fit.r2 == pytest.approx(r2.mean().item(), rel=1e-8)


def test_float32_input_is_accumulated_in_float64():
    x, y = (part.float() for part in _data(3000, 30, 5, offset=1000.0))
    fit = fit_linear(x, y, train=torch.arange(3000) < 2000)
    solution = _lstsq(x[:2000].double(), y[:2000].double())
    assert _relative(fit.map.weight, solution[:-1]) < 1e-8


@pytest.mark.runs
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), min_size=0, max_size=6), seed=st.integers(0, 1000))
def test_merging_parts_equals_one_pass(cuts, seed):
    x, y = _data(300, 7, 3, seed=seed)
    whole = LinearStatistics(7, 3)
    whole.update(x, y)
    merged = LinearStatistics(7, 3)
    edges = [0, *sorted(cuts), 300]
    for start, end in itertools.pairwise(edges):
        part = LinearStatistics(7, 3)
        part.update(x[start:end], y[start:end])
        merged.merge(part)
    assert merged.count == whole.count == 300
    for name in ("mean_x", "mean_y", "moment_xx", "moment_xy", "moment_yy"):
        assert _relative(getattr(merged, name), getattr(whole, name)) < 1e-8, name
    assert _relative(merged.solve().weight, whole.solve().weight) < 1e-8


def test_recovers_a_planted_linear_share():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20_000, 16, generator=generator)
    linear = x @ torch.randn(16, 16, generator=generator)
    noise = torch.randn(20_000, 16, generator=generator) * linear.std(0)
    assert fit_linear(x, linear + noise).r2 == pytest.approx(0.5, abs=0.02)
    assert fit_linear(x, linear).r2 == pytest.approx(1.0, abs=1e-9)
    assert fit_linear(x, noise).r2 == pytest.approx(0.0, abs=0.02)


def test_rank_deficient_predictors_give_the_predictions_of_lstsq():
    x, y = _data(500, 6, 2)
    doubled = torch.cat([x, x[:, :3] - 2 * x[:, 3:], torch.full((500, 1), 5.0)], dim=1)
    fit = fit_linear(doubled, y, train=torch.arange(500) < 400)
    assert fit.map.rank == 6
    plain = fit_linear(x, y, train=torch.arange(500) < 400)
    assert _relative(fit.map(doubled), plain.map(x)) < 1e-6


def test_constant_target_has_no_r2_and_does_not_spoil_the_mean():
    x, y = _data(200, 4, 2)
    y = torch.cat([y, torch.full((200, 1), 3.0, dtype=y.dtype)], dim=1)
    fit = fit_linear(x, y, train=torch.arange(200) < 100)
    assert fit.test.r2[2].isnan()
    assert fit.r2 == pytest.approx(fit.test.r2[:2].mean().item())


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda g: len(set(g)) > 1),
    seed=st.integers(0, 99),
)
def test_split_keeps_groups_whole_and_is_seeded(groups, seed):
    groups = torch.tensor(groups)
    train = train_mask(groups, fraction=0.5, seed=seed)
    for group in groups.unique():
        assert train[groups == group].unique().numel() == 1
    assert train.any()
    assert not train.all()
    assert torch.equal(train, train_mask(groups, fraction=0.5, seed=seed))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: fit_linear(x, y[:-1]), ValueError, "y: must have as many rows as x (100), got 99"),
        (lambda x, y: fit_linear(x), TypeError, "y: must be given"),
        (lambda x, y: fit_linear(x[0], y), ValueError, "x: must have shape [n, features], got [4]"),
        (lambda x, y: fit_linear(x.long(), y), TypeError, "x: must be a floating-point tensor, got torch.int64"),
        (lambda x, y: fit_linear(x.log(), y), ValueError, "x: must be finite, got NaN or infinity"),
        (lambda x, y: fit_linear(x, y, train_fraction=1.0), ValueError, "fraction: must be between 0 and 1, got 1.0"),
        (
            lambda x, y: fit_linear(x, y, train=torch.ones(100).bool()),
            ValueError,
            "train: must leave at least 2 tokens",
        ),
        (lambda x, y: fit_linear(x, y, train=torch.ones(100)), ValueError, "train: must be bool"),
        (lambda x, y: fit_linear(iter([])), ValueError, "x: must yield at least one batch"),
        (lambda x, y: LinearStatistics(4, 2).merge(LinearStatistics(3, 2)), ValueError, "other: must have"),
        (lambda x, y: LinearStatistics(4, 2).solve(), ValueError, "at least 2 tokens, got 0"),
    ],
)
def test_bad_input_is_named_in_one_line(call, error, message):
    x, y = _data(100, 4, 2, offset=0.0)
    with pytest.raises(error) as caught:
        call(x, y)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _used_memory(generator):
    """Leave blocks of whole numbers for whoever takes memory next."""
    blocks = [
        torch.randint(1, 99, (int(n),), dtype=torch.int32) for n in torch.randint(1, 400, (40,), generator=generator)
    ]
    del blocks[::2]
    return blocks


@pytest.mark.parametrize("rank", [24, 40])
def test_least_squares_are_the_same_bits_whatever_memory_held_before(rank):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, rank, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(rank, 40, generator=generator, dtype=torch.float64)
    y = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    least_norm = torch.linalg.pinv(x) @ y
    first = lstsq(x, y)
    torch.testing.assert_close(first, least_norm, rtol=1e-8, atol=1e-8)
    for _ in range(300):
        kept = _used_memory(generator)
        assert torch.equal(lstsq(x, y), first)
        del kept
