"""Batched sparse pursuit over a dictionary: gradient, matching and orthogonal pursuit, exact, without an [N, F] array.

Every step chooses one atom per token with a screened, certified argmax (`pursuit_choice`), then works only on the chosen
atoms. The definition is `reference.pursuit`, which uses dense float64 products. The atoms, and the order in which they are
chosen, match the reference for every dtype, because residuals and weights stay in float64 from step to step.

Sources: gradient pursuit, Blumensath and Davies 2008, in the variant of Smith, "Improving SAEs by using gradient pursuit"
(2024), and of Engels et al. 2024; matching pursuit, Mallat and Zhang 1993, as in SAELens' matching_pursuit; orthogonal
matching pursuit, Pati et al. 1993, and its non-negative form, Bruckstein et al. 2008.

Shapes: N tokens, d model dimension, F atoms, S steps (the largest l0), x [..., d], dictionary [F, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.ops._library import has_kernels
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.encode import prepare_encoder
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary
from darkmatter_ext.ops.pursuit_cuda import run_gradient_on_cuda
from darkmatter_ext.ops.pursuit_steps import Rules, nonnegative, run_chunk
from darkmatter_ext.runtime.inputs import InputError

METHODS = ("gradient", "matching", "orthogonal")
CHUNK_TOKENS = 1024  # keeps residuals in cache, shows progress, and responds to an interrupt promptly
CUDA_CHUNK_TOKENS = 4096  # enough tokens for matrix products to run at full speed
_GATHERED = 1 << 22  # elements of atoms that refit gathers at once: 32 MB in float64


@torch.no_grad()
def prepare_dictionary(dictionary: Tensor) -> PreparedDictionary:
    """Pack a dictionary [F, d] once for many calls. The result is a copy: after an edit, prepare again.

    16-bit atoms are widened to float32.

    Raises TypeError / ValueError if the dictionary is not a floating-point matrix on a device with kernels, has no atoms,
    or is not finite.

    Cost: a few passes over the dictionary. Memory: F d elements, plus F d bytes (8-bit codes) or 2 F d bytes (16-bit codes,
    and on CUDA).
    """
    if not isinstance(dictionary, Tensor) or not dictionary.is_floating_point() or dictionary.layout != torch.strided:
        given = dictionary.dtype if isinstance(dictionary, Tensor) else type(dictionary).__name__
        raise TypeError(f"dictionary: must be a dense floating-point tensor, got {given}")
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise InputError(f"dictionary: must have shape [F, d] with at least one atom, got {list(dictionary.shape)}")
    if dictionary.is_meta or not has_kernels(dictionary.device):
        raise InputError(f"dictionary: must be on a device with kernels in this build, got {dictionary.device}")
    if not bool(dictionary.isfinite().all()):
        raise InputError(f"dictionary: must be finite, got NaN or Inf in shape {list(dictionary.shape)}")
    dtype = torch.promote_types(dictionary.dtype, torch.float32)
    rows = dictionary.detach().to(dtype).contiguous()
    no_bias = rows.new_zeros(len(rows))
    packed = prepare_encoder(rows.mT, no_bias)
    return PreparedDictionary(packed.weight, no_bias, packed, dtype)


def _as_prepared(dictionary: Tensor | PreparedDictionary) -> PreparedDictionary:
    if isinstance(dictionary, PreparedDictionary):
        return dictionary
    if isinstance(dictionary, Tensor) and dictionary.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "dictionary: must not require a gradient (pursuit has none; detach it), got requires_grad=True"
        )
    return prepare_dictionary(dictionary)


def _checked(x: Any, dictionary: PreparedDictionary, bias: Any) -> Tensor:
    """x as rows [N, d], in its own dtype."""
    d = dictionary.rows.shape[1]
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: must be a floating-point tensor, got {given}")
        if tensor.device != dictionary.rows.device:
            raise InputError(f"{name}: must be on {dictionary.rows.device} as the dictionary, got {tensor.device}")
        if tensor.ndim < 1 or tensor.shape[-1] != d or (name == "bias" and tensor.ndim != 1):
            wanted = f"[{d}]" if name == "bias" else f"[..., {d}]"
            raise InputError(f"{name}: must have shape {wanted}, got {list(tensor.shape)}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InputError(
                f"{name}: must not require a gradient (pursuit has none; use x.detach()), got requires_grad=True"
            )
    rows = x.detach().reshape(math.prod(x.shape[:-1]), d)
    if not bool(rows.isfinite().all()):
        raise InputError(f"x: must be finite, got NaN or Inf in shape {list(x.shape)}")
    return rows


def _target(rows: Tensor, bias: Tensor | None) -> Tensor:
    """rows - bias in float64."""
    return rows.double() if bias is None else rows.double() - bias.detach().double()


def _checked_l0(l0: Any, shape: tuple[int, ...], n_atoms: int) -> Tensor:
    if isinstance(l0, Integral) and not isinstance(l0, bool):
        l0 = torch.full(shape, int(l0), dtype=torch.int64)
    if not isinstance(l0, Tensor) or l0.dtype not in (torch.int64, torch.int32):
        given = l0.dtype if isinstance(l0, Tensor) else type(l0).__name__
        raise TypeError(f"l0: must be an int, or an int64 tensor of the tokens' shape {list(shape)}, got {given}")
    if tuple(l0.shape) != shape:
        raise InputError(f"l0: must have the tokens' shape {list(shape)}, got {list(l0.shape)}")
    if l0.numel() and not 0 <= int(l0.min()) <= int(l0.max()) <= n_atoms:
        raise InputError(f"l0: must be from 0 to {n_atoms} (atoms), got {int(l0.min())} to {int(l0.max())}")
    return l0.reshape(-1).long()


def _checked_rules(rules: Rules) -> Rules:
    if rules.method not in METHODS:
        raise InputError(f"method: must be one of {', '.join(METHODS)}, got {rules.method!r}")
    for name, method in (("keep_chosen", "gradient"), ("nonnegative", "orthogonal"), ("stop_on_duplicate", "matching")):
        if getattr(rules, name) and rules.method != method:
            raise InputError(f'{name}: must be False unless method is "{method}", got True with "{rules.method}"')
    if not rules.residual_threshold >= 0:
        raise InputError(f"residual_threshold: must be at least 0, got {rules.residual_threshold}")
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
    """Sparse codes of x over a dictionary, chosen greedily, one atom per step.

    Args:
        x: activations [..., d]; `bias` [d] is subtracted first (an SAE's b_dec).
        dictionary: atoms [F, d] (an SAE's W_dec) of any norm, or the result of `prepare_dictionary`.
        l0: number of steps, one for all tokens or [...] for each; also the most atoms a token can use. 0 gives no atoms.
        method: "gradient": each step adds the atom with the largest signed product with the residual, moves the weights of
            all atoms in use along the gradient by exact line search, and clamps them at 0; clamped atoms are dropped.
            "matching": adds the largest product, clamped at 0, to its atom's weight (SAELens' matching_pursuit; the
            residual cannot grow if no atom's squared norm is above 2).
            "orthogonal": adds the atom with the largest absolute product, then refits all weights by least squares.
        keep_chosen: for "gradient": chosen atoms stay in the support when clamped (dictionary_learning's variant).
        nonnegative: for "orthogonal": use the largest signed product and non-negative least squares.
        residual_threshold: stop a token when the norm of its residual is below this after a step.
        stop_on_duplicate: for "matching": stop a token after a step that chose no new atom (SAELens' rule).
        progress: called after each chunk with the number of tokens finished in it.

    Returns:
        Ragged SparseActs [..., F] of the nonzero weights, in the order chosen; float32, or float64 for a float64 dictionary.
        The support is that of `reference.pursuit`, whatever the dtype. A token with only rounding error left to add (2^-40
        of its norm) has converged and stops.

    Raises:
        TypeError, ValueError: one line naming the argument, the rule and the value; also when x or the dictionary requires a
        gradient, which pursuit does not support.

    Cost: each step takes N F d multiply-adds of codes (`topk_encode`) and about 4 N s d on the s atoms chosen so far.
    Memory: 1024 tokens at a time (4096 on CUDA), 8 (6 d + 8 S) bytes each, 24 S^2 more for "orthogonal". Nothing grows
    with F except the dictionary and, if a token has more than 64 near-ties, its products with all atoms (64 MB at a
    time). Small dictionaries (F at most 1024, "gradient") use their Gram matrix: 8 F^2 bytes, and 24 F per token.
    """
    rules = _checked_rules(Rules(method, keep_chosen, nonnegative, residual_threshold, stop_on_duplicate))
    dictionary = _as_prepared(dictionary)
    rows = _checked(x, dictionary, bias)
    with torch.no_grad():
        steps = _checked_l0(l0, tuple(x.shape[:-1]), dictionary.n_atoms).to(rows.device)
        parts = []
        size = CUDA_CHUNK_TOKENS if rows.is_cuda else CHUNK_TOKENS
        run = run_gradient_on_cuda if rows.is_cuda and rules.method == "gradient" else _run_in_steps
        targets = (_target(some, bias) for some in rows.split(size))
        for n, atoms, weights in run(targets, steps.split(size), dictionary, rules):
            parts.append((atoms, weights.to(dictionary.dtype)))
            if progress is not None:
                progress(n)
    return _as_ragged(parts, dictionary, tuple(x.shape[:-1]))


def _run_in_steps(
    targets: Iterable[Tensor], steps: Sequence[Tensor], dictionary: PreparedDictionary, rules: Rules
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the number of tokens, the atoms and the weights of each chunk."""
    for target, own in zip(targets, steps, strict=True):
        if len(target):
            chunk = run_chunk(target, own, dictionary, rules)
            yield len(target), chunk.atoms, chunk.weights


def _as_ragged(
    parts: list[tuple[Tensor, Tensor]], dictionary: PreparedDictionary, shape: tuple[int, ...]
) -> SparseActs:
    """The nonzero weights, from chunks of (atoms, weights), each [n, s]."""
    kept = [weights != 0 for _, weights in parts]
    none = dictionary.rows.new_zeros(1, dtype=torch.int64)
    crow = torch.cat([none, *(some.sum(1) for some in kept)]).cumsum(0)
    atoms = torch.cat([none[:0], *(atoms[some] for some, (atoms, _) in zip(kept, parts, strict=True))])
    values = [weights[some] for some, (_, weights) in zip(kept, parts, strict=True)]
    values = torch.cat([none[:0].to(dictionary.dtype), *values])
    return SparseActs.ragged(crow, atoms, values, dictionary.n_atoms, shape)


def refit(
    x: Tensor, acts: SparseActs, dictionary: Tensor | PreparedDictionary, *, bias: Tensor | None = None
) -> SparseActs:
    """The best non-negative weights on given supports: non-negative least squares that chooses no new atoms.

    Args:
        x: activations [..., d]; `bias` [d] is subtracted first.
        acts: the supports, SparseActs [..., F] (an encoder's latents); the search starts from their positive values.
        dictionary: atoms [F, d], or the result of `prepare_dictionary`.

    Returns:
        Ragged SparseActs on the same supports or smaller ones: atoms whose best weight is 0 are dropped.

    Raises TypeError / ValueError as `pursuit`, and ValueError if acts has other tokens or atoms.

    Cost: L0^2 d multiply-adds per token, and L0^3 float64 ones for each atom that is dropped.
    """
    dictionary = _as_prepared(dictionary)
    rows = _checked(x, dictionary, bias)
    if acts.shape != (*x.shape[:-1], dictionary.n_atoms):
        raise InputError(f"acts: must have shape {[*x.shape[:-1], dictionary.n_atoms]}, got {list(acts.shape)}")
    with torch.no_grad():
        values, atoms, counts = _positive_places(acts)
        parts = []
        for some, start, own, count in zip(
            *(t.split(CHUNK_TOKENS) for t in (rows, values, atoms, counts)), strict=True
        ):
            real = torch.arange(own.shape[1], device=own.device) < count[:, None]
            weights = _refit_chunk(_target(some, bias), start, own, real, dictionary)
            parts.append((own, weights.to(dictionary.dtype)))
    return _as_ragged(parts, dictionary, tuple(x.shape[:-1]))


def _positive_places(acts: SparseActs) -> tuple[Tensor, Tensor, Tensor]:
    """The positive entries of acts, padded to one length: values [N, s], atoms [N, s], and how many are real [N]."""
    kept = acts.values.reshape(-1) > 0
    tokens, atoms, values = acts.token_numbers()[kept], acts.col_indices[kept], acts.values.detach().reshape(-1)[kept]
    counts = torch.bincount(tokens, minlength=acts.n_tokens)
    places = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    width = int(counts.max()) if len(counts) else 0
    padded_values, padded_atoms = values.new_zeros(acts.n_tokens, width), atoms.new_zeros(acts.n_tokens, width)
    padded_values[tokens, places], padded_atoms[tokens, places] = values, atoms
    return padded_values, padded_atoms, counts


def _refit_chunk(
    target: Tensor, start: Tensor, atoms: Tensor, chosen: Tensor, dictionary: PreparedDictionary
) -> Tensor:
    """Non-negative least squares on the places `chosen` [n, s]; a few tokens at a time, because it gathers their atoms."""
    if atoms.numel() == 0:
        return start.double()
    weights = []
    few = max(1, _GATHERED // max(1, atoms.shape[1] * target.shape[1]))
    for x, w, own, real in zip(*(t.split(few) for t in (target, start, atoms, chosen)), strict=True):
        rows = dictionary.rows[own].double() * real[:, :, None]  # [few, s, d]
        gram, right = rows @ rows.mT, (rows @ x[:, :, None])[:, :, 0]
        weights.append(nonnegative(gram, right, real, w.double() * real))
    return torch.cat(weights)
