"""Lobes: latents that are active in the same chunks of text, beside clusters of their decoder rows, and beside nulls.

That labels agree better than permuted ones tests independence, not nearness: rare latents share small phi and, often, the
same part of space. So labels are also permuted within deciles of frequency, rows are drawn with the same covariance, and
every latent's chunks are dealt anew. After 2410.19750, section 4, whose code permutes labels only.

Shapes: F latents, d width of the site, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from darkmatter_ext.estimators.clusters import adjusted_mutual_information, deciles, permuted, spectral_clusters
from darkmatter_ext.estimators.co_occurrence import CoOccurrence
from darkmatter_ext.estimators.discriminant import discriminant_accuracy
from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.estimators.spectrum import same_covariance

GAUSSIAN_DRAWS = 5  # of rows with the same covariance, each clustered
TRAIN_SHARE = 0.8  # of the latents, for telling lobes from rows
LOBE_DIRECTIONS = 16  # principal directions of a lobe's rows
TOP_DIRECTIONS = 10  # of the nonlinear error
MOST_LOBES_DRAWN = 20  # draws of the null of the largest lobe: each takes a decomposition a lobe


def middle(counts: Sequence[int]) -> int:
    """The number of clusters that is read for accuracy and dark matter."""
    return sorted(counts)[len(counts) // 2]


def angles(rows: Tensor) -> Tensor:
    """[F, F] 1 - angle / pi of rows [F, d]."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return 1 - (unit @ unit.mT).clamp(-1, 1).arccos() / torch.pi


def summary(values: Tensor, name: str) -> dict[str, float]:
    """A null as a result stores it."""
    return {f"{name}/mean": values.mean().item(), f"{name}/sd": values.std().item()}


def _affinity(counts: CoOccurrence, measure: str) -> Tensor:
    """At least 0: phi is moved up by 1."""
    return counts.affinity(measure).nan_to_num(0) + (1 if measure == "phi" else 0)


def lobe_numbers(
    counts: CoOccurrence,
    dealt: CoOccurrence,
    rows: Tensor,
    clusters: Sequence[int],
    measures: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> tuple[dict[str, float], Tensor]:
    """Agreement of clusters by co-occurrence and by rows [F, d] of the same latents, beside nulls; and the middle K's lobes.

    Args:
        dealt: with every latent's chunks dealt anew.
        measures: of co-occurrence, phi among them.

    Returns `ami/MEASURE/K`; of phi `ami_null/NULL/K/mean` and `/sd` for the nulls permuted, frequency and gaussian;
    `ami_dealt/K` of `dealt`; `locality/K` and `locality_null/NULL/K/...`, the balanced accuracy of rows for lobes on
    latents left out, for the middle K. Cost: an eigensolver a measure and a Gaussian draw, F^2 d.
    """
    by_rows = spectral_clusters(angles(rows), clusters, seed=seed)
    frequency = deciles(counts.counts)
    numbers: dict[str, float] = {}
    together: dict[int, Tensor] = {}
    for measure in measures:
        found = spectral_clusters(_affinity(counts, measure), clusters, seed=seed)
        together = found if measure == "phi" else together
        for k in clusters:
            numbers[f"ami/{measure}/{k}"] = adjusted_mutual_information(found[k], by_rows[k][None]).item()
    elsewhere = spectral_clusters(_affinity(dealt, "phi"), clusters, seed=seed)
    clouds = [
        spectral_clusters(angles(same_covariance(rows, seed=seed + draw)), clusters, seed=seed)
        for draw in range(GAUSSIAN_DRAWS)
    ]
    for k in clusters:
        numbers[f"ami_dealt/{k}"] = adjusted_mutual_information(elsewhere[k], by_rows[k][None]).item()
        for name, groups in (("permuted", None), ("frequency", frequency)):
            null = permuted(by_rows[k], draws, seed=seed, groups=groups)
            numbers |= summary(adjusted_mutual_information(together[k], null), f"ami_null/{name}/{k}")
        values = torch.stack([adjusted_mutual_information(together[k], cloud[k][None])[0] for cloud in clouds])
        numbers |= summary(values, f"ami_null/gaussian/{k}")
    k = middle(clusters)
    train = train_mask(torch.arange(len(rows)), fraction=TRAIN_SHARE, seed=seed)
    lobes = together[k]
    numbers[f"locality/{k}"] = discriminant_accuracy(rows, lobes[None], train).item()
    for name, groups in (("permuted", None), ("frequency", frequency)):
        null = discriminant_accuracy(rows, permuted(lobes, draws, seed=seed, groups=groups), train)
        numbers |= summary(null, f"locality_null/{name}/{k}")
    return numbers, lobes


def random_numbers(counts: CoOccurrence, rows: Tensor, clusters: Sequence[int], *, seed: int) -> dict[str, float]:
    """`ami_random_directions/K`: the agreement of phi with rows [F, d] that nobody trained, in their own codes.

    Two rows with a small angle fire on the same x, whatever they are: so much agreement is the encoder's doing.
    """
    together = spectral_clusters(_affinity(counts, "phi"), clusters, seed=seed)
    by_rows = spectral_clusters(angles(rows), clusters, seed=seed)
    return {
        f"ami_random_directions/{k}": adjusted_mutual_information(together[k], by_rows[k][None]).item()
        for k in clusters
    }


def dark_numbers(
    rows: Tensor, lobes: Tensor, frequency: Tensor, covariance: Tensor, *, draws: int, seed: int
) -> dict[str, float]:
    """Whether the nonlinear error, of covariance [d, d], lies in one lobe's directions.

    `dark/largest_lobe`, the greatest share of its energy in LOBE_DIRECTIONS of one lobe, and its null of lobes dealt
    within deciles of frequency; `dark/rows_in_top`, mean share of a row in its TOP_DIRECTIONS, and of a random direction.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    top = vectors[:, -TOP_DIRECTIONS:]

    def largest(labels: Tensor) -> Tensor:
        shares = []
        for lobe in labels.unique():
            own = torch.linalg.svd(unit[labels == lobe], full_matrices=False).Vh[:LOBE_DIRECTIONS]
            shares.append((own @ vectors).square().sum(0) @ values / values.sum())
        return torch.stack(shares).max()

    null = torch.stack(
        [largest(own) for own in permuted(lobes, min(draws, MOST_LOBES_DRAWN), seed=seed, groups=frequency)]
    )
    return {
        "dark/largest_lobe": largest(lobes).item(),
        **summary(null, "dark/largest_lobe_null"),
        "dark/rows_in_top": (unit @ top).square().sum(1).mean().item(),
        "dark/rows_in_top_random": min(1.0, TOP_DIRECTIONS / len(values)),
    }
