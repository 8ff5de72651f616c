"""Is the state of a number a helix, or its digits? All fits of a state by its value, with what decides between them.

Shapes: v values, t templates, n prompts, d width of the site, p columns of a fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import bootstrap, ratio, sums_by
from darkmatter_ext.estimators.ridge import dealt_folds, held_out
from darkmatter_ext.estimators.value_fits import (
    States,
    beyond,
    ceiling_sums,
    digit_columns,
    fit_sums,
    helix_columns,
    null_r2,
    polynomial_columns,
    r2,
    states_of,
    waves,
)

FITS = {
    "helix": "linear term, cosine and sine of every period",
    "circle": "the helix without its linear term",
    "digits": "a free state for every digit at every place: the control that decides",
    "polynomial": "as many powers of the value as the helix has columns",
}
BAND, FEWEST_PAIRS, SMOOTH_DEGREE = 0.95, 2, 5
_NOTHING = 1e-9  # of the squares: anything less is rounding


@dataclass(frozen=True)
class ValueFits:
    """Which values are fitted, by what, and how they are held out: each value once, in one of `n_folds`."""

    values: Tensor  # [v] int64
    periods: tuple[float, ...]
    n_folds: int
    draws: int  # of every null
    seed: int

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """The columns [v, p] of each of FITS."""
        helix = helix_columns(self.values, self.periods)
        return {
            "helix": helix,
            "circle": helix_columns(self.values, self.periods, line=False),
            "digits": digit_columns(self.values),
            "polynomial": polynomial_columns(self.values, helix.shape[1]),
        }

    @cached_property
    def folds(self) -> Tensor:
        """[v]"""
        return dealt_folds(len(self.values), min(self.n_folds, len(self.values)), seed=self.seed)

    @cached_property
    def smooth(self) -> Tensor:
        """[v, r]: the lowest powers of the value that have as many columns beyond digits as the helix."""
        digits, wanted = self.columns["digits"], beyond(self.columns["helix"], self.columns["digits"]).shape[1]
        for degree in range(1, len(self.values) - 1):
            new = beyond(polynomial_columns(self.values, degree), digits)
            if new.shape[1] >= wanted:
                return new[:, :wanted]
        return digits[:, :0]


def fit_numbers(h: Tensor, fits: ValueFits) -> dict[str, float]:
    """All fits of states h [v, t, d] with their nulls; intervals by value.

    `r2/beyond_digits`: the share of what digits leave that the helix explains. `r2/smooth_beyond_digits`: the share that the
    same number of low powers of the value explain, which have no period.
    """
    states, seed, columns = states_of(h), fits.seed, fits.columns
    helix, digits = columns["helix"], columns["digits"]
    sums = {name: fit_sums(states, own, fits.folds) for name, own in columns.items()}
    numbers = bootstrap(ceiling_sums(h), r2, seed=seed)[0].numbers("r2/ceiling")
    for name, own in sums.items():
        numbers |= bootstrap(own, r2, seed=seed)[0].numbers(f"r2/{name}")
    for name, new in (("beyond_digits", beyond(helix, digits)), ("smooth_beyond_digits", fits.smooth)):
        more = more_sums(states, digits, sums["digits"], new, fits.folds)
        numbers |= bootstrap(more, r2, seed=seed)[0].numbers(f"r2/{name}")
    explained = [sums[name][:, 1] - sums[name][:, 0] for name in ("helix", "digits")]
    numbers |= ratio(torch.stack(explained, dim=1)).numbers("share_of_digits")
    for period in fits.periods:
        rest = helix_columns(fits.values, [other for other in fits.periods if other != period])
        drop = torch.cat([fit_sums(states, rest, fits.folds)[:, :1], sums["helix"]], dim=1)
        (lost,) = bootstrap(drop, lambda s: (s[..., :1] - s[..., 1:2]) / s[..., 2:], seed=seed)
        numbers |= lost.numbers(f"drop/{period:g}")
    draws = null_r2(states, fits.folds, helix, digits, draws=fits.draws, seed=seed + 11)
    for null, drawn in draws.items():
        own = numbers["r2/beyond_digits" if null == "beyond_digits" else "r2/helix"]
        numbers |= _null(null, drawn, own)
    return numbers


def more_sums(states: States, known: Tensor, alone: Tensor, new: Tensor, folds: Tensor) -> Tensor:
    """[v, 2]: held-out squared error with known and new columns, and with only the known ones (`alone`: their `fit_sums`)."""
    both = fit_sums(states, torch.cat([known, new], dim=1), folds)[:, 0]
    return torch.stack([both, alone[:, 0]], dim=1)


def _null(name: str, drawn: Tensor, own: float) -> dict[str, float]:
    """Median and upper quantile of a null, and the rank of a value within it: its p-value."""
    rank = (1 + int((drawn >= own).sum())) / (1 + len(drawn))
    return {
        f"null/{name}": drawn.median().item(),
        f"null/{name}/high": drawn.quantile(BAND).item(),
        f"rank/{name}": rank,
    }


def part_numbers(h: Tensor, parts: Mapping[str, Tensor], fits: ValueFits) -> dict[str, float]:
    """Helix and digits fitted to Sae(h), b* h and the nonlinear error [v, t, d], and the share of the helix in each.

    `share/helix`: the part's share of the energy that the helix predicts of h (the shares add up to 1);
    `share/all`: the same for the states by value, helix or not.
    """
    columns = fits.columns
    centred = {name: (x.double() - x.double().mean(0)).mean(1) for name, x in {"h": h, **parts}.items()}
    d = h.shape[-1]
    joint = held_out(columns["helix"], torch.cat(list(centred.values()), dim=1), fits.folds)
    moves = dict(zip(centred, (joint.predicted - joint.mean).split(d, dim=1), strict=True))
    numbers: dict[str, float] = {}
    for name, part in parts.items():
        for fit in ("helix", "digits"):
            sums = fit_sums(states_of(part), columns[fit], fits.folds)
            numbers |= bootstrap(sums, r2, seed=fits.seed)[0].numbers(f"r2/{fit}_in_{name}")
        for key, of in (("helix", moves), ("all", centred)):
            sums = torch.stack([(of[name] * of["h"]).sum(1), of["h"].square().sum(1)], dim=1)
            numbers |= ratio(sums).numbers(f"share/{key}_in_{name}")
    return numbers


def moves_between(h: Tensor, fits: ValueFits, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """The difference [n, d] between two values according to each fit of states h [v, t, d], read at values it has not seen.

    Args:
        start, end: [n] places among the values.
    """
    means = (h.double() - h.double().mean(0)).mean(1)
    points = {"value_mean": means}
    for name in ("helix", "digits", "polynomial"):
        points[name] = held_out(fits.columns[name], means, fits.folds).predicted
    return {name: own[end] - own[start] for name, own in points.items()}


def sum_numbers(h: Tensor, a: Tensor, b: Tensor, fits: ValueFits) -> dict[str, float]:
    """What states h [n, d] at the last token of "a + b = ", before the last digit is written, hold about the sum a + b.

    Args:
        a, b: [n] int64, b has one digit, no carry.

    `r2/addends`: from digits of a, its helix and its low powers, plus digits of b. Of what these leave:
    `r2/sum_digits`, from digits of the sum; `r2/sum_helix`, from its helix (the "Clock" of 2502.00873); `r2/sum_waves`, from
    the waves of the helix that are functions of the sum's digits, compared with as many random columns from these digits
    (`sum_digit_columns`) if there are fewer waves than columns. The null of the first two uses the "sum" of digits with
    permuted values, since every function of the pair (last digit of a, b) shares something with the sum. Folds and
    intervals are by that pair, so none is on both sides; pairs whose digits or sum hardly any other pair has are left out
    (`_often`). If the addends leave nothing, only `r2/addends` is returned.
    """
    kept = _often(a % 10, b)
    h, a, b = h[kept], a[kept], b[kept]
    states, total, seed = states_of(h[:, None]), a + b, fits.seed
    pairs, pair = (10 * (a % 10) + b).unique(return_inverse=True)
    folds = dealt_folds(len(pairs), min(fits.n_folds, len(pairs)), seed=seed)[pair]
    of_a = digit_columns(a), helix_columns(a, fits.periods), polynomial_columns(a, SMOOTH_DEGREE)
    known = torch.cat([*of_a, digit_columns(b)], dim=1)
    addends = fit_sums(states, known, folds)
    numbers = bootstrap(sums_by(pair, *addends.unbind(1)), r2, seed=seed)[0].numbers("r2/addends")
    if addends[:, 0].sum() < _NOTHING * addends[:, 1].sum():
        return numbers

    def share(new: Tensor) -> Tensor:
        return more_sums(states, known, addends, new, folds)

    every = torch.cat([known, digit_columns(total)], dim=1)
    inside = [period for period in fits.periods if not beyond(waves(total, period), every).shape[1]]
    columns = {
        "sum_digits": beyond(digit_columns(total), known),
        "sum_helix": beyond(helix_columns(total, fits.periods), known),
        "sum_waves": beyond(torch.cat([known[:, :1], *(waves(total, period) for period in inside)], dim=1), known),
    }
    for name, new in columns.items():
        numbers |= bootstrap(sums_by(pair, *share(new).unbind(1)), r2, seed=seed)[0].numbers(f"r2/{name}")
    generator, digits = torch.Generator().manual_seed(seed + 13), columns["sum_digits"]

    others: dict[str, list[Tensor]] = {"sum_digits": [], "sum_helix": []}
    for _ in range(fits.draws):
        other = a - a % 10 + (_dealt(a % 10, generator) + _dealt(b, generator)) % 10
        others["sum_digits"].append(r2(share(beyond(digit_columns(other), known)).sum(0))[0])
        others["sum_helix"].append(r2(share(beyond(helix_columns(other, fits.periods), known)).sum(0))[0])
    for name, own in others.items():
        numbers |= _null(name, torch.stack(own), numbers[f"r2/{name}"])
    shape = digits.shape[1], columns["sum_waves"].shape[1]
    if 0 < shape[1] < shape[0]:
        mixes = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(fits.draws)]
        mixed = torch.stack([r2(share(digits @ mix).sum(0))[0] for mix in mixes])
        numbers |= _null("sum_digit_columns", mixed, numbers["r2/sum_waves"])
    return numbers


def _dealt(values: Tensor, generator: torch.Generator) -> Tensor:
    """The values with their levels permuted."""
    levels, place = values.unique(return_inverse=True)
    return levels[torch.randperm(len(levels), generator=generator)][place]


def _often(u: Tensor, b: Tensor) -> Tensor:
    """[n] bool: pairs of digits whose u, b and u + b each occur in at least FEWEST_PAIRS of the pairs kept."""
    kept, pair = torch.ones_like(u, dtype=torch.bool), 10 * u + b
    while True:
        before = int(kept.sum())
        for level in (u, b, u + b):
            for value in level[kept].unique().tolist():
                if len(pair[kept & (level == value)].unique()) < FEWEST_PAIRS:
                    kept &= level != value
        if int(kept.sum()) == before:
            return kept
