"""The atom a step of pursuit takes: the argmax of float64 products, screened in the dictionary's dtype and certified.

The residual is float64, and its products with float32 atoms are not the float32 scores that `topk_encode` ranks. But they
lie near them: the two best scores and a bound on their errors decide nearly every token. Elsewhere the products of the
atoms ranked highest are summed in float64 and bound what any other atom can reach: of 2, of 64, at last of all.

The bound, for residual r of norm |r|, its rounding q, atoms of norm at most M, unit roundoff u (2^-24, or 2^-53):
|<r - q, d_j>| <= u |r| M; the sum of d terms errs by at most d 2^-53 |r| M; the score is rounded by u |score|, at most
u (1 + u) |r| M. An atom j that is not among those ranked has score_j <= score_K, the least ranked, so <r, d_j> is at most
<r, d_K> and twice all that, 4 u |r| M + d 2^-51 |r| M; taken is half as much again, and the least float32 for underflow.
(Scores are cut off at 0: where the best is negative they decide nothing.)

Shapes: n tokens, d model dimension, F atoms.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.ops.decode import wide_dot
from darkmatter_ext.ops.encode import PreparedEncoder, topk_encode
from darkmatter_ext.ops.reference import PURSUIT_NOISE

_RANKED = (2, 64)  # atoms looked at by the first tries; then all
_LARGEST = 1e37  # residuals and products beyond may overflow in float32: no certificate
_BLOCK = 1 << 22  # products, or numbers of atoms widened, at a time where all atoms are looked at: 32 MB


@dataclass(frozen=True)
class PreparedDictionary:
    """A dictionary packed once, for many calls of `pursuit`: see `prepare_dictionary`."""

    rows: Tensor  # [F, d] contiguous, float32 or float64
    no_bias: Tensor  # [F] zeros
    packed: PreparedEncoder
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


def best_atoms(residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, *, either_sign: bool = False) -> Tensor:
    """The atom [n] of the largest product with each residual [n, d], float64.

    Products that fall short of the largest by at most `noise` [n] are equal to it, and the lowest index is taken.
    either_sign: the largest absolute product.

    Cost: `topk_encode` with k = 2 (twice for either sign); n F d float64 multiply-adds for tokens with more near-ties
    than 64 (a dictionary of copies, or residuals orthogonal to all atoms).
    """
    scores, ranked = _ranked(residual, dictionary, _RANKED[0], either_sign)
    atoms, certified = _by_scores(scores, ranked, residual, noise, dictionary)
    for k in (*_RANKED, dictionary.n_atoms):
        left = (~certified).nonzero()[:, 0]
        if len(left) == 0:
            break
        part = residual[left], noise[left], dictionary, either_sign
        if k == dictionary.n_atoms:
            atoms[left] = _best_of_all(*part)
            break
        some = ranked[left] if k == _RANKED[0] else _ranked(part[0], dictionary, k, either_sign)[1]
        atoms[left], certified[left] = _by_products(some, *part)
    return atoms


def _ranked(residual: Tensor, dictionary: PreparedDictionary, k: int, either_sign: bool) -> tuple[Tensor, Tensor]:
    """Scores (not below 0) and numbers of the k atoms that rank highest [n, k]; either sign: of each sign [n, 2 k]."""
    rounded, k = residual.to(dictionary.rows.dtype), min(k, dictionary.n_atoms)
    sides = (rounded, -rounded) if either_sign else (rounded,)
    columns, no_bias, packed = dictionary.rows.mT, dictionary.no_bias, dictionary.packed
    found = [topk_encode(side, columns, no_bias, k, prepared=packed) for side in sides]
    return torch.cat([acts.values for acts in found], 1), torch.cat([acts.indices for acts in found], 1)


def _by_scores(
    scores: Tensor, ranked: Tensor, residual: Tensor, noise: Tensor, dictionary: PreparedDictionary
) -> tuple[Tensor, Tensor]:
    """The atom of the highest score, and whether no other can be chosen: it leads by more than errors and noise."""
    if scores.shape[1] == 1:  # one atom
        return ranked[:, 0], torch.ones_like(ranked[:, 0], dtype=torch.bool)
    top, place = scores.double().topk(2, dim=1)
    reach, bounded = _reach(residual, dictionary)
    return ranked.gather(1, place[:, :1])[:, 0], (top[:, 0] - top[:, 1] > reach + noise) & bounded


def _by_products(
    ranked: Tensor, residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, either_sign: bool
) -> tuple[Tensor, Tensor]:
    """The atom of the largest product among those ranked, and whether none not ranked can be chosen instead."""
    products = wide_dot(residual, ranked, dictionary.rows)
    if either_sign:
        positive, negative = products.chunk(2, 1)
        least, scores = torch.maximum(positive.amin(1), (-negative).amin(1)), products.abs()
    else:
        least, scores = products.amin(1), products
    enough = scores.amax(1) - noise
    reach, bounded = _reach(residual, dictionary)
    certified = (least + reach < enough) & bounded
    return ranked.masked_fill(scores < enough[:, None], dictionary.n_atoms).amin(1), certified


def _reach(residual: Tensor, dictionary: PreparedDictionary) -> tuple[Tensor, Tensor]:
    """How far the product of an atom may exceed that of one of no lower score [n], and where the bound holds [n]."""
    size, (factor, constant) = residual.norm(dim=1), dictionary.reach
    return factor * size + constant, size * max(1.0, dictionary.largest_norm) < _LARGEST


def _best_of_all(residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, either_sign: bool) -> Tensor:
    """The same by all products in float64."""
    n_atoms, d = dictionary.rows.shape
    found = []
    for some, own in zip(*(t.split(max(1, _BLOCK // n_atoms)) for t in (residual, noise)), strict=True):
        blocks = dictionary.rows.split(max(1, _BLOCK // d))
        products = torch.cat([some @ block.double().mT for block in blocks], 1)
        found.append(lowest_of_the_best(products.abs() if either_sign else products, own))
    return torch.cat(found)


def lowest_of_the_best(scores: Tensor, noise: Tensor) -> Tensor:
    """The lowest index [n] of those that fall short of the largest of scores [n, F] by at most noise [n]. (NaN: all do.)"""
    short = scores < (scores.amax(1) - noise)[:, None]
    return short.to(torch.uint8).argmin(1)


def noise_of(target: Tensor, dictionary: PreparedDictionary) -> Tensor:
    """[n]: the size up to which a product of a residual of target [n, d] may be rounding: see `reference.pursuit`."""
    return PURSUIT_NOISE * dictionary.largest_norm * target.norm(dim=1)
