"""Confidence intervals: bootstrap over contexts for quantities of tokens, Student's t over seeds for whole runs.

Tokens of one context are not independent (they share text, and a splice at one position changes the next ones), so whole
contexts are drawn again, and a ratio is a ratio of sums in every draw, never a mean of per-token ratios.

Shapes: C contexts, m quantities, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

LEVEL = 0.95
RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 draws each


@dataclass(frozen=True)
class Interval:
    """A number with a confidence interval of LEVEL."""

    value: float
    low: float
    high: float

    def numbers(self, name: str) -> dict[str, float]:
        """As a result stores it: `name`, `name/low`, `name/high`."""
        return {name: self.value, f"{name}/low": self.low, f"{name}/high": self.high}


def group_sums(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Sums [n_groups, m] in float64 of per-token values [n, m] over the tokens of each group; groups [n] int64."""
    sums = torch.zeros(n_groups, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, groups, values.double())


def bootstrap(
    sums: Tensor, statistic: Callable[[Tensor], Tensor], *, seed: int, resamples: int = RESAMPLES
) -> list[Interval]:
    """Percentile intervals of functions of sums over contexts, drawing whole contexts with replacement.

    Args:
        sums: [C, m], for each context the sums that the statistic is made of.
        statistic: totals [..., m] -> values [..., q], e.g. `lambda s: s[..., :1] / s[..., 1:]`.
        seed: of the draws.
        resamples: B.

    Returns:
        q intervals; `value` is the statistic of all contexts. NaN draws (0/0: nothing of the kind was drawn) are left
        out; low and high are NaN with fewer than two contexts.

    Raises ValueError for no context. Cost: B C m multiply-adds. Source: Efron 1979; Davison and Hinkley 1997, section 3.8.
    """
    n = len(sums)
    if n == 0:
        raise InputError("sums: must hold at least one context, got none")
    values = statistic(sums.sum(0))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    weights = torch.zeros(resamples, n, dtype=sums.dtype).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=sums.dtype)
    )
    if n < 2:
        ends = torch.full((2, len(values)), torch.nan)
    else:
        tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=sums.dtype)
        ends = statistic(weights @ sums).nanquantile(tails, dim=0)
    return [Interval(*row) for row in torch.stack([values, ends[0], ends[1]], dim=1).tolist()]


def jackknife(sums: Tensor, statistic: Callable[[Tensor], Tensor]) -> list[Interval]:
    """Student's t intervals of functions of sums over groups of contexts, leaving out one group at a time.

    For sums too large to keep a context, of which a few groups can be kept. What it covers is the choice of the text that
    the statistic is computed on, not the fit of maps that are held fixed.

    Args:
        sums: [G, m], for each group the sums that the statistic is made of.
        statistic: totals [..., m] -> values [..., q].

    Returns:
        q intervals; `value` is the statistic of all groups, low and high are NaN with fewer than two groups.

    Cost: G evaluations. Source: Tukey 1958; Kott 2001 ("the delete-a-group jackknife").
    """
    from scipy import stats

    n, total = len(sums), sums.sum(0)
    values = statistic(total)
    if n < 2:
        return [Interval(value, float("nan"), float("nan")) for value in values.tolist()]
    without = statistic(total - sums)  # [G, q]
    error = ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1).item() * error
    return [Interval(*row) for row in torch.stack([values, values - half, values + half], dim=1).tolist()]


def r2_interval(y: Tensor, predicted: Tensor, groups: Tensor) -> Interval:
    """R2 of predictions [n] of y [n], with the jackknife's interval over groups of tokens, int64 [n] of any numbers."""
    names, inverse = groups.unique(return_inverse=True)
    y, residual = y.double() - y.double().mean(), (y - predicted).double()
    sums = group_sums(torch.stack([torch.ones_like(y), y, y.square(), residual.square()], dim=1), inverse, len(names))

    def r2(sums: Tensor) -> Tensor:
        n, total, square, sse = sums.unbind(-1)
        return (1 - sse / (square - total.square() / n))[..., None]

    return jackknife(sums, r2)[0]


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean of one number a seed, with Student's t interval; the interval is NaN for one seed.

    Raises ValueError for no value.
    """
    from scipy import stats

    if not values:
        raise InputError("values: must hold at least one seed, got none")
    column = torch.tensor(values, dtype=torch.float64)
    mean, n = column.mean().item(), len(values)
    if n < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1).item() * column.std().item() / n**0.5
    return Interval(mean, mean - half, mean + half)
