"""The order in which the contexts of a measurement are read, and what each reading adds. See `tokens.py` for roles."""

from __future__ import annotations

from typing import NamedTuple

from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, NORM_FIT, TokenRoles


class Sweep(NamedTuple):
    """What one reading of some contexts adds: predictors (Gram), errors, norms and scalars, by role."""

    contexts: list[int]
    counted: frozenset[int]
    errors: frozenset[int]
    norms: frozenset[int]


def sweeps(roles: TokenRoles) -> list[Sweep]:
    """The two readings of a measurement: each of all contexts, or first the fit contexts and then the others."""
    order = (FIT, NORM_FIT, HELD_OUT)
    by_role = [number for role in order for number in (roles.contexts == role).nonzero().flatten().tolist()]
    both = frozenset((FIT, HELD_OUT))
    if roles.settings.passes == 2:
        return [Sweep(by_role, both, both, frozenset()), Sweep(by_role, frozenset(), frozenset(), both)]
    n_fit, later = int((roles.contexts == FIT).sum()), frozenset((NORM_FIT, HELD_OUT))
    only = frozenset((FIT,))
    return [
        Sweep(by_role[:n_fit], only, only, frozenset()),
        Sweep(by_role[n_fit:], later, frozenset((HELD_OUT,)), later),
    ]
