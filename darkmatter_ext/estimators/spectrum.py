"""The spectrum of a cloud of points: how fast its eigenvalues fall, how many directions it fills, how clustered it is.

Shapes: n points, d dimensions, G groups of points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, jackknife, sums_by

LAST_RANK = 150  # of the power law, as in the code of 2410.19750
GROUPS = 10  # groups of points, left out in turn
NEIGHBOUR_SHARE = 0.5  # of the points in a subsample


def eigenvalues(points: Tensor) -> Tensor:
    """[d]: eigenvalues of the covariance of points [n, d], largest first, float64."""
    centred = points.double() - points.double().mean(0)
    return torch.linalg.eigvalsh(centred.mT @ centred / len(centred)).flip(0).clamp(min=0)


def power_slope(values: Tensor, *, first: int = 1, last: int = LAST_RANK) -> Tensor:
    """[...]: alpha for eigenvalues [..., d], largest first: value is about rank^-alpha, by least squares of logarithms.

    Uses ranks `first` to `last`, without those of no variance at the end.
    """
    used = int((values > 1e-12 * values[..., :1]).sum(-1).min())
    stop = min(last, used)
    rank = torch.arange(first, stop + 1, dtype=torch.float64).log()
    y = values[..., first - 1 : stop].double().log()
    centred = rank - rank.mean()
    return -(y * centred).sum(-1) / centred.square().sum()


def power_slope_interval(points: Tensor, *, seed: int, first: int = 1, last: int = LAST_RANK) -> Interval:
    """alpha of points [n, d] with the jackknife interval over GROUPS of points. Cost: GROUPS + 1 eigenvalue problems."""
    n, d = points.shape
    group = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % GROUPS
    x = points.double()
    outer = torch.stack([own.mT @ own for own in (x[group == g] for g in range(GROUPS))]).flatten(1)
    sums = torch.cat([sums_by(group, torch.ones(n, dtype=torch.float64), *x.unbind(1)), outer], dim=1)

    def alpha(totals: Tensor) -> Tensor:
        count, mean = totals[..., :1], totals[..., 1 : d + 1] / totals[..., :1]
        second = totals[..., d + 1 :].unflatten(-1, (d, d)) / count[..., None]
        covariance = second - mean[..., :, None] * mean[..., None, :]
        values = torch.linalg.eigvalsh(covariance).flip(-1).clamp(min=0)
        return power_slope(values, first=first, last=last)[..., None]

    return jackknife(sums, alpha)[0]


def participation_ratio(values: Tensor) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: the effective number of directions."""
    return (values.sum().square() / values.square().sum()).item()


def neighbour_entropy(points: Tensor, *, seed: int) -> float:
    """Differential entropy (nats) of points [n, d] from nearest-neighbour distances in a subsample without replacement.

    Drawing with replacement would add copies at distance 0, which are not neighbours. Source: Kozachenko and Leonenko 1987.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(points), generator=generator)[: max(2, round(NEIGHBOUR_SHARE * len(points)))]
    x = points[chosen].double()
    n, d = x.shape
    distance = torch.cdist(x, x).fill_diagonal_(math.inf).amin(1).clamp(min=1e-300)
    volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return d * distance.log().mean().item() + volume + math.log(n - 1) + 0.5772156649015329


def same_covariance(points: Tensor, *, seed: int) -> Tensor:
    """A null: as many Gaussian points [n, d] with the same mean and covariance and no other structure."""
    x = points.double()
    centred = x - x.mean(0)
    noise = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise @ centred / len(x) ** 0.5 + x.mean(0)).to(points.dtype)


def galaxy_numbers(rows: Tensor, *, seed: int) -> dict[str, float]:
    """`alpha` of rows [F, d] with its interval, alpha of Gaussian rows, `directions` filled, entropy below a Gaussian's."""
    values = eigenvalues(rows)
    white = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    cloud = same_covariance(rows, seed=seed)
    return {
        **power_slope_interval(rows, seed=seed).numbers("alpha"),
        "alpha_gaussian": power_slope(eigenvalues(white)).item(),
        "directions": participation_ratio(values),
        "entropy_below_gaussian": neighbour_entropy(cloud, seed=seed) - neighbour_entropy(rows, seed=seed),
    }
