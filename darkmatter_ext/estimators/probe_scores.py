"""AUCs of probes over tasks, splits and regimes, and the numbers made of them: means, sign tests, what quivers gain.

The unit that is drawn again is the task: splits of one task share its texts.

Shapes: T tasks, S splits of each, A arrows (see `probes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, bootstrap
from darkmatter_ext.estimators.probes import quiver

Cells = Mapping[tuple[int, int], Mapping[str, tuple[float, float]]]  # (task, split) -> arrow -> validation and test AUC


class Scores(NamedTuple):
    """AUC of every arrow, NaN where a task has no such point: [T, S, A] for each (a regime at one size or share)."""

    arrows: list[str]
    validation: dict[str, Tensor]
    test: dict[str, Tensor]

    @classmethod
    def of(cls, points: Mapping[str, Cells], tasks: int, splits: int) -> Scores:
        """From point -> cells, all of which have the same arrows."""
        arrows = list(next(iter(next(iter(points.values())).values())))
        scores = cls(arrows, {}, {})
        for point, cells in points.items():
            both = torch.full((2, tasks, splits, len(arrows)), math.nan, dtype=torch.float64)
            for (task, split), values in cells.items():
                both[:, task, split] = torch.tensor([values[name] for name in arrows], dtype=torch.float64).T
            scores.validation[point], scores.test[point] = both
        return scores

    def points(self, regime: str) -> list[str]:
        """The points of a regime: "noise" has "noise-0.1" and so on."""
        return [point for point in self.test if point.partition("-")[0] == regime]


def over_tasks(values: Tensor, *, seed: int) -> Interval:
    """Mean over tasks [T] with its interval, drawing tasks again; NaN tasks are left out."""
    values = values[values.isfinite()]
    sums = torch.stack([values, torch.ones_like(values)], dim=1)
    return bootstrap(sums, lambda totals: totals[..., :1] / totals[..., 1:], seed=seed)[0]


def sign_test(difference: Tensor) -> dict[str, float]:
    """`win_rate`, the share of tasks [T] with a positive difference, ties left out; `win_p`, two-sided, of a fair coin."""
    from scipy.stats import binomtest

    told = difference[difference.isfinite() & (difference != 0)]
    wins = int((told > 0).sum())
    if not len(told):
        return {"win_rate": math.nan, "win_p": math.nan}
    return {"win_rate": wins / len(told), "win_p": float(binomtest(wins, len(told)).pvalue)}


def quiver_gains(
    points: Sequence[str], true: Scores, permuted: Scores, base: Sequence[int], more: Sequence[int]
) -> dict[str, Tensor]:
    """What a quiver gains by more arrows, and its null, of each task [T], means over points and splits.

    Args:
        permuted: the same arrows fitted on permuted labels: chosen among with their own validation AUC.
        base, more: columns of the arrows of the smaller quiver, and of those that are added.

    Returns `baseline`, the smaller quiver's test AUC; `gain`; `null`, the gain by `more` of permuted labels instead.
    """
    found: dict[str, list[Tensor]] = {"baseline": [], "gain": [], "null": []}
    for point in points:
        alone = quiver(true.validation[point][..., base], true.test[point][..., base])
        found["baseline"].append(alone)
        for key, other in (("gain", true), ("null", permuted)):
            validation, test = (
                torch.cat([own[..., base], theirs[..., more]], dim=-1)
                for own, theirs in (
                    (true.validation[point], other.validation[point]),
                    (true.test[point], other.test[point]),
                )
            )
            found[key].append(quiver(validation, test) - alone)
    return {key: torch.stack(own).nanmean((0, 2)) for key, own in found.items()}
