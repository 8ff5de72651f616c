"""Which contexts of a measurement have which role, in which group and order they are read, and what each reading adds.

Shapes: C contexts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.measurement.measurement import NORM_FIT, MeasureSettings
from darkmatter_ext.measurement.selection import FIT, HELD_OUT
from darkmatter_ext.runtime.inputs import InputError


class Sweep(NamedTuple):
    """What one reading of some contexts adds: predictors (Gram), errors, norms and scalars, by role."""

    contexts: list[int]
    counted: frozenset[int]
    errors: frozenset[int]
    norms: frozenset[int]


def context_roles(documents: Tensor, settings: MeasureSettings) -> Tensor:
    """[C] the role of each context; for split "tokens" every context is both (roles are dealt by token).

    Raises ValueError when a side would be empty.
    """
    if settings.split == "tokens":
        return torch.full((len(documents),), FIT)
    groups = documents if settings.split == "documents" else torch.arange(len(documents))
    try:
        fit = train_mask(groups, fraction=settings.fit_fraction, seed=settings.seed + 1)
        roles = torch.where(fit, FIT, HELD_OUT)
        if settings.passes == 1:
            rest = train_mask(groups[~fit], fraction=settings.norm_fit_fraction, seed=settings.seed + 2)
            roles[~fit] = torch.where(rest, NORM_FIT, HELD_OUT)
    except ValueError:
        raise InputError(
            f"tokens: must leave {settings.split} on every side of the split, got {len(groups.unique())} {settings.split}"
        ) from None
    return roles


def context_groups(documents: Tensor, roles: Tensor, settings: MeasureSettings) -> Tensor:
    """[C] the group, below `interval_groups`, of each context that has held-out tokens; 0 for the others.

    Documents (contexts, unless documents are what is kept whole) are dealt in a seeded order, groups of about equal size.
    """
    held_out = (roles == HELD_OUT) | (roles == FIT if settings.split == "tokens" else False)
    names = documents if settings.split == "documents" else torch.arange(len(documents))
    found, inverse, sizes = names[held_out].unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(settings.seed + 3))
    before = torch.empty_like(sizes)
    before[order] = sizes[order].cumsum(0) - sizes[order]
    middle = before + sizes / 2
    groups = torch.zeros(len(documents), dtype=torch.int64)
    groups[held_out] = (settings.interval_groups * middle / sizes.sum().clamp(min=1)).long()[inverse]
    return groups


def sweeps(roles: Tensor, settings: MeasureSettings) -> list[Sweep]:
    """The two readings of a measurement: of all contexts each, or of the fit contexts and then the others."""
    by_role = [number for role in (FIT, NORM_FIT, HELD_OUT) for number in (roles == role).nonzero().flatten().tolist()]
    both = frozenset((FIT, HELD_OUT))
    if settings.passes == 2:
        return [Sweep(by_role, both, both, frozenset()), Sweep(by_role, frozenset(), frozenset(), both)]
    n_fit, later = int((roles == FIT).sum()), frozenset((NORM_FIT, HELD_OUT))
    only = frozenset((FIT,))
    return [
        Sweep(by_role[:n_fit], only, only, frozenset()),
        Sweep(by_role[n_fit:], later, frozenset((HELD_OUT,)), later),
    ]
