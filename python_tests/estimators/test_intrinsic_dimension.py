"""TwoNN on sets of known dimension, flat and curved; its control, its scale, its interval."""

import pytest
import torch

from darkmatter_ext.estimators.intrinsic_dimension import (
    gaussian_like,
    neighbour_ratios,
    participation_ratio,
    two_nn,
)

N, D = 3000, 30


def _uniform(m, seed=0, n=N):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _flat(m, seed=0):
    """A cube of m dimensions, turned into D."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    return _uniform(m, seed) @ turn[:m] * 50 + 7


def _dimension(x, groups=None):
    groups = torch.arange(len(x)) if groups is None else groups
    return two_nn(neighbour_ratios(x, groups), torch.arange(len(x)) // 100, seed=0)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_torus_has_its_dimension(m):
    """A product of circles: no walls, which take from the dimension of a cube."""
    angles = 6.28318 * _uniform(m)
    found = _dimension(torch.cat([angles.sin(), angles.cos()], dim=1))
    assert found.value == pytest.approx(m, rel=0.08)


def test_a_curve_and_a_sheet_that_fill_many_directions_have_one_and_two():
    """A linear view sees the directions, TwoNN the set: what the participation ratio cannot tell."""
    angles = _uniform(1) * 6.28 * torch.arange(1, 9)
    curve = torch.cat([angles.sin(), angles.cos()], dim=1)
    assert _dimension(curve).value == pytest.approx(1, rel=0.06)
    assert participation_ratio(curve) > 14
    u = _uniform(2, 3)
    roll = torch.stack(
        [(4 + 9 * u[:, 0]) * (12 * u[:, 0]).cos(), (4 + 9 * u[:, 0]) * (12 * u[:, 0]).sin(), 30 * u[:, 1]], 1
    )
    assert _dimension(roll).value == pytest.approx(2, rel=0.08)


def test_normal_points_of_its_covariance_do_not_know_the_curve():
    angles = _uniform(1) * 6.28 * torch.arange(1, 9)
    curve = torch.cat([angles.sin(), angles.cos()], dim=1)
    control = gaussian_like(curve, seed=1)
    for moment in (lambda x: x.mean(0), lambda x: (x - x.mean(0)).mT @ (x - x.mean(0)) / len(x)):
        assert (moment(control) - moment(curve)).abs().max() < 0.08
    assert _dimension(control).value > 8


def test_noise_adds_its_dimensions_at_scales_below_it():
    generator = torch.Generator().manual_seed(4)
    noisy = _flat(1) + 0.004 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    every, some = _dimension(noisy).value, _dimension(noisy[::20]).value
    assert every > 1.5 * some
    assert some == pytest.approx(1, rel=0.2)


def test_points_of_one_group_are_no_neighbours():
    """Every point five times, moved a little: of their own they would be on points, of others in the cube."""
    generator = torch.Generator().manual_seed(5)
    x = _flat(2)[:600].repeat_interleave(5, 0) + 1e-6 * torch.randn(3000, D, generator=generator, dtype=torch.float64)
    apart = torch.arange(600).repeat_interleave(5)
    ratios = neighbour_ratios(x, apart)
    expected = torch.cdist(x, x)
    expected[apart[:, None] == apart] = torch.inf
    first, second = expected.topk(2, largest=False).values.unbind(1)
    assert torch.allclose(ratios, (second / first).log(), atol=1e-9)
    assert neighbour_ratios(x, torch.arange(3000)).mean() != pytest.approx(ratios.mean().item(), rel=0.1)


def test_equal_points_are_left_out_and_too_few_are_refused():
    x = _flat(2)
    twice = torch.cat([x, x[:50]])
    ratios = neighbour_ratios(twice, torch.arange(len(twice)))
    assert int(ratios.isnan().sum()) == 100
    assert two_nn(ratios, torch.arange(len(twice)) // 100, seed=0).value == pytest.approx(2, rel=0.06)
    with pytest.raises(ValueError, match=r"^groups: must leave every point two neighbours"):
        neighbour_ratios(x[:10], torch.zeros(10))
    with pytest.raises(ValueError, match=r"^ratios: must be at least 20 numbers, got 10"):
        two_nn(torch.rand(10), torch.arange(10), seed=0)


@pytest.mark.slow
def test_intervals_hold_the_dimension_in_nineteen_of_twenty_samples():
    held = 0
    for seed in range(200):
        x = _uniform(3, seed, 800)
        found = two_nn(neighbour_ratios(x, torch.arange(800)), torch.arange(800) // 40, seed=seed)
        held += found.low < 2.9 < found.high  # at 800 points the walls of the cube take 0.1 off
    assert held >= 175
