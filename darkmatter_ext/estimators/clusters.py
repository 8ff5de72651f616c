"""Cluster points by an affinity, and measure how well two clusterings agree, with nulls that preserve cluster sizes.

Shapes: F points, k clusters, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RESTARTS, ITERATIONS = 4, 30  # of k-means
DECILES = 10


def spectral_clusters(affinity: Tensor, counts: Sequence[int], *, seed: int) -> dict[int, Tensor]:
    """Clusters [F] int64 for each number of clusters, from a symmetric non-negative affinity [F, F].

    k-means on the normalised rows of the top eigenvectors of D^-1/2 A D^-1/2. Source: Ng, Jordan, Weiss 2001.
    Cost: an iterative eigensolver for the largest number of clusters.
    """
    from scipy.sparse.linalg import eigsh

    a = affinity.double().cpu()
    degree = a.sum(1).clamp(min=1e-12).rsqrt()
    a = (degree[:, None] * a * degree).numpy()
    most = min(max(counts), len(a))
    if len(a) <= 2 * most + 2:
        vectors = np.linalg.eigh(a)[1][:, -most:]
    else:
        start = np.random.default_rng(seed).standard_normal(len(a))
        vectors = eigsh(a, k=most, which="LA", v0=start)[1]  # ascending
    top = torch.from_numpy(vectors[:, ::-1].copy())
    found = {}
    for k in counts:
        rows = torch.nn.functional.normalize(top[:, :k], dim=1)
        tries = [_k_means(rows, k, torch.Generator().manual_seed(seed + restart)) for restart in range(RESTARTS)]
        found[k] = min(tries, key=lambda pair: pair[0])[1]
    return found


def _k_means(x: Tensor, k: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Sum of squared distances to the centres, and clusters [F], for points [F, d]; started with k-means++."""
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < k:
        nearest = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(nearest, 1, generator=generator)]])
    for _ in range(ITERATIONS):
        labels = torch.cdist(x, centres).argmin(1)
        counts = torch.bincount(labels, minlength=k)[:, None]
        means = torch.zeros_like(centres).index_add_(0, labels, x) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)  # an empty cluster keeps its centre
    distance = torch.cdist(x, centres)
    return distance.amin(1).square().sum().item(), distance.argmin(1)


def adjusted_mutual_information(labels: Tensor, others: Tensor) -> Tensor:
    """[B]: agreement of clusters [F] with others [B, F], all of the same sizes; 0 is expected if independent, 1 if equal.

    Normalised by the mean of both entropies. Source: Vinh, Epps, Bailey 2010. Cost: k^2 F for the expectation, F per draw.
    """
    a, first = torch.bincount(labels), torch.bincount(others[0])
    n = float(len(labels))
    expected = _expected_information(a.numpy(), first.numpy())
    mean_entropy = (_entropy(a / n) + _entropy(first / n)) / 2
    values = []
    for other in others:
        joint = torch.bincount(labels * len(first) + other, minlength=len(a) * len(first)).double() / n
        values.append(_entropy(a / n) + _entropy(first / n) - _entropy(joint))
    found = torch.stack(values) - expected
    rest = mean_entropy - expected
    return found / rest if abs(rest) > 1e-12 else torch.ones_like(found)


def _entropy(p: Tensor) -> Tensor:
    p = p.double()
    return -torch.xlogy(p, p).sum()


def _expected_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mean mutual information of two clusterings with sizes a and b whose points are assigned at random."""
    from scipy.special import gammaln

    n, total = int(a.sum()), 0.0
    for x in a:
        for y in b:
            both = np.arange(max(1, x + y - n), min(x, y) + 1)
            log_p = (
                gammaln(x + 1) + gammaln(y + 1) + gammaln(n - x + 1) + gammaln(n - y + 1) - gammaln(n + 1)
                - gammaln(both + 1) - gammaln(x - both + 1) - gammaln(y - both + 1) - gammaln(n - x - y + both + 1)
            )  # fmt: skip
            total += float((both / n * np.log(n * both / (x * y)) * np.exp(log_p)).sum()) if x * y else 0.0
    return total


def permuted(labels: Tensor, draws: int, *, seed: int, groups: Tensor | None = None) -> Tensor:
    """[B, F]: the labels [F] permuted, within each of `groups` [F] if given."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.zeros_like(labels) if groups is None else groups
    found = labels.repeat(draws, 1)
    for group in groups.unique():
        own = (groups == group).nonzero().flatten()
        order = torch.rand(draws, len(own), generator=generator).argsort(1)
        found[:, own] = labels[own][order]
    return found


def deciles(values: Tensor) -> Tensor:
    """[F]: the decile of each value by rank; equal values are ranked in their order."""
    rank = torch.empty(len(values), dtype=torch.int64)
    rank[values.cpu().argsort(stable=True)] = torch.arange(len(values))
    return rank * DECILES // len(values)
