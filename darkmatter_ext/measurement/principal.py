"""How much of an error lies in the few directions in which activations vary most, and what is left without them.

Residual streams have a few directions that hold most of the variance (massive dimensions). FVU is then mostly about them, and
so is what a linear map of x explains. The same shares without the top principal directions of x show whether a reading
holds for the rest. Directions are eigenvectors of the covariance over the fit tokens; the sums are over held-out tokens.

Shapes: n tokens, d width of the site, S SAEs, M directions, G groups of held-out contexts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import LinearStatistics

DIRECTIONS = 8  # directions whose sums are kept
WITHOUT = (1, DIRECTIONS)  # how many are left out in the numbers of a result
SCORES = ("fvu", "fvu_nonlinear", "linear_share")


def n_directions(d: int) -> int:
    """M: at most half of the dimensions, so that something is left."""
    return min(DIRECTIONS, d // 2)


def top_directions(x: LinearStatistics) -> Tensor:
    """[d, M] float64, orthonormal: the directions of largest variance of x, largest first. Cost: one eigh of [d, d]."""
    _, vectors = torch.linalg.eigh(x.moment_xx)
    return vectors[:, -n_directions(len(vectors)) :].flip(1)


def empty(groups: int, saes: int, d: int, device: torch.device) -> Tensor:
    """[G, 2 + 2 S, M] empty sums: see `add_x` and `add_errors`."""
    return torch.zeros(groups, 2 + 2 * saes, n_directions(d), dtype=torch.float64, device=device)


def add_x(sums: Tensor, directions: Tensor, x: Tensor) -> None:
    """Add to rows 0 and 1 of a group's sums [2 + 2 S, M]: components of x [n, d] (minus any fixed vector) and their squares."""
    own = (x @ directions.to(x.dtype)).double()
    sums[:2] += torch.stack([own.sum(0), own.square().sum(0)])


def add_errors(sums: Tensor, number: int, directions: Tensor, *errors: Tensor) -> None:
    """Add squared components of SAE `number`'s error and nonlinear error, both [n, d], to its two rows of a group's sums."""
    for row, error in enumerate(errors, start=2 + 2 * number):
        sums[row] += (error @ directions.to(error.dtype)).double().square().sum(0)


def scores_without(totals: Tensor, tops: Tensor, count: int) -> Tensor:
    """SCORES [..., 3] without the first `count` directions.

    Args:
        totals: [..., 4] over all directions: tokens; sums of squares of x about its mean, of the error, of the nonlinear
            error.
        tops: [..., 4, M] of the components: sums of x, of its square, and of both errors' squares.
    """
    n, *whole = totals.unbind(-1)
    first, square, error, nonlinear = tops[..., :count].unbind(-2)
    left_out = (square - first.square() / n[..., None], error, nonlinear)
    variance, error, nonlinear = (own - top.sum(-1) for own, top in zip(whole, left_out, strict=True))
    return torch.stack([error / variance, nonlinear / variance, 1 - nonlinear / error], dim=-1)
