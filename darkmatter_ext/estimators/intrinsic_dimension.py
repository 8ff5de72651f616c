"""Intrinsic dimension of a cloud of points from the distances to two neighbours (TwoNN), and its linear counterpart.

For a sample from a D-dimensional set with locally constant density, the ratio of the distances from a point to its second
and its first neighbour has the distribution P(ratio > r) = r^-D, whatever the density (Facco et al. 2017, "Estimating the
intrinsic dimension of datasets by a minimal neighborhood information"). The largest ratios, where density varies between
the two neighbours, are censored: they count as at least that large.

The result depends on how far apart neighbours are: with more points they are closer, and a noisy curve turns from one
dimension into those of its noise. So compute it at several numbers of points.

Shapes: n points, d coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, bootstrap, sums_by
from darkmatter_ext.runtime.inputs import InputError

KEPT = 0.9  # of the ratios, the smallest, as in the paper
POINTS_AT_A_TIME = 512


def neighbour_ratios(x: Tensor, groups: Tensor) -> Tensor:
    """log(r2 / r1) [n] float64 for points x [n, d], with r1 and r2 the distances to the nearest points of other groups [n].

    Points of one group (tokens of one text) are not independent draws, so they do not count as neighbours. NaN if r1 is 0
    (equal points). Raises InputError if a point has fewer than two others. Cost: n^2 d multiply-adds in float64.
    """
    x = x.double() - x.double().mean(0)
    sizes = x.square().sum(1)
    found = []
    for part in torch.arange(len(x)).split(POINTS_AT_A_TIME):
        squares = sizes[part, None] + sizes - 2 * x[part] @ x.mT
        squares[groups[part, None] == groups] = torch.inf
        if squares.shape[1] < 2 or bool(squares.topk(2, largest=False).values.isinf().any()):
            raise InputError("groups: must leave every point two neighbours of other groups")
        # Recompute the distances of the nearest directly: this formula's differences of large numbers are inexact.
        nearest = squares.topk(min(4, squares.shape[1]), largest=False).indices
        exact = (x[part, None] - x[nearest]).square().sum(-1)
        exact[groups[part, None] == groups[nearest]] = torch.inf
        first, second = exact.sort(1).values[:, :2].unbind(1)
        found.append(torch.where(first > 0, (second / first).log() / 2, torch.nan))
    return torch.cat(found)


def two_nn(ratios: Tensor, groups: Tensor, *, seed: int) -> Interval:
    """The dimension from log ratios [n], with an interval by group [n]; NaN ratios are left out.

    This is the maximum-likelihood estimate with the largest 10 % censored. The interval treats the ratios of different
    groups as independent. Raises InputError for fewer than 20 ratios.
    """
    known = ratios.isfinite()
    own = ratios[known]
    if len(own) < 20:
        raise InputError(f"ratios: must be at least 20 numbers, got {len(own)}")
    largest = own.quantile(KEPT)
    sums = sums_by(groups[known], (own <= largest).double(), own.clamp(max=largest))
    return bootstrap(sums, lambda total: total[..., :1] / total[..., 1:], seed=seed)[0]


def participation_ratio(x: Tensor) -> float:
    """(sum of l)^2 / sum of l^2 over the eigenvalues l of the covariance of x [n, d]: how many directions hold the variance."""
    centred = x.double() - x.double().mean(0)
    covariance = centred.mT @ centred
    return (covariance.trace().square() / covariance.square().sum()).item()


def gaussian_like(x: Tensor, *, seed: int) -> Tensor:
    """As many points [n, d] from a normal distribution with the mean and covariance of x: a null without curves or clusters."""
    x = x.double()
    mixed = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.mean(0) + mixed @ (x - x.mean(0)) / len(x) ** 0.5
