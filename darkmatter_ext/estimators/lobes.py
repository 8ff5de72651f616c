"""Lobes: latents active in the same chunks of text, compared with clusters of their decoder rows and with nulls.

If labels agree better than permuted ones, they are not independent, but this does not show nearness: rare latents share
small phi and, often, the same part of space. So labels are also permuted within deciles of frequency, rows are drawn with
the same covariance, and every latent's chunks are redrawn. After 2410.19750, section 4, whose code only permutes labels.

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

GAUSSIAN_DRAWS = 5  # draws of rows with the same covariance, each clustered
TRAIN_SHARE = 0.8  # of the latents, for predicting lobes from rows
LOBE_DIRECTIONS = 16  # principal directions of a lobe's rows
TOP_DIRECTIONS = 10  # of the nonlinear error
MOST_LOBES_DRAWN = 20  # draws for the null of the largest lobe: each takes one decomposition per lobe


def middle(counts: Sequence[int]) -> int:
    """The number of clusters used for accuracy and dark matter."""
    return sorted(counts)[len(counts) // 2]


def angles(rows: Tensor) -> Tensor:
    """[F, F] 1 - angle / pi of rows [F, d]."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return 1 - (unit @ unit.mT).clamp(-1, 1).arccos() / torch.pi


def summary(values: Tensor, name: str) -> dict[str, float]:
    """A null, as a result stores it."""
    return {f"{name}/mean": values.mean().item(), f"{name}/sd": values.std().item()}


def _affinity(counts: CoOccurrence, measure: str) -> Tensor:
    """A non-negative affinity: phi is shifted up by 1."""
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
    """Agreement of clusters by co-occurrence and by rows [F, d] of the same latents, with nulls; and the lobes of the middle K.

    Args:
        dealt: the same counts with every latent's chunks redrawn.
        measures: of co-occurrence, including phi.

    Returns `ami/MEASURE/K`; for phi `ami_null/NULL/K/mean` and `/sd` for the nulls permuted, frequency and gaussian;
    `ami_dealt/K` for `dealt`; for the middle K `locality/K` and `locality_null/NULL/K/...`, the balanced accuracy of
    predicting lobes from rows on held-out latents. Cost: an eigensolver per measure and Gaussian draw, F^2 d.
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
    """`ami_random_directions/K`: the agreement of phi with untrained rows [F, d], in their own codes.

    Two rows with a small angle fire on the same x, whatever they are: this much agreement comes from the encoder.
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
    """Whether the nonlinear error, with covariance [d, d], lies in the directions of one lobe.

    `dark/largest_lobe`: the largest share of its energy in LOBE_DIRECTIONS of one lobe, and the null with lobes permuted
    within deciles of frequency. `dark/rows_in_top`: mean share of a row in its TOP_DIRECTIONS, and that of a random direction.
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
