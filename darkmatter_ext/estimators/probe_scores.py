"""AUCs of probes over tasks, splits and regimes, and numbers computed from them: means, sign tests, gains of quivers.

Tasks are the resampled unit, because splits of one task share its texts.

Shapes: T tasks, S splits each, A arrows (see `probes.py`).
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
    """AUC of every arrow: [T, S, A] for each point (a regime at one size or share); NaN if a task has no such point."""

    arrows: list[str]
    validation: dict[str, Tensor]
    test: dict[str, Tensor]

    @classmethod
    def of(cls, points: Mapping[str, Cells], tasks: int, splits: int) -> Scores:
        """Build from point -> cells, all with the same arrows."""
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
    """Mean over tasks [T] with its interval from resampled tasks; NaN tasks are left out."""
    values = values[values.isfinite()]
    sums = torch.stack([values, torch.ones_like(values)], dim=1)
    return bootstrap(sums, lambda totals: totals[..., :1] / totals[..., 1:], seed=seed)[0]


def sign_test(difference: Tensor) -> dict[str, float]:
    """`win_rate`: share of tasks [T] with a positive difference, without ties; `win_p`: two-sided p-value for a fair coin."""
    from scipy.stats import binomtest

    told = difference[difference.isfinite() & (difference != 0)]
    wins = int((told > 0).sum())
    if not len(told):
        return {"win_rate": math.nan, "win_p": math.nan}
    return {"win_rate": wins / len(told), "win_p": float(binomtest(wins, len(told)).pvalue)}


def quiver_gains(
    points: Sequence[str], true: Scores, permuted: Scores, base: Sequence[int], more: Sequence[int]
) -> dict[str, Tensor]:
    """What a quiver gains from more arrows, and its null, for each task [T]; means over points and splits.

    Args:
        permuted: the same arrows fitted on permuted labels and chosen by their own validation AUC.
        base, more: columns of the arrows in the smaller quiver, and of those added.

    Returns `baseline`, the smaller quiver's test AUC; `gain`; `null`, the gain from `more` with permuted labels instead.
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
