"""The atom a step of pursuit takes: the argmax of float64 products, screened in the dictionary's dtype and certified.

The residual is float64, and its products with float32 atoms are not the float32 scores that `topk_encode` ranks. But they
lie near them: a few atoms ranked highest, their products summed in float64, and a bound on what any other atom can reach
decide nearly every token; the few left take more atoms, at last all of them.

The bound, for residual r of norm |r|, its rounding q, atoms of norm at most M, unit roundoff u (2^-24, or 2^-53):
|<r - q, d_j>| <= u |r| M; the sum of d terms errs by at most d 2^-53 |r| M; the score is rounded by u |score|, at most
u (1 + u) |r| M. An atom j that is not among those ranked has score_j <= score_K, the least ranked, so <r, d_j> is at most
<r, d_K> and twice all that, 4 u |r| M + d 2^-51 |r| M; taken is half as much again, and the least float32 for underflow.

Shapes: n tokens, d model dimension, F atoms.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext import ops
from darkmatter_ext.reference import PURSUIT_NOISE

_RANKED = (2, 64)  # atoms looked at by each try; then all
_LARGEST = 1e37  # residuals and products beyond may overflow in float32: no certificate
_BLOCK = 1 << 22  # products, or numbers of atoms widened, at a time where all atoms are looked at: 32 MB


@dataclass(frozen=True)
class PreparedDictionary:
    """A dictionary packed once, for many calls of `pursuit`: see `prepare_dictionary`."""

    rows: Tensor  # [F, d] contiguous, float32 or float64
    no_bias: Tensor  # [F] zeros
    packed: ops.PreparedEncoder
    dtype: torch.dtype = torch.float32  # of the weights found

    @property
    def n_atoms(self) -> int:
        return self.rows.shape[0]

    @functools.cached_property
    def gram(self) -> Tensor:
        """<D_i, D_j> [F, F] float64, made when first asked for."""
        rows = self.rows.double()
        return rows @ rows.mT

    @functools.cached_property
    def largest_norm(self) -> float:
        """Of an atom, rounded up."""
        blocks = self.rows.split(max(1, _BLOCK // self.rows.shape[1]))
        return max(float(block.double().norm(dim=1).max()) for block in blocks) * (1 + 1e-9)

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """How far an atom not ranked can exceed the least ranked one: a factor of the residual's norm, and a constant."""
        d, wide = self.rows.shape[1], self.rows.dtype == torch.float64
        unit = 2.0**-53 if wide else 2.0**-24
        least = 0.0 if wide else 2.0**-149
        return (6 * unit + d * 2.0**-50) * self.largest_norm, 4 * least * (1 + math.sqrt(d) * self.largest_norm)


def best_atoms(
    residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, *, either_sign: bool = False
) -> tuple[Tensor, Tensor]:
    """For each residual [n, d] float64 the atom [n] of the largest product, and that product [n] float64.

    Products that fall short of the largest by at most `noise` [n] are equal to it, and the lowest index is taken.
    either_sign: the largest absolute product.

    Cost: `topk_encode` with k = 2 (twice for either sign); n F d float64 multiply-adds for tokens with more near-ties
    than 64 (a dictionary of copies, or residuals orthogonal to all atoms).
    """
    atoms, products, certified = _best_ranked(residual, noise, dictionary, _RANKED[0], either_sign)
    for ranked in (*_RANKED[1:], None):
        left = (~certified).nonzero()[:, 0]
        if len(left) == 0:
            break
        if ranked is None:
            atoms[left], products[left] = _best_of_all(residual[left], noise[left], dictionary, either_sign)
        else:
            found = _best_ranked(residual[left], noise[left], dictionary, ranked, either_sign)
            atoms[left], products[left], certified[left] = found
    return atoms, products


def _best_ranked(
    residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, ranked: int, either_sign: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the atoms ranked highest, its product, and whether no other atom can be chosen instead: each [n]."""
    rows, ranked = dictionary.rows, min(ranked, dictionary.n_atoms)
    rounded = residual.to(rows.dtype)
    sides = (rounded, -rounded) if either_sign else (rounded,)
    ranks = [
        ops.topk_encode(side, rows.mT, dictionary.no_bias, ranked, prepared=dictionary.packed).indices for side in sides
    ]
    atoms = torch.cat(ranks, 1) if either_sign else ranks[0]
    products = ops.wide_dot(residual, atoms, rows)
    least = products[:, :ranked].amin(1)
    if either_sign:
        least = torch.maximum(least, (-products[:, ranked:]).amin(1))
    scores = products.abs() if either_sign else products
    best = scores.amax(1)
    size, (factor, constant) = residual.norm(dim=1), dictionary.reach
    certified = least + (factor * size + constant) < best - noise
    if ranked == dictionary.n_atoms:
        certified = torch.ones_like(certified)
    certified &= torch.maximum(size, size * dictionary.largest_norm) < _LARGEST
    atom = atoms.masked_fill(scores < (best - noise)[:, None], dictionary.n_atoms).amin(1)
    place = (atoms == atom[:, None]).to(torch.uint8).argmax(1, keepdim=True)
    return atom, products.gather(1, place)[:, 0], certified


def _best_of_all(
    residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, either_sign: bool
) -> tuple[Tensor, Tensor]:
    """The same by all products in float64."""
    n_atoms, d = dictionary.rows.shape
    found = []
    for some, own in zip(*(t.split(max(1, _BLOCK // n_atoms)) for t in (residual, noise)), strict=True):
        blocks = dictionary.rows.split(max(1, _BLOCK // d))
        products = torch.cat([some @ block.double().mT for block in blocks], 1)
        scores = products.abs() if either_sign else products
        atom = lowest_of_the_best(scores, own)
        found.append((atom, products.gather(1, atom[:, None])[:, 0]))
    return torch.cat([atom for atom, _ in found]), torch.cat([product for _, product in found])


def lowest_of_the_best(scores: Tensor, noise: Tensor) -> Tensor:
    """The lowest index [n] of those that fall short of the largest of scores [n, F] by at most noise [n]. (NaN: all do.)"""
    short = scores < (scores.amax(1) - noise)[:, None]
    return short.to(torch.uint8).argmin(1)


def noise_of(target: Tensor, dictionary: PreparedDictionary) -> Tensor:
    """[n]: the size up to which a product of a residual of target [n, d] may be rounding: see `reference.pursuit`."""
    return PURSUIT_NOISE * dictionary.largest_norm * target.norm(dim=1)
