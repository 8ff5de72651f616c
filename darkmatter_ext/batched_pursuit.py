"""Batched sparse pursuit over a dictionary: gradient, matching and orthogonal pursuit, exact, without an [N, F] array.

Every step chooses one atom a token with a screened, certified argmax (`topk_encode` of the residuals, k = 1: the float64 dot
products of the given numbers decide, ties go to the lower index) and then works on the chosen atoms alone. Definitions:
`reference.pursuit` says the same with dense float64 products.

Sources: gradient pursuit, Blumensath and Davies 2008, in the variant of Smith, "Improving SAEs by using gradient pursuit"
(2024), and of Engels et al. 2024; matching pursuit, Mallat and Zhang 1993, as SAELens' matching_pursuit; orthogonal matching
pursuit, Pati et al. 1993, and its non-negative form, Bruckstein et al. 2008.

Shapes: N tokens, d model dimension, F atoms, S steps (the largest l0), x [..., d], dictionary [F, d].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext import ops
from darkmatter_ext.sparse import SparseActs

METHODS = ("gradient", "matching", "orthogonal")
CHUNK_TOKENS = 1024  # at a time: residuals stay in the cache, progress is seen, an interrupt is prompt
GRAM_ATOMS = 1024  # at most: a step then works on products of atoms alone (measured: benchmarks/README.md)
_TIE = 1e-12  # Gram form: products closer than this share of a token's largest are equal, the lower index wins
_GATHERED = 1 << 22  # elements of atoms gathered at once by refit: 32 MB in float64
DEPENDENT = 1e-10  # share of an atom's squared norm outside the span of those chosen below which it adds nothing


@dataclass(frozen=True)
class Rules:
    """What besides the steps decides when a token stops and which atoms stay."""

    method: str = "gradient"
    keep_chosen: bool = False
    nonnegative: bool = False
    residual_threshold: float = 0.0
    stop_on_duplicate: bool = False


@dataclass(frozen=True)
class PreparedDictionary:
    """A dictionary packed once, for many calls of `pursuit`: see `prepare_dictionary`."""

    rows: Tensor  # [F, d] contiguous, float32 or float64
    no_bias: Tensor  # [F] zeros
    packed: ops.PreparedEncoder

    @property
    def n_atoms(self) -> int:
        return self.rows.shape[0]

    @functools.cached_property
    def gram(self) -> Tensor:
        """<D_i, D_j> [F, F] float64, made when first asked for."""
        rows = self.rows.double()
        return rows @ rows.mT


@torch.no_grad()
def prepare_dictionary(dictionary: Tensor) -> PreparedDictionary:
    """Pack a dictionary [F, d] once. It is a copy: after an edit prepare again. 16-bit atoms are widened to float32.

    Raises TypeError / ValueError: not a floating-point matrix on the CPU, no atoms, or not finite.

    Cost: a few passes over the dictionary; memory F d elements, and a quarter of that for its 8-bit codes.
    """
    if not isinstance(dictionary, Tensor) or not dictionary.is_floating_point() or dictionary.layout != torch.strided:
        given = dictionary.dtype if isinstance(dictionary, Tensor) else type(dictionary).__name__
        raise TypeError(f"dictionary: must be a dense floating-point tensor, got {given}")
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise ValueError(f"dictionary: must have shape [F, d] with at least one atom, got {list(dictionary.shape)}")
    if dictionary.device.type != "cpu":
        raise ValueError(f"dictionary: must be on the CPU in this build, got {dictionary.device}")
    if not bool(dictionary.isfinite().all()):
        raise ValueError(f"dictionary: must be finite, got NaN or Inf in shape {list(dictionary.shape)}")
    rows = dictionary.detach()
    rows = (rows if rows.dtype == torch.float64 else rows.float()).contiguous()
    no_bias = rows.new_zeros(len(rows))
    packed = ops.prepare_encoder(rows.mT, no_bias)
    return PreparedDictionary(packed.weight, no_bias, packed)


class _Chunk:
    """The state of some tokens: chosen atoms, their weights, the residual. A place in the list is filled once for good."""

    _CHANGING = ("residual", "atoms", "weights", "n_chosen", "gram", "right", "scores")

    def __init__(self, target: Tensor, steps: int, dictionary: PreparedDictionary, *, needs_gram: bool) -> None:
        self.dictionary = dictionary
        self.target = target  # [n, d]
        self.residual = target.clone()  # written to; the target is the caller's
        self.atoms = torch.zeros(len(target), steps, dtype=torch.int64)
        self.weights = target.new_zeros(len(target), steps)
        self.n_chosen = torch.zeros(len(target), dtype=torch.int64)
        n_gram = steps if needs_gram else 0
        self.scores = torch.zeros(len(target), 0, dtype=torch.float64)  # Gram form: <residual, atom> for all atoms
        self.gram = torch.zeros(len(target), n_gram, n_gram, dtype=torch.float64)  # products of the atoms chosen
        self.right = torch.zeros(len(target), n_gram, dtype=torch.float64)  # and of these with the target

    def rows(self, numbers: Tensor) -> _Chunk:
        """A copy of some tokens."""
        part = object.__new__(_Chunk)
        part.dictionary = self.dictionary
        for name in ("target", *self._CHANGING):
            setattr(part, name, getattr(self, name)[numbers])
        return part

    def put(self, numbers: Tensor, part: _Chunk) -> None:
        """Write a changed copy back."""
        for name in self._CHANGING:
            getattr(self, name)[numbers] = getattr(part, name)

    def best_atom(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """For each token the atom of the largest <residual, atom> [n], the lowest of equals, and relu of that value."""
        prepared = self.dictionary
        acts = ops.topk_encode(residual, prepared.rows.mT, prepared.no_bias, 1, prepared=prepared.packed)
        return acts.indices[:, 0], acts.values[:, 0]

    def choose(self, atom: Tensor) -> tuple[Tensor, Tensor]:
        """The place [n] of an atom in each token's list, appended where it is new; and whether it is new [n]."""
        places = torch.arange(self.atoms.shape[1])
        found = (self.atoms == atom[:, None]) & (places < self.n_chosen[:, None])
        new = ~found.any(1)
        place = torch.where(new, self.n_chosen, found.int().argmax(1))
        self.atoms[torch.arange(len(atom)), place] = atom
        self.n_chosen += new
        return place, new

    def used(self) -> int:
        """Places any token uses: the width of the support-only work."""
        return int(self.n_chosen.max())

    def decode(self, values: Tensor) -> Tensor:
        """Sum over the places of values [n, s] times their atoms: [n, d]."""
        rows = self.dictionary.rows
        acts = SparseActs.fixed(values.to(rows.dtype), self.atoms[:, : values.shape[1]], self.dictionary.n_atoms)
        return ops.sparse_decode(acts, rows)

    def use_gram_form(self) -> None:
        """Hold the residual as its products with all atoms, and weights in float64."""
        self.scores = self.target.double() @ self.dictionary.rows.double().mT
        self.weights = self.weights.double()

    def support(self, place: Tensor, width: int, rules: Rules) -> Tensor:
        """Which of the first `width` places a gradient step moves [n, width]: the atom just chosen and those in use."""
        places = torch.arange(width)
        in_use = places < self.n_chosen[:, None] if rules.keep_chosen else self.weights[:, :width] != 0
        return in_use | (places == place[:, None])

    def products(self, rows: Tensor, width: int) -> Tensor:
        """<rows, atom> at each of the first `width` places: [n, width]."""
        acts = SparseActs.fixed(self.weights[:, :width], self.atoms[:, :width], self.dictionary.n_atoms)
        return ops.decoder_dot(rows, acts, self.dictionary.rows).reshape(-1, width)

    def widen_gram(self, atom: Tensor, place: Tensor, width: int) -> None:
        """Products of an atom [n], at its place, with the atoms chosen and with the target."""
        rows, tokens = self.dictionary.rows[atom], torch.arange(len(atom))
        column = self.products(rows, width).double()
        self.gram[tokens, place, :width] = column
        self.gram[tokens, :width, place] = column
        self.right[tokens, place] = (rows.double() * self.target.double()).sum(1)

    def refresh_residual(self, width: int) -> None:
        self.residual = self.target - self.decode(self.weights[:, :width].contiguous())


def _gradient_step(chunk: _Chunk, rules: Rules) -> Tensor:
    """One step along the gradient of the squared residual in the support's weights; returns which tokens are done."""
    place, _ = chunk.choose(chunk.best_atom(chunk.residual)[0])
    width = chunk.used()
    weights = chunk.weights[:, :width]
    gradient = chunk.products(chunk.residual, width).masked_fill(~chunk.support(place, width, rules), 0)
    direction = chunk.decode(gradient)
    energy = torch.linalg.vecdot(direction, direction)
    converged = energy == 0  # the released code divides 0 by 0 here
    step = torch.linalg.vecdot(direction, chunk.residual) / energy.masked_fill(converged, 1)
    step = step.masked_fill(converged, 0)[:, None]
    moved = weights + step * gradient
    if bool((moved < 0).any()):  # a clamped weight: the residual is not what the line search left
        chunk.weights[:, :width] = moved.relu()
        chunk.refresh_residual(width)
    else:
        chunk.weights[:, :width] = moved
        chunk.residual = chunk.residual - step * direction
    return converged


def _gram_gradient_step(chunk: _Chunk, rules: Rules) -> Tensor:
    """The gradient step of a small dictionary: with h = <r, D> at hand nothing of length d is touched.

    g = h on the support, <c, r> = <g, g>, <c, c> = <g, (g G) on the support>, and h changes by (w - w') G. In float64, so
    that the error of the running h stays far below that of one float32 product.
    """
    top = chunk.scores.amax(1, keepdim=True)
    near = chunk.scores >= top - _TIE * chunk.scores.abs().amax(1, keepdim=True)
    place, _ = chunk.choose(near.to(torch.uint8).argmax(1))
    width = chunk.used()
    weights, atoms = chunk.weights[:, :width], chunk.atoms[:, :width]
    gradient = chunk.scores.gather(1, atoms).masked_fill(~chunk.support(place, width, rules), 0)
    gram, n_atoms = chunk.dictionary.gram, chunk.dictionary.n_atoms
    change = ops.sparse_decode(SparseActs.fixed(gradient, atoms, n_atoms), gram)
    energy = torch.linalg.vecdot(gradient, change.gather(1, atoms))
    converged = energy <= 0
    step = torch.linalg.vecdot(gradient, gradient) / energy.masked_fill(converged, 1)
    step = step.masked_fill(converged, 0)[:, None]
    moved = weights + step * gradient
    change = change.mul_(step)
    clamped = (moved < 0).any(1)
    moved = moved.relu_()
    if bool(clamped.any()):  # there the weights did not move along the gradient
        acts = SparseActs.fixed((moved - weights)[clamped], atoms[clamped], n_atoms)
        change[clamped] = ops.sparse_decode(acts, gram)
    chunk.scores -= change
    chunk.weights[:, :width] = moved
    if rules.residual_threshold > 0:
        chunk.refresh_residual(width)
    return converged


def _matching_step(chunk: _Chunk, rules: Rules) -> Tensor:
    """The whole of the best atom's product goes to its weight; nothing else changes."""
    atom, value = chunk.best_atom(chunk.residual)
    place, new = chunk.choose(atom)
    tokens = torch.arange(len(atom))
    chunk.weights[tokens, place] += value
    chunk.residual = chunk.residual - value[:, None] * chunk.dictionary.rows[atom]
    return ~new | (value == 0) if rules.stop_on_duplicate else torch.zeros(len(atom), dtype=torch.bool)


def _orthogonal_step(chunk: _Chunk, rules: Rules) -> Tensor:
    """The best atom joins, then all weights are those of least squares (or non-negative least squares)."""
    atom, value = chunk.best_atom(chunk.residual)
    if not rules.nonnegative:
        other, other_value = chunk.best_atom(-chunk.residual)
        lower = (other_value == value) & (other < atom)  # of equals the lower index, as everywhere
        atom = torch.where((other_value > value) | lower, other, atom)
        value = torch.maximum(value, other_value)
    before = chunk.rows(torch.arange(len(atom)))
    place, new = chunk.choose(atom)
    width = chunk.used()
    chunk.widen_gram(atom, place, width)
    gram, right = chunk.gram[:, :width, :width], chunk.right[:, :width]
    chosen = torch.arange(width) < chunk.n_chosen[:, None]
    weights, dependent = _least_squares(gram, right, chosen)
    if rules.nonnegative:
        weights = _nonnegative(gram, right, chosen, chunk.weights[:, :width].double())
    chunk.weights[:, :width] = weights.to(chunk.weights.dtype)
    chunk.refresh_residual(width)
    # The residual is orthogonal to the atoms chosen: choosing one again, one in their span, or one that does not make the
    # residual smaller means that nothing is left to gain.
    grown = chunk.residual.double().norm(dim=1) > before.residual.double().norm(dim=1)
    stuck = ~new | (value == 0) | dependent | grown
    chunk.put(stuck, before.rows(stuck))
    return stuck


_STEPS: dict[str, Callable[[_Chunk, Rules], Tensor]] = {
    "gradient": _gradient_step,
    "matching": _matching_step,
    "orthogonal": _orthogonal_step,
}


def _least_squares(gram: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [n, s] that solve gram w = right on the active places, 0 elsewhere; and which systems are singular [n]."""
    both = active[:, :, None] & active[:, None, :]
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    system = torch.where(both, gram, 0.0) + torch.diag_embed((~active).double())
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = torch.diagonal(factor, dim1=1, dim2=2).square()
    singular = (info != 0) | ((pivots <= DEPENDENT * diagonal) & active).any(1)
    factor = torch.where(singular[:, None, None], torch.eye(gram.shape[1], dtype=torch.float64), factor)
    weights = torch.cholesky_solve((right * active)[:, :, None], factor)[:, :, 0]
    return weights * active, singular


def _nonnegative(gram: Tensor, right: Tensor, chosen: Tensor, start: Tensor) -> Tensor:
    """Non-negative least squares on the chosen places from a feasible start: Lawson and Hanson 1974, all tokens at once."""
    current, active = _feasible(gram, right, start > 0, start)
    scale = right.abs().amax(1, keepdim=True)
    for _ in range(3 * chosen.shape[1]):
        gain = (right - (gram @ current[:, :, None])[:, :, 0]).masked_fill(~chosen | active, -math.inf)
        best, place = gain.max(1, keepdim=True)
        grows = best > 1e-12 * scale
        if not bool(grows.any()):
            break
        active = active | ((torch.arange(chosen.shape[1]) == place) & grows)
        current, active = _feasible(gram, right, active, current)
    return current


def _feasible(gram: Tensor, right: Tensor, active: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """From feasible weights towards least squares on the active places, leaving out the first that reaches 0, until none."""
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


def _run_chunk(target: Tensor, l0: Tensor, dictionary: PreparedDictionary, rules: Rules) -> _Chunk:
    """All steps of some tokens. Tokens that are done leave the work at once."""
    chunk = _Chunk(target, int(l0.max()), dictionary, needs_gram=rules.method == "orthogonal")
    step_of = _STEPS[rules.method]
    if rules.method == "gradient" and dictionary.n_atoms <= GRAM_ATOMS:
        chunk.use_gram_form()
        step_of = _gram_gradient_step
    alive = (l0 > 0).nonzero()[:, 0]
    for step in range(1, int(l0.max()) + 1):
        if len(alive) == 0:
            break
        part = chunk if len(alive) == len(l0) else chunk.rows(alive)
        done = step_of(part, rules)
        if part is not chunk:
            chunk.put(alive, part)
        if rules.residual_threshold > 0:
            done = done | (part.residual.norm(dim=1) < rules.residual_threshold)
        alive = alive[~done & (l0[alive] > step)]
    return chunk


def _as_prepared(dictionary: Tensor | PreparedDictionary) -> PreparedDictionary:
    if isinstance(dictionary, PreparedDictionary):
        return dictionary
    if isinstance(dictionary, Tensor) and dictionary.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "dictionary: must not require a gradient (pursuit has none; detach it), got requires_grad=True"
        )
    return prepare_dictionary(dictionary)


def _checked(x: Any, dictionary: PreparedDictionary, bias: Any) -> Tensor:
    """x - bias as rows [N, d] in the dtype of the dictionary."""
    d = dictionary.rows.shape[1]
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: must be a floating-point tensor, got {given}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: must be on the CPU in this build, got {tensor.device}")
        if tensor.ndim < 1 or tensor.shape[-1] != d or (name == "bias" and tensor.ndim != 1):
            wanted = f"[{d}]" if name == "bias" else f"[..., {d}]"
            raise ValueError(f"{name}: must have shape {wanted}, got {list(tensor.shape)}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name}: must not require a gradient (pursuit has none; use x.detach()), got requires_grad=True"
            )
    rows = x.detach().reshape(math.prod(x.shape[:-1]), d)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"x: must be finite, got NaN or Inf in shape {list(x.shape)}")
    rows = rows.to(dictionary.rows.dtype)
    return rows if bias is None else rows - bias.detach().to(rows.dtype)


def _checked_l0(l0: Any, shape: tuple[int, ...], n_atoms: int) -> Tensor:
    if isinstance(l0, Integral) and not isinstance(l0, bool):
        l0 = torch.full(shape, int(l0), dtype=torch.int64)
    if not isinstance(l0, Tensor) or l0.dtype not in (torch.int64, torch.int32):
        given = l0.dtype if isinstance(l0, Tensor) else type(l0).__name__
        raise TypeError(f"l0: must be an int, or an int64 tensor of the tokens' shape {list(shape)}, got {given}")
    if tuple(l0.shape) != shape:
        raise ValueError(f"l0: must have the tokens' shape {list(shape)}, got {list(l0.shape)}")
    if l0.numel() and not 0 <= int(l0.min()) <= int(l0.max()) <= n_atoms:
        raise ValueError(f"l0: must be from 0 to {n_atoms} (atoms), got {int(l0.min())} to {int(l0.max())}")
    return l0.reshape(-1).long().cpu()


def _checked_rules(rules: Rules) -> Rules:
    if rules.method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {rules.method!r}")
    for name, method in (("keep_chosen", "gradient"), ("nonnegative", "orthogonal"), ("stop_on_duplicate", "matching")):
        if getattr(rules, name) and rules.method != method:
            raise ValueError(f'{name}: must be False unless method is "{method}", got True with "{rules.method}"')
    if not rules.residual_threshold >= 0:
        raise ValueError(f"residual_threshold: must be at least 0, got {rules.residual_threshold}")
    return rules


def pursuit(
    x: Tensor,
    dictionary: Tensor | PreparedDictionary,
    l0: int | Tensor,
    *,
    method: str = "gradient",
    bias: Tensor | None = None,
    keep_chosen: bool = False,
    nonnegative: bool = False,
    residual_threshold: float = 0.0,
    stop_on_duplicate: bool = False,
    progress: Callable[[int], object] | None = None,
) -> SparseActs:
    """Sparse codes of x over a dictionary, chosen greedily, one atom a step.

    Args:
        x: activations [..., d]; `bias` [d] is subtracted first (an SAE's b_dec).
        dictionary: atoms [F, d] (an SAE's W_dec), of any norm, or what `prepare_dictionary` made of it.
        l0: steps, for all tokens or [...] for each; at most so many atoms are used. 0 gives no atoms.
        method: "gradient": each step adds the atom of the largest signed product with the residual to the atoms in use, moves
            their weights along the gradient by the exact line search, and clamps them at 0; clamped atoms leave.
            "matching": the largest product, clamped at 0, is added to its atom's weight (SAELens' matching_pursuit; the
            residual cannot grow if no atom's squared norm is above 2).
            "orthogonal": the atom of the largest absolute product joins, all weights are refitted by least squares.
        keep_chosen: "gradient": atoms once chosen stay in the support when clamped (dictionary_learning's variant).
        nonnegative: "orthogonal": largest signed product, non-negative least squares.
        residual_threshold: stop a token when its residual's norm is below this after a step.
        stop_on_duplicate: "matching": stop a token after a step that chose no new atom (SAELens' rule).
        progress: called with the number of tokens finished, chunk by chunk.

    Returns:
        ragged SparseActs [..., F] of the nonzero weights, in the order chosen; float32, or float64 for a float64 dictionary.
        A token whose line search is 0 / 0, or whose next atom adds nothing, has converged and stops.

    Raises:
        TypeError, ValueError: one line naming the argument, the rule and the value; also when x or the dictionary requires a
        gradient, which pursuit does not have.

    Cost: a step is N F d 8-bit multiply-adds (AVX-512 VNNI; else float64) and about 4 N s d on the s atoms chosen so far.
    Memory: 1024 tokens at a time, 8 (4 d + 5 S) bytes each, "orthogonal" 24 S^2 more; nothing grows with F but the dictionary.
        Small dictionaries (F at most 1024, "gradient") use their Gram matrix, 8 F^2 bytes and 24 F a token.
    """
    rules = _checked_rules(Rules(method, keep_chosen, nonnegative, residual_threshold, stop_on_duplicate))
    dictionary = _as_prepared(dictionary)
    targets = _checked(x, dictionary, bias)
    with torch.no_grad():
        steps = _checked_l0(l0, tuple(x.shape[:-1]), dictionary.n_atoms)
        parts = []
        for target, own in zip(targets.split(CHUNK_TOKENS), steps.split(CHUNK_TOKENS), strict=True):
            if len(target):
                chunk = _run_chunk(target, own, dictionary, rules)
                parts.append((chunk.weights != 0, chunk.atoms, chunk.weights.to(target.dtype)))
            if progress is not None:
                progress(len(target))
    return _as_ragged(parts, targets, dictionary, tuple(x.shape[:-1]))


def _as_ragged(
    parts: list[tuple[Tensor, Tensor, Tensor]], targets: Tensor, dictionary: PreparedDictionary, shape: tuple[int, ...]
) -> SparseActs:
    """From chunks of (which places count, atoms, weights), each [n, s]."""
    counts = [kept.sum(1) for kept, _, _ in parts]
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0)
    atoms = torch.cat([torch.zeros(0, dtype=torch.int64), *(atoms[kept] for kept, atoms, _ in parts)])
    values = torch.cat([targets.new_zeros(0), *(weights[kept] for kept, _, weights in parts)])
    return SparseActs.ragged(crow, atoms, values, dictionary.n_atoms, shape)


def refit(
    x: Tensor, acts: SparseActs, dictionary: Tensor | PreparedDictionary, *, bias: Tensor | None = None
) -> SparseActs:
    """The best non-negative weights on given supports: non-negative least squares, choosing no atom.

    Args:
        x: activations [..., d]; `bias` [d] is subtracted first.
        acts: the supports, SparseActs [..., F] (an encoder's latents); their positive values are where the search starts.
        dictionary: atoms [F, d], or what `prepare_dictionary` made of it.

    Returns:
        ragged SparseActs on the same supports or less: atoms whose best weight is 0 leave.

    Raises TypeError, ValueError as `pursuit`; and ValueError for acts of other tokens or atoms.

    Cost: L0^2 d multiply-adds a token, and L0^3 float64 ones for each atom that leaves.
    """
    dictionary = _as_prepared(dictionary)
    targets = _checked(x, dictionary, bias)
    if acts.shape != (*x.shape[:-1], dictionary.n_atoms):
        raise ValueError(f"acts: must have shape {[*x.shape[:-1], dictionary.n_atoms]}, got {list(acts.shape)}")
    with torch.no_grad():
        values, atoms, counts = _positive_places(acts)
        parts = []
        for target, start, own, count in zip(
            *(t.split(CHUNK_TOKENS) for t in (targets, values, atoms, counts)), strict=True
        ):
            weights = _refit_chunk(target, start, own, torch.arange(own.shape[1]) < count[:, None], dictionary)
            parts.append((weights != 0, own, weights))
    return _as_ragged(parts, targets, dictionary, tuple(x.shape[:-1]))


def _positive_places(acts: SparseActs) -> tuple[Tensor, Tensor, Tensor]:
    """The positive entries of acts padded to one length: values [N, s], atoms [N, s], and how many are real [N]."""
    kept = acts.values.reshape(-1) > 0
    tokens, atoms, values = acts.token_numbers()[kept], acts.col_indices[kept], acts.values.detach().reshape(-1)[kept]
    counts = torch.bincount(tokens, minlength=acts.n_tokens)
    places = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[tokens]
    width = int(counts.max()) if len(counts) else 0
    padded_values, padded_atoms = values.new_zeros(acts.n_tokens, width), atoms.new_zeros(acts.n_tokens, width)
    padded_values[tokens, places], padded_atoms[tokens, places] = values, atoms
    return padded_values, padded_atoms, counts


def _refit_chunk(
    target: Tensor, start: Tensor, atoms: Tensor, chosen: Tensor, dictionary: PreparedDictionary
) -> Tensor:
    """Non-negative least squares on the places `chosen` [n, s]; a few tokens at a time, for their atoms are gathered."""
    if atoms.numel() == 0:
        return start.to(target.dtype)
    weights = []
    few = max(1, _GATHERED // max(1, atoms.shape[1] * target.shape[1]))
    for x, w, own, real in zip(*(t.split(few) for t in (target, start, atoms, chosen)), strict=True):
        rows = dictionary.rows[own].double() * real[:, :, None]  # [few, s, d]
        gram, right = rows @ rows.mT, (rows @ x.double()[:, :, None])[:, :, 0]
        weights.append(_nonnegative(gram, right, real, w.double() * real).to(target.dtype))
    return torch.cat(weights)
