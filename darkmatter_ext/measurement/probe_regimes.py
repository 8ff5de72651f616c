"""Which rows of a task a probe is fitted on: all, few, few of one label, with wrong labels, from another domain.

Whole documents go to the training or the test side. Training rows are drawn with balanced labels unless imbalance is
asked for. A regime may have several *points*, such as sizes or shares.

Shapes: n rows of a task, m label vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.measurement.probe_tasks import Task
from darkmatter_ext.runtime.inputs import InputError, require, require_at_least, require_one_of

REGIMES = ("normal", "scarcity", "imbalance", "noise", "shift")
TRAIN_SHARE = 0.64  # of a task's documents
IMBALANCED_ROWS = 120  # training rows if one label is rare: every validation fold must have some of it
FEWEST_ROWS = 8  # of the rarer label on either side


@dataclass(frozen=True)
class Regimes:
    """Which training rows are drawn."""

    names: tuple[str, ...] = REGIMES
    train_sizes: tuple[int, ...] = (8, 32, 128, 512)
    imbalances: tuple[float, ...] = (0.1,)
    label_noise: tuple[float, ...] = (0.1, 0.3, 0.5)

    def __post_init__(self) -> None:
        require("normal" in self.names, "regimes", "must have normal among them", " ".join(self.names) or "none")
        for regime in self.names:
            require_one_of("regimes", REGIMES, regime)
        require(bool(self.train_sizes), "train_sizes", "must name at least one number", "none")
        require_at_least("train_sizes", 4, min(self.train_sizes))
        for name in ("imbalances", "label_noise"):
            for share in getattr(self, name):
                require(0 < share <= 0.5, name, "must be above 0 and at most 0.5", share)


class Draw(NamedTuple):
    """Training rows of a task with label vectors, and the rows to test on."""

    rows: Tensor  # [n]
    labels: Tensor  # [n, m]; the last vector is the task's labels permuted
    points: tuple[str, ...]  # names of the other m - 1 vectors: "normal", "scarcity-8", "noise-0.1"
    test: Tensor  # row numbers


def draws(task: Task, regimes: Regimes, *, seed: int) -> list[Draw]:
    """The training rows of one split of a task in every regime, "normal" first.

    The normal regime has the largest of `train_sizes`, or as many rows as balanced labels allow.
    Raises InputError for too few rows of a label.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = _sides(task, seed)
    most = 2 * min(int((task.labels[train] == kind).sum()) for kind in (0, 1))
    largest = min(max(regimes.train_sizes), most)
    found: list[Draw] = []

    def add(rows: Tensor, points: Mapping[str, float], test: Tensor) -> None:
        y = task.labels[rows]
        flipped = [_flipped(y, share, generator) for share in points.values()]
        permuted = y[torch.randperm(len(y), generator=generator)]
        found.append(Draw(rows, torch.stack([*flipped, permuted], dim=1), tuple(points), test))

    noises = {f"noise-{share:g}": share for share in regimes.label_noise if "noise" in regimes.names}
    add(drawn(task.labels, train, largest, 0.5, generator), {"normal": 0.0, **noises}, test)
    for size in sorted(regimes.train_sizes):
        if "scarcity" in regimes.names and size < largest:
            add(drawn(task.labels, train, size, 0.5, generator), {f"scarcity-{size}": 0.0}, test)
    for share in regimes.imbalances if "imbalance" in regimes.names else ():
        rows = drawn(task.labels, train, min(IMBALANCED_ROWS, largest), share, generator)
        add(rows, {f"imbalance-{share:g}": 0.0}, test)
    if "shift" in regimes.names and task.shifts:
        near, far = ((task.domains == domain).nonzero().flatten() for domain in (0, 1))
        add(drawn(task.labels, near, largest, 0.5, generator), {"shift": 0.0}, far)
    return found


def _sides(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the training and the test side, by whole documents; those mostly of one label are divided separately."""
    rule = f"must have at least {FEWEST_ROWS} rows of each label on both sides of a split by document"
    share = torch.zeros(int(task.documents.max()) + 1, dtype=torch.float64)
    share.index_add_(0, task.documents, task.labels.double() - 0.5)
    train = torch.zeros(len(task), dtype=torch.bool)
    for mostly in (False, True):
        rows = ((share[task.documents] > 0) == mostly).nonzero().flatten()
        if len(task.documents[rows].unique()) > 1:
            train[rows] = train_mask(task.documents[rows], fraction=TRAIN_SHARE, seed=seed)
        else:  # at most one document of that kind
            train[rows] = True
    sides = [train.nonzero().flatten(), (~train).nonzero().flatten()]
    for side, rows in zip(("training", "test"), sides, strict=True):
        fewest = min(int((task.labels[rows] == kind).sum()) for kind in (0, 1))
        if fewest < FEWEST_ROWS:
            raise InputError(f"tasks: {rule}, got {fewest} {side} rows of a label in {task.name!r}")
    return sides[0], sides[1]


def drawn(labels: Tensor, rows: Tensor, count: int, share: float, generator: torch.Generator) -> Tensor:
    """`count` of the rows, `share` of them positive, or fewer if there are not enough; at least two of each label."""
    sides = [rows[labels[rows] == kind] for kind in (0, 1)]
    share = min(max(share, 2 / count), 1 - 2 / count)
    count = min(count, int(len(sides[1]) / share), int(len(sides[0]) / (1 - share)))
    sizes = (count - round(share * count), round(share * count))
    return torch.cat(
        [side[torch.randperm(len(side), generator=generator)[:size]] for side, size in zip(sides, sizes, strict=True)]
    )


def _flipped(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels [n] with a share of them flipped."""
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    y = y.clone()
    y[wrong] = 1 - y[wrong]
    return y
