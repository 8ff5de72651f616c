"""The atom that a step of pursuit chooses: the argmax of float64 products, screened in the dictionary's dtype and certified.

The residual is float64, so its products with float32 atoms differ from the float32 scores that `topk_encode` ranks, but
only slightly: the two best scores and a bound on their errors decide nearly every token. Otherwise the products of the
highest-ranked atoms are summed in float64, which bounds what any other atom can reach: first 2, then 64, finally all.

The bound, for a residual r of norm |r|, its rounding q, atoms of norm at most M and unit roundoff u (2^-24, or 2^-53):
|<r - q, d_j>| <= u |r| M; the sum of d terms errs by at most d 2^-53 |r| M; the score is rounded by u |score|, at most
u (1 + u) |r| M. An unranked atom j has score_j <= score_K, the lowest ranked score, so <r, d_j> exceeds <r, d_K> by at
most twice all that, 4 u |r| M + d 2^-51 |r| M. The code uses half as much again, plus the least float32 for underflow.
(Scores are cut off at 0: if the best is negative they decide nothing.)

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

_RANKED = (2, 64)  # atoms examined in the first tries; then all
_LARGEST = 1e37  # larger residuals and products may overflow in float32: no certificate
_BLOCK = 1 << 22  # products, or numbers of atoms widened, at a time when all atoms are examined: 32 MB


@dataclass(frozen=True)
class PreparedDictionary:
    """A dictionary packed once for many calls of `pursuit`: see `prepare_dictionary`."""

    rows: Tensor  # [F, d] contiguous, float32 or float64
    no_bias: Tensor  # [F] zeros
    packed: PreparedEncoder
    dtype: torch.dtype = torch.float32  # dtype of the resulting weights

    @property
    def n_atoms(self) -> int:
        return self.rows.shape[0]

    @functools.cached_property
    def gram(self) -> Tensor:
        """<D_i, D_j> [F, F] float64, computed on first use."""
        rows = self.rows.double()
        return rows @ rows.mT

    @functools.cached_property
    def largest_norm(self) -> float:
        """Largest norm of an atom, rounded up."""
        blocks = self.rows.split(max(1, _BLOCK // self.rows.shape[1]))
        return max(float(block.double().norm(dim=1).max()) for block in blocks) * (1 + 1e-9)

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """How far an unranked atom can exceed the lowest ranked one: a factor of the residual's norm, and a constant."""
        d, wide = self.rows.shape[1], self.rows.dtype == torch.float64
        unit = 2.0**-53 if wide else 2.0**-24
        least = 0.0 if wide else 2.0**-149
        return (6 * unit + d * 2.0**-50) * self.largest_norm, 4 * least * (1 + math.sqrt(d) * self.largest_norm)


def best_atoms(residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, *, either_sign: bool = False) -> Tensor:
    """The atom [n] with the largest product with each residual [n, d], in float64.

    Products within `noise` [n] of the largest count as equal to it, and the lowest index wins.
    either_sign: use the largest absolute product.

    Cost: `topk_encode` with k = 2 (twice for either sign); n F d float64 multiply-adds for tokens with more than 64
    near-ties (a dictionary of copies, or residuals orthogonal to all atoms).
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
    """Scores (at least 0) and numbers of the k highest-ranked atoms [n, k]; for either sign, k of each sign [n, 2 k]."""
    rounded, k = residual.to(dictionary.rows.dtype), min(k, dictionary.n_atoms)
    sides = (rounded, -rounded) if either_sign else (rounded,)
    columns, no_bias, packed = dictionary.rows.mT, dictionary.no_bias, dictionary.packed
    found = [topk_encode(side, columns, no_bias, k, prepared=packed) for side in sides]
    return torch.cat([acts.values for acts in found], 1), torch.cat([acts.indices for acts in found], 1)


def _by_scores(
    scores: Tensor, ranked: Tensor, residual: Tensor, noise: Tensor, dictionary: PreparedDictionary
) -> tuple[Tensor, Tensor]:
    """The atom with the highest score, and whether it is certain: its lead exceeds errors and noise."""
    if scores.shape[1] == 1:  # one atom
        return ranked[:, 0], torch.ones_like(ranked[:, 0], dtype=torch.bool)
    top, place = scores.double().topk(2, dim=1)
    reach, bounded = _reach(residual, dictionary)
    return ranked.gather(1, place[:, :1])[:, 0], (top[:, 0] - top[:, 1] > reach + noise) & bounded


def _by_products(
    ranked: Tensor, residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, either_sign: bool
) -> tuple[Tensor, Tensor]:
    """The ranked atom with the largest product, and whether it is certain: no unranked atom can be chosen instead."""
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
    """How far an atom's product can exceed that of an atom with an equal or higher score [n]; where the bound holds [n]."""
    size, (factor, constant) = residual.norm(dim=1), dictionary.reach
    return factor * size + constant, size * max(1.0, dictionary.largest_norm) < _LARGEST


def _best_of_all(residual: Tensor, noise: Tensor, dictionary: PreparedDictionary, either_sign: bool) -> Tensor:
    """The chosen atom, from all products in float64."""
    n_atoms, d = dictionary.rows.shape
    found = []
    for some, own in zip(*(t.split(max(1, _BLOCK // n_atoms)) for t in (residual, noise)), strict=True):
        blocks = dictionary.rows.split(max(1, _BLOCK // d))
        products = torch.cat([some @ block.double().mT for block in blocks], 1)
        found.append(lowest_of_the_best(products.abs() if either_sign else products, own))
    return torch.cat(found)


def lowest_of_the_best(scores: Tensor, noise: Tensor) -> Tensor:
    """The lowest index [n] whose score is within noise [n] of the largest of scores [n, F]. (With NaN, all are.)"""
    short = scores < (scores.amax(1) - noise)[:, None]
    return short.to(torch.uint8).argmin(1)


def noise_of(target: Tensor, dictionary: PreparedDictionary) -> Tensor:
    """[n]: size up to which a product with a residual of target [n, d] may be mere rounding: see `reference.pursuit`."""
    return PURSUIT_NOISE * dictionary.largest_norm * target.norm(dim=1)
