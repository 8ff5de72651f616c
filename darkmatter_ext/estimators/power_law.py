"""The power law FVU(W) = c + a W^m of reconstruction error over width, with intervals that are honest for few points.

It has three constants and only a handful of widths. c, the error that no width removes, is an extrapolation, and its
precision depends on how far the curve has bent. So intervals are likelihood profiles (residuals of equal unknown variance,
F-test against the best fit), not a covariance at the optimum: they are asymmetric, stop at the bounds c >= 0, a >= 0,
m < 0, and reach infinity if the points say nothing.

For a fixed m the law is linear in (c, a), so every fit here is a search over m alone, from several starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkmatter_ext.estimators.intervals import LEVEL, Interval
from darkmatter_ext.runtime.inputs import InputError

MINIMUM_WIDTHS = 4  # one more than the law's constants
STEEPEST, FLATTEST = -8.0, -1e-3  # bounds of m; anything flatter is a logarithm, anything steeper a step
STARTS = 24  # brackets of m, evenly spaced in log |m|
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a W^m with 95 % profile intervals, and how well it fits."""

    c: Interval
    a: Interval
    m: Interval
    r2: float  # of the points
    largest_residual: float  # in units of FVU
    n: int  # number of points

    def __call__(self, width: float) -> float:
        """The law at a width."""
        return self.c.value + self.a.value * width**self.m.value

    def numbers(self, name: str) -> dict[str, float]:
        """The law as a result stores it; infinite ends become NaN (not bounded by the points)."""
        found = {}
        for constant in ("c", "a", "m"):
            interval = getattr(self, constant)
            found |= interval.numbers(f"{name}/{constant}")
        quality = {f"{name}/r2": self.r2, f"{name}/largest_residual": self.largest_residual, f"{name}/widths": self.n}
        return {key: value if math.isfinite(value) else math.nan for key, value in (found | quality).items()}


def fit_power_law(widths: Sequence[float], fvu: Sequence[float]) -> PowerLaw:
    """Least-squares fit of FVU(W) = c + a W^m with c, a >= 0 and m < 0.

    Args:
        widths: numbers of latents, at least MINIMUM_WIDTHS different ones.
        fvu: the FVU at each width.

    Raises ValueError for too few widths, different lengths, widths below 1 or values that are not finite.

    Method: variable projection over m; the law is from Engels et al. 2410.14670, section 4, the profiles from Bates and
    Watts 1988, chapter 6. Cost: a few hundred searches over one number, about a tenth of a second.
    """
    x, y = np.asarray(widths, dtype=float), np.asarray(fvu, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"fvu: must have one value a width ({len(x)}), got {len(y)}")
    if len(set(x.tolist())) < MINIMUM_WIDTHS:
        raise InputError(
            f"widths: must be at least {MINIMUM_WIDTHS} different ones for c + a W^m, got {len(set(x.tolist()))}"
        )
    if not np.isfinite(y).all() or not (np.isfinite(x) & (x >= 1)).all():
        raise InputError("widths, fvu: must be finite, widths at least 1, got another value")
    fit = _Fit(x, y)
    m = fit.minimum(fit.free)[1]
    c, a, sse = fit.linear(m)
    n = len(y)
    spare = n - 3
    total = float(((y - y.mean()) ** 2).sum())
    residual = float(np.abs(y - c - a * fit.u**m).max())
    limit = _limit(sse, spare, floor=1e-16 * float((y**2).sum()))
    scale = fit.center ** (-m)
    return PowerLaw(
        c=Interval(
            c, *_profile(lambda v: fit.minimum(fit.with_c(v))[0], c, limit, lowest=0.0, step=max(c, 0.01 * y.max()))
        ),
        a=Interval(a * scale, *_profile_log(lambda v: fit.minimum(fit.with_a(v))[0], a * scale, limit)),
        m=Interval(m, *_profile(fit.free, m, limit, lowest=STEEPEST, highest=FLATTEST, step=0.05)),
        r2=1 - sse / total if total > 0 else math.nan,
        largest_residual=residual,
        n=n,
    )


def _limit(sse: float, spare: int, *, floor: float) -> float:
    """The SSE at which a fixed value of one constant is rejected, with `spare` residual degrees of freedom."""
    from scipy import stats

    t = stats.t.ppf((1 + LEVEL) / 2, spare).item()
    return max(sse, floor) * (1 + t**2 / spare)


class _Fit:
    """Sums of squares of the law on some points, with W in units of their geometric mean (so that a is of the size of FVU)."""

    def __init__(self, x: _Array, y: _Array) -> None:
        self.center = float(np.exp(np.log(x).mean()))
        self.u, self.y = x / self.center, y

    def linear(self, m: float) -> tuple[float, float, float]:
        """The best c and a, both >= 0, for a given m, and their SSE."""
        from scipy.optimize import nnls

        design = np.stack([np.ones_like(self.u), self.u**m], axis=1)
        (c, a), norm = nnls(design, self.y)
        return float(c), float(a), float(norm) ** 2

    def free(self, m: float) -> float:
        """SSE with the best c and a."""
        return self.linear(m)[2]

    def with_c(self, c: float) -> Callable[[float], float]:
        """SSE as a function of m, with the best a."""

        def sse(m: float) -> float:
            v = self.u**m
            a = max(0.0, float(v @ (self.y - c)) / float(v @ v))
            return float(((self.y - c - a * v) ** 2).sum())

        return sse

    def with_a(self, a: float) -> Callable[[float], float]:
        """SSE as a function of m, with the best c; a is in the units of the widths themselves."""

        def sse(m: float) -> float:
            rest = self.y - a * (self.center * self.u) ** m
            return float(((rest - max(0.0, float(rest.mean()))) ** 2).sum())

        return sse

    def minimum(self, sse: Callable[[float], float]) -> tuple[float, float]:
        """The least value over m and where it is, searched between neighbours of a grid evenly spaced in log |m|."""
        from scipy.optimize import minimize_scalar

        grid = -np.geomspace(-FLATTEST, -STEEPEST, STARTS)
        values = [sse(m) for m in grid]
        best = (math.inf, math.nan)
        for i in np.argsort(values)[:3]:
            ends = sorted((grid[max(0, i - 1)], grid[min(STARTS - 1, i + 1)]))
            found: Any = minimize_scalar(sse, bounds=ends, method="bounded", options={"xatol": 1e-10})
            best = min(best, (float(found.fun), float(found.x)), (values[i], float(grid[i])))
        return best


def _profile(
    sse: Callable[[float], float],
    best: float,
    limit: float,
    *,
    step: float,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> tuple[float, float]:
    """The two ends where `sse` rises to `limit`; a bound (or infinity) if it does not."""
    return (
        _end(sse, best, limit, -step, lowest),
        _end(sse, best, limit, step, highest),
    )


def _profile_log(sse: Callable[[float], float], best: float, limit: float) -> tuple[float, float]:
    """As `_profile`, for a constant above 0 that is known by its order of magnitude."""
    if best <= 0:
        return 0.0, math.inf
    low, high = _profile(lambda v: sse(math.exp(v)), math.log(best), limit, step=0.1, lowest=-50.0, highest=50.0)
    return (0.0 if low <= -50 else math.exp(low)), (math.inf if high >= 50 else math.exp(high))


def _end(sse: Callable[[float], float], best: float, limit: float, step: float, bound: float) -> float:
    from scipy.optimize import brentq

    inside = best
    for _ in range(60):
        outside = inside + step
        if (step < 0 and outside <= bound) or (step > 0 and outside >= bound):
            outside = bound
        if sse(outside) > limit:
            if sse(inside) >= limit:
                return inside
            crossing: Any = brentq(lambda v: sse(v) - limit, inside, outside, xtol=1e-12)
            return float(crossing)
        if outside == bound:
            return bound
        inside, step = outside, 2 * step
    return math.copysign(math.inf, step)
