"""Linear discriminants: directions that separate classes, how parallel differences are, which class a point belongs to.

Everything is fitted on some points and evaluated on others: with more dimensions than points, any labels can be separated
on the points they were fitted on.

Shapes: n points, d dimensions, k classes, m label vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 0.1  # of a covariance towards the mean variance


def _shrunk(covariance: Tensor) -> Tensor:
    d = len(covariance)
    variance = covariance.diagonal().mean().clamp(min=1e-30)
    return (1 - SHRINKAGE) * covariance + SHRINKAGE * variance * torch.eye(d, dtype=covariance.dtype)


def class_means(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """[k, d]: mean of the points [n, d] of each class [n]; 0 for an empty class."""
    sums = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=k).clamp(min=1)[:, None]


def discriminant_directions(x: Tensor, labels: Tensor) -> Tensor:
    """[d, k - 1]: Fisher's directions for points [n, d] with classes [n]; the within-class variance along each is 1.

    The within-class covariance is shrunk (SHRINKAGE), so d may exceed n. Cost: d^3.
    """
    x, k = x.double(), int(labels.max()) + 1
    means = class_means(x, labels, k)
    rest = x - means[labels]
    values, vectors = torch.linalg.eigh(_shrunk(rest.mT @ rest / max(1, len(x) - k)))
    whiten = vectors / values.sqrt()
    weights = torch.bincount(labels, minlength=k).double().sqrt()[:, None]
    between = weights * (means - x.mean(0)) @ whiten
    return whiten @ torch.linalg.svd(between, full_matrices=False).Vh[: k - 1].mT


def parallelogram_quality(d: Tensor, labels: Tensor) -> Tensor:
    """[k]: how much the differences [n, d] of one relation [n] differ: 0 if parallel and equal, 1 if like any two of all.

    Mean of |d_i - d_j|^2 over pairs of pairs, divided by twice the mean of |d_i - mean d|^2 over all; NaN with fewer than two.
    """
    d, k = d.double(), int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).double()
    rest = (d - class_means(d, labels, k)[labels]).square().sum(1)
    within = torch.zeros(k, dtype=torch.float64).index_add_(0, labels, rest)
    pairs = 2 * within / (counts - 1)  # mean over i != j of |d_i - d_j|^2
    everything = (d - d.mean(0)).square().sum(1).mean()
    return torch.where(counts > 1, pairs / (2 * everything), torch.nan)


def silhouette(x: Tensor, labels: Tensor) -> float:
    """Mean over points [n, d] of (b - a) / max(a, b): a is the mean distance to the own class, b to the nearest other."""
    k = int(labels.max()) + 1
    distance = torch.cdist(x.double(), x.double())
    member = torch.nn.functional.one_hot(labels, k).double()
    sums, counts = distance @ member, member.sum(0)
    own = sums.gather(1, labels[:, None])[:, 0] / (counts[labels] - 1).clamp(min=1)
    others = (sums / counts).scatter(1, labels[:, None], torch.inf).amin(1)
    found = torch.where(counts[labels] > 1, (others - own) / torch.maximum(others, own).clamp(min=1e-30), 0)
    return found.mean().item()


def discriminant_accuracy(x: Tensor, labels: Tensor, train: Tensor) -> Tensor:
    """[m]: balanced accuracy of linear discriminants with equal priors on the points not in `train` [n].

    Args:
        x: [n, d].
        labels: [m, n] classes; each label vector is classified separately, all share the covariance of the train points.

    Cost: d^3, and n d + k d^2 per label vector.
    """
    x, k = x.double(), int(labels.max()) + 1
    fit, rest = x[train], x[~train]
    centred = fit - fit.mean(0)
    factor = torch.linalg.cholesky(_shrunk(centred.mT @ centred / len(fit)))
    fit, rest = (
        torch.linalg.solve_triangular(factor, (own - x[train].mean(0)).mT, upper=False).mT for own in (fit, rest)
    )
    found = []
    for own in labels:
        means = class_means(fit, own[train], k)
        scores = rest @ means.mT - means.square().sum(1) / 2
        known = torch.bincount(own[train], minlength=k) > 0
        guess = scores.where(known, -torch.inf).argmax(1)
        truth = own[~train]
        right = torch.zeros(k, dtype=torch.float64).index_add_(0, truth, (guess == truth).double())
        counts = torch.bincount(truth, minlength=k)
        found.append((right[counts > 0] / counts[counts > 0]).mean())
    return torch.stack(found)
