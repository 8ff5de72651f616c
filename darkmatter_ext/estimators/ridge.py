"""Ridge regression with held-out predictions: folds of whole groups, penalty chosen by leaving out one row of the fit side.

Shapes: n rows (groups, such as values), p features, q targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

PENALTIES = (1e-8, *(10.0**power for power in range(-4, 4)))  # times rows, for features of unit variance
_VARIES = 1e-10  # of the largest spread: a feature below it counts as constant


class HeldOut(NamedTuple):
    """Predictions for rows by fits that did not see them."""

    predicted: Tensor  # [n, q]
    mean: Tensor  # [n, q] mean of the targets each fit saw: the prediction of a model without features


def dealt_folds(n: int, count: int, *, seed: int) -> Tensor:
    """The fold of each of n rows, [n] int64, in a seeded order, with sizes as equal as possible.

    Raises InputError for fewer than two folds, or more folds than rows.
    """
    if not 2 <= count <= n:
        raise InputError(f"count: must be from 2 to the {n} rows, got {count}")
    folds = torch.empty(n, dtype=torch.int64)
    folds[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] = torch.arange(n) % count
    return folds


def held_out(features: Tensor, targets: Tensor, folds: Tensor) -> HeldOut:
    """Predictions for every row from a ridge fit, with free intercept, on the rows of all other folds.

    Args:
        features: [n, p]; constant ones have no effect. p may be 0.
        targets: [n, q].
        folds: [n] int64.

    Each fold uses the one of PENALTIES that does best at leaving out one row of the fit side (Golub, Heath, Wahba 1979).
    Cost: per fold, an SVD of [n, p] and n q operations for each penalty and feature.
    """
    features, targets = features.double(), targets.double()
    predicted, means = torch.empty_like(targets), torch.empty_like(targets)
    for fold in folds.unique().tolist():
        test = folds == fold
        x, y = features[~test], targets[~test]
        x_mean, y_mean = x.mean(0), y.mean(0)
        spread = (x - x_mean).square().mean(0).sqrt()
        varies = spread > _VARIES * spread.max() if len(spread) else spread.bool()
        x, y = ((x - x_mean) / spread)[:, varies], y - y_mean
        means[test] = y_mean
        predicted[test] = y_mean
        if varies.any():
            weight = _best(x, y)
            predicted[test] += ((features[test] - x_mean) / spread)[:, varies] @ weight
    return HeldOut(predicted, means)


def _best(x: Tensor, y: Tensor) -> Tensor:
    """[p, q]: ridge weights for the penalty that best predicts left-out rows; x and y have mean 0."""
    n = len(x)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    along = u.mT @ y
    best, chosen = torch.inf, s
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + n * penalty)
        fitted = (u * shrink) @ along
        leverage = (u.square() * shrink).sum(1) + 1 / n
        error = ((y - fitted) / (1 - leverage).clamp(min=1e-6)[:, None]).square().sum().item()
        if error < best:
            best, chosen = error, s / (s.square() + n * penalty)
    return vt.mT @ (chosen[:, None] * along)
