"""The steps of batched pursuit: which atom is chosen, how weights move, when a token stops. See `pursuit.py`.

Shapes: n tokens in a chunk, d model dimension, F atoms, s places for chosen atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.ops.decode import wide_decode, wide_dot
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary, best_atoms, lowest_of_the_best, noise_of

GRAM_ATOMS = 1024  # up to this many, a step works only on products of atoms (measured: benchmarks/README.md)
DEPENDENT = 1e-10  # an atom with a smaller share of its squared norm outside the span of those chosen adds nothing


@dataclass(frozen=True)
class Rules:
    """What, apart from the number of steps, decides when a token stops and which atoms stay."""

    method: str = "gradient"
    keep_chosen: bool = False
    nonnegative: bool = False
    residual_threshold: float = 0.0
    stop_on_duplicate: bool = False


class Chunk:
    """The state of some tokens: chosen atoms, their weights, the residual. A place in the list, once filled, keeps its atom.

    Everything is float64, whatever the dtype of the dictionary: a residual rounded to float32 in every step would leave
    the path of the float64 definition after a few near-ties.
    """

    _CHANGING = ("residual", "atoms", "weights", "n_chosen", "gram", "right", "scores")

    def __init__(self, target: Tensor, steps: int, dictionary: PreparedDictionary, *, needs_gram: bool) -> None:
        self.dictionary = dictionary
        self.target = target  # [n, d] float64
        self.noise = noise_of(target, dictionary)  # [n]
        self.residual = target.clone()  # written to; the target may be the caller's
        self.atoms = target.new_zeros(len(target), steps, dtype=torch.int64)
        self.weights = target.new_zeros(len(target), steps)
        self.n_chosen = target.new_zeros(len(target), dtype=torch.int64)
        n_gram = steps if needs_gram else 0
        self.scores = target.new_zeros(len(target), 0)  # Gram form: <residual, atom> for all atoms
        self.gram = target.new_zeros(len(target), n_gram, n_gram)  # products among the chosen atoms
        self.right = target.new_zeros(len(target), n_gram)  # and of the chosen atoms with the target

    def rows(self, numbers: Tensor) -> Chunk:
        """A copy of some tokens."""
        part = object.__new__(Chunk)
        part.dictionary = self.dictionary
        for name in ("target", "noise", *self._CHANGING):
            setattr(part, name, getattr(self, name)[numbers])
        return part

    def put(self, numbers: Tensor, part: Chunk) -> None:
        """Write a changed copy back."""
        for name in self._CHANGING:
            getattr(self, name)[numbers] = getattr(part, name)

    def choose(self, atom: Tensor) -> tuple[Tensor, Tensor]:
        """The place [n] of an atom in each token's list, appended if new; and whether it is new [n]."""
        places = torch.arange(self.atoms.shape[1], device=atom.device)
        found = (self.atoms == atom[:, None]) & (places < self.n_chosen[:, None])
        new = ~found.any(1)
        place = torch.where(new, self.n_chosen, found.int().argmax(1))
        self.atoms[_all_rows(atom), place] = atom
        self.n_chosen += new
        return place, new

    def used(self) -> int:
        """Number of places in use by any token: the width of work on the support."""
        return int(self.n_chosen.max())

    def use_gram_form(self) -> None:
        """Represent the residual by its products with all atoms."""
        self.scores = self.target @ self.dictionary.rows.double().mT

    def support(self, place: Tensor, width: int, rules: Rules) -> Tensor:
        """Which of the first `width` places a gradient step moves [n, width]: the atom just chosen and those in use."""
        places = torch.arange(width, device=place.device)
        in_use = places < self.n_chosen[:, None] if rules.keep_chosen else self.weights[:, :width] != 0
        return in_use | (places == place[:, None])

    def decode(self, values: Tensor) -> Tensor:
        """Sum over the places of values [n, s] times their atoms: [n, d]."""
        return wide_decode(values, self.atoms[:, : values.shape[1]], self.dictionary.rows)

    def products(self, rows: Tensor, width: int) -> Tensor:
        """<rows, atom> at each of the first `width` places: [n, width]."""
        return wide_dot(rows, self.atoms[:, :width], self.dictionary.rows)

    def product(self, atom: Tensor) -> Tensor:
        """<residual, atom> for an atom of each token: [n]."""
        return wide_dot(self.residual, atom[:, None], self.dictionary.rows)[:, 0]

    def widen_gram(self, atom: Tensor, place: Tensor, width: int) -> None:
        """Add the products of an atom [n], at its place, with the chosen atoms and with the target."""
        rows, tokens = self.dictionary.rows[atom].double(), _all_rows(atom)
        column = self.products(rows, width)
        self.gram[tokens, place, :width] = column
        self.gram[tokens, :width, place] = column
        self.right[tokens, place] = (rows * self.target).sum(1)

    def refresh_residual(self, width: int) -> None:
        self.residual = self.target - self.decode(self.weights[:, :width])


def _all_rows(tensor: Tensor) -> Tensor:
    return torch.arange(len(tensor), device=tensor.device)


def _gradient_step(chunk: Chunk, rules: Rules) -> Tensor:
    """One step along the gradient of the squared residual, in the weights of the support; returns which tokens are done."""
    place, _ = chunk.choose(best_atoms(chunk.residual, chunk.noise, chunk.dictionary))
    width = chunk.used()
    gradient = chunk.products(chunk.residual, width).masked_fill(~chunk.support(place, width, rules), 0)
    direction = chunk.decode(gradient)
    step, converged = _line_search(gradient, direction.norm(dim=1).square(), chunk.noise)
    moved = chunk.weights[:, :width] + step * gradient
    chunk.weights[:, :width] = moved.clamp(min=0)
    chunk.residual = torch.addcmul(chunk.residual, step, direction, value=-1)
    clamped = (moved < 0).any(1).nonzero()[:, 0]
    if len(clamped):  # there the weights did not move along the gradient
        part = wide_decode(chunk.weights[clamped, :width], chunk.atoms[clamped, :width], chunk.dictionary.rows)
        chunk.residual[clamped] = chunk.target[clamped] - part
    return converged


def _line_search(gradient: Tensor, energy: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Step size [n, 1] along c = gradient D: <c, r> / <c, c>, where <c, r> = <gradient, gradient>; and who has converged.

    The released code divides 0 by 0 for tokens that have converged. A gradient of mere rounding counts as 0.
    """
    converged = (gradient.abs().amax(1) <= noise) | (energy <= 0)
    step = gradient.square().sum(1) / energy.masked_fill(converged, 1)
    return step.masked_fill(converged, 0)[:, None], converged


def _gram_gradient_step(chunk: Chunk, rules: Rules) -> Tensor:
    """The gradient step for a small dictionary: given h = <r, D>, it touches nothing of length d.

    g = h on the support, <c, c> = <g, (g G) on the support>, and h changes by (w - w') G.
    """
    place, _ = chunk.choose(lowest_of_the_best(chunk.scores, chunk.noise))
    width = chunk.used()
    weights, atoms = chunk.weights[:, :width], chunk.atoms[:, :width]
    gradient = chunk.scores.gather(1, atoms).masked_fill(~chunk.support(place, width, rules), 0)
    gram = chunk.dictionary.gram
    change = wide_decode(gradient, atoms, gram)
    step, converged = _line_search(gradient, torch.linalg.vecdot(gradient, change.gather(1, atoms)), chunk.noise)
    moved = weights + step * gradient
    clamped = (moved < 0).any(1).nonzero()[:, 0]
    moved = moved.clamp_(min=0)
    if len(clamped):  # there the weights did not move along the gradient
        change[clamped] = wide_decode((moved - weights)[clamped], atoms[clamped], gram)
        step[clamped] = 1
    chunk.scores.addcmul_(change, step, value=-1)
    chunk.weights[:, :width] = moved
    if rules.residual_threshold > 0:
        chunk.refresh_residual(width)
    return converged


def _matching_step(chunk: Chunk, rules: Rules) -> Tensor:
    """Add the whole product of the best atom to its weight; nothing else changes."""
    atom = best_atoms(chunk.residual, chunk.noise, chunk.dictionary)
    value = chunk.product(atom)
    converged = value <= chunk.noise  # no atom is left to add
    value = value.masked_fill(converged, 0)
    place, new = chunk.choose(atom)
    chunk.weights[_all_rows(atom), place] += value
    chunk.residual = torch.addcmul(chunk.residual, value[:, None], chunk.dictionary.rows[atom].double(), value=-1)
    return converged | ~new if rules.stop_on_duplicate else converged


def _orthogonal_step(chunk: Chunk, rules: Rules) -> Tensor:
    """Add the best atom, then refit all weights by least squares (or non-negative least squares)."""
    atom = best_atoms(chunk.residual, chunk.noise, chunk.dictionary, either_sign=not rules.nonnegative)
    value = chunk.product(atom) if rules.nonnegative else chunk.product(atom).abs()
    before = chunk.rows(_all_rows(atom))
    place, new = chunk.choose(atom)
    width = chunk.used()
    chunk.widen_gram(atom, place, width)
    gram, right = chunk.gram[:, :width, :width], chunk.right[:, :width]
    chosen = torch.arange(width, device=atom.device) < chunk.n_chosen[:, None]
    weights, dependent = _least_squares(gram, right, chosen)
    if rules.nonnegative:
        weights = nonnegative(gram, right, chosen, chunk.weights[:, :width])
    chunk.weights[:, :width] = weights
    chunk.refresh_residual(width)
    # The residual is orthogonal to the chosen atoms: choosing one again, or one in their span, means nothing is left.
    stuck = ~new | (value <= chunk.noise) | dependent
    chunk.put(stuck, before.rows(stuck))
    return stuck


_STEPS: dict[str, Callable[[Chunk, Rules], Tensor]] = {
    "gradient": _gradient_step,
    "matching": _matching_step,
    "orthogonal": _orthogonal_step,
}


def _least_squares(gram: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [n, s] that solve gram w = right on the active places and are 0 elsewhere; which systems are singular [n]."""
    both = active[:, :, None] & active[:, None, :]
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    system = torch.where(both, gram, 0.0) + torch.diag_embed((~active).double())
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = torch.diagonal(factor, dim1=1, dim2=2).square()
    singular = (info != 0) | ((pivots <= DEPENDENT * diagonal) & active).any(1)
    factor = torch.where(
        singular[:, None, None], torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device), factor
    )
    weights = torch.cholesky_solve((right * active)[:, :, None], factor)[:, :, 0]
    return weights * active, singular


def nonnegative(gram: Tensor, right: Tensor, chosen: Tensor, start: Tensor) -> Tensor:
    """Non-negative least squares on the chosen places from a feasible start: Lawson and Hanson 1974, all tokens at once."""
    current, active = _feasible(gram, right, start > 0, start)
    scale = right.abs().amax(1, keepdim=True)
    for _ in range(3 * chosen.shape[1]):
        gain = (right - (gram @ current[:, :, None])[:, :, 0]).masked_fill(~chosen | active, -math.inf)
        best, place = gain.max(1, keepdim=True)
        grows = best > 1e-12 * scale
        if not bool(grows.any()):
            break
        active = active | ((torch.arange(chosen.shape[1], device=place.device) == place) & grows)
        current, active = _feasible(gram, right, active, current)
    return current


def _feasible(gram: Tensor, right: Tensor, active: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Move from feasible weights to least squares on the active places, dropping the first place that hits 0, until none do."""
    weights = current
    for _ in range(active.shape[1] + 1):
        weights, _ = _least_squares(gram, right, active)
        negative = active & (weights <= 0)
        if not bool(negative.any()):
            break
        ratio = torch.where(negative, current / (current - weights).clamp(min=1e-300), math.inf)
        length = ratio.min(1, keepdim=True).values.clamp(max=1)
        leaves = negative & (ratio <= length)
        current = (current + length * (weights - current)).clamp(min=0).masked_fill(leaves, 0)
        active = active & ~leaves
    return weights.clamp(min=0), active


def run_chunk(target: Tensor, l0: Tensor, dictionary: PreparedDictionary, rules: Rules) -> Chunk:
    """Run all steps of some tokens. A token that is done leaves the batch at once."""
    chunk = Chunk(target, int(l0.max()), dictionary, needs_gram=rules.method == "orthogonal")
    step_of = _STEPS[rules.method]
    if rules.method == "gradient" and dictionary.n_atoms <= GRAM_ATOMS:
        chunk.use_gram_form()
        step_of = _gram_gradient_step
    part, numbers = chunk, _all_rows(l0)
    done = l0 <= 0
    for step in range(1, int(l0.max()) + 1):
        if bool(done.any()):
            if part is not chunk:
                chunk.put(numbers[done], part.rows(done))
            numbers, part = numbers[~done], part.rows(~done)
        if len(numbers) == 0:
            return chunk
        done = step_of(part, rules) | (l0[numbers] <= step)
        if rules.residual_threshold > 0:
            done = done | (part.residual.norm(dim=1) < rules.residual_threshold)
    if part is not chunk:
        chunk.put(numbers, part)
    return chunk
