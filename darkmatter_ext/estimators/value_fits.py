"""How well functions of a whole number predict vectors that represent it: waves, digits and powers, on held-out values.

Shapes: v values, t examples of each (templates), d width, p columns of a fit; q axes of the span of the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import lstsq
from darkmatter_ext.estimators.ridge import held_out

_RANK = 1e-9  # of the largest singular value: below it, columns add nothing new


def waves(values: Tensor, period: float) -> Tensor:
    """Cosine and sine [v, 2] of a period; only the cosine if the sine is 0 at every whole number."""
    angle = 2 * math.pi * values.double() / period
    columns = torch.stack([angle.cos(), angle.sin()], dim=1)
    return columns[:, :1] if period == 2 else columns


def helix_columns(values: Tensor, periods: Iterable[float], *, line: bool = True) -> Tensor:
    """[v, p], without the constant, which every fit has."""
    own = [values.double()[:, None]] if line else []
    return torch.cat([*own, *(waves(values, period) for period in periods)], dim=1)


def digit_columns(values: Tensor) -> Tensor:
    """One column for every digit at every place, [v, places x 10], and for no digit there."""
    columns, left = [], values
    for place in range(len(str(int(values.max())))):
        written = left > 0 if place else torch.ones_like(left, dtype=torch.bool)
        digit = torch.where(written, left % 10, 10)
        columns.append(torch.nn.functional.one_hot(digit, 11))
        left = left // 10
    return torch.cat(columns, dim=1).double()


def polynomial_columns(values: Tensor, degree: int) -> Tensor:
    """Legendre-like powers [v, degree] of the value scaled to -1..1, orthogonal over the values."""
    x = values.double()
    x = 2 * (x - x.min()) / (x.max() - x.min()) - 1
    return torch.linalg.qr(torch.stack([x**power for power in range(degree + 1)], dim=1)).Q[:, 1:]


class States(NamedTuple):
    """The states of values in templates, with each template's mean subtracted."""

    means: Tensor  # [v, q] over templates, in axes of their own span
    within: Tensor  # [v] sum over templates of |state - mean|^2
    templates: int


def states_of(h: Tensor) -> States:
    """States of h [v, t, d], rotated into the span of the means: fits and errors are the same there, and faster."""
    h = h.double()
    h = h - h.mean(0)
    means = h.mean(1)
    u, s, _ = torch.linalg.svd(means, full_matrices=False)
    return States(u * s, (h - means[:, None]).square().sum((1, 2)), h.shape[1])


def fit_sums(states: States, columns: Tensor, folds: Tensor) -> Tensor:
    """[v, 2]: squared error of held-out predictions, and squares about the mean that the fit saw, summed over templates."""
    found = held_out(columns, states.means, folds)
    rest = (states.means - found.predicted).square().sum(1)
    about = (states.means - found.mean).square().sum(1)
    return torch.stack([states.within + states.templates * rest, states.within + states.templates * about], dim=1)


def r2(sums: Tensor) -> Tensor:
    """R2 from sums [..., 2]."""
    return 1 - sums[..., :1] / sums[..., 1:]


def ceiling_sums(h: Tensor) -> Tensor:
    """[v, 2]: squared error of predicting by the mean of the other templates, and squares about the mean of all values."""
    h = h.double() - h.double().mean(0)
    t = h.shape[1]
    others = (h.sum(1, keepdim=True) - h) / (t - 1)
    return torch.stack([(h - others).square().sum((1, 2)), h.square().sum((1, 2))], dim=1)


def beyond(columns: Tensor, known: Tensor) -> Tensor:
    """Orthonormal columns [v, r] for the part of columns [v, p] beyond a constant and known columns [v, m]; r may be 0."""
    columns = (columns - columns.mean(0)) / columns.std(0).clamp(min=torch.finfo(columns.dtype).tiny)
    base = torch.cat([torch.ones_like(known[:, :1]), known], dim=1)
    u, s, _ = torch.linalg.svd(base, full_matrices=False)
    u = u[:, s > _RANK * s.max()]
    rest, left, _ = torch.linalg.svd(columns - u @ (u.mT @ columns), full_matrices=False)
    return rest[:, left > _RANK * len(columns) ** 0.5]


def null_r2(
    states: States, folds: Tensor, helix: Tensor, digits: Tensor, *, draws: int, seed: int
) -> dict[str, Tensor]:
    """R2 of as many columns as a helix [v, p] has that are not this helix, [draws] each.

    `permuted`: the helix of another value. `periods`: a line and waves with periods drawn from 2 to 100. `digit_columns`:
    random combinations of the digit columns. `beyond_digits`: the share of what digits leave that `beyond`, for another
    value, explains.
    """
    generator, n, width = torch.Generator().manual_seed(seed), len(helix), helix.shape[1]
    found: dict[str, list[float]] = {name: [] for name in ("permuted", "periods", "digit_columns", "beyond_digits")}
    values, left = torch.arange(n), fit_sums(states, digits, folds)[:, 0].sum()
    new = beyond(helix, digits)
    for _ in range(draws):
        order = torch.randperm(n, generator=generator)
        periods = (2 + 98 * torch.rand(width, generator=generator)).tolist()
        mixed = digits @ torch.randn(digits.shape[1], width, generator=generator, dtype=torch.float64)
        columns = {
            "permuted": helix[order], "periods": helix_columns(values, periods)[:, :width], "digit_columns": mixed
        }  # fmt: skip
        for name, own in columns.items():
            found[name].append(r2(fit_sums(states, own, folds).sum(0)).item())
        rest = fit_sums(states, torch.cat([digits, beyond(new[order], digits)], dim=1), folds)[:, 0].sum()
        found["beyond_digits"].append((1 - rest / left).item())
    return {name: torch.tensor(drawn) for name, drawn in found.items()}


def spectrum(means: Tensor, values: Tensor, *, draws: int, level: float, seed: int) -> tuple[dict[float, float], float]:
    """Share of the energy of mean states [v, q], after removing a line, at every period v / j; and the permutation band of
    the largest share."""
    x = values.double()
    line = torch.stack([torch.ones_like(x), x - x.mean()], dim=1)
    rest = means - line @ lstsq(line, means)
    n = len(values)

    def power(h: Tensor) -> Tensor:
        found = torch.fft.rfft(h, dim=0).abs().square().sum(1)[1:]
        twice = torch.full_like(found, 2.0)
        if n % 2 == 0:
            twice[-1] = 1  # period 2 has no partner
        return twice * found / (n * h.square().sum())

    generator = torch.Generator().manual_seed(seed)
    largest = [power(rest[torch.randperm(n, generator=generator)]).max().item() for _ in range(draws)]
    own = {n / j: share for j, share in enumerate(power(rest).tolist(), start=1)}
    return own, torch.tensor(largest).quantile(level).item()
