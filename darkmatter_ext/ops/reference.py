"""Plain-torch twins of the ops: the oracle for the tests, and the definition in a few lines.

Same names, arguments and answers, computed another way: dense float64 matrix products and stable sorts. They build the
dense [N, F] pre-activations, so they are for checking, not for use at scale. All are differentiable by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import lstsq
from darkmatter_ext.ops.acts import SparseActs

PURSUIT_NOISE = 2.0**-40  # of |target| times the largest atom's norm: what pursuit treats as rounding


def pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, b_dec: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """h = (x - b_dec) W_enc + b_enc in float64, rounded to the dtype of x (as torch converts), times gain [F]: [..., F]."""
    centred = x.double() if b_dec is None else x.double() - b_dec.double()
    h = (centred @ W_enc.double() + b_enc.double()).to(x.dtype)
    return h if gain is None else h * gain


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    gain: Tensor | None = None,
) -> SparseActs:
    """The k largest pre-activations of each token (ties to the lower index, NaN largest), then relu."""
    h = pre_activations(x, W_enc, b_enc, b_dec=b_dec, gain=gain)
    # A stable descending sort keeps equal values in index order, and torch sorts NaN first.
    indices = h.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return SparseActs.fixed(h.gather(-1, indices).relu(), indices, W_enc.shape[1])


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    b_dec: Tensor | None = None,
    gain: Tensor | None = None,
    capacity: int | None = None,
) -> SparseActs:
    """The pre-activations that are NaN or strictly above the threshold (scalar or [F]), then relu."""
    h = pre_activations(x, W_enc, b_enc, b_dec=b_dec, gain=gain)
    threshold = torch.as_tensor(threshold, dtype=x.dtype, device=x.device)
    kept = ~(h.detach() <= threshold)
    if capacity is not None:
        return _first(h.relu(), kept, capacity)
    flat = h.reshape(math.prod(x.shape[:-1]), W_enc.shape[1])
    token, latent = kept.reshape(flat.shape).nonzero(as_tuple=True)
    crow = torch.searchsorted(token, torch.arange(len(flat) + 1, device=x.device))
    return SparseActs.ragged(crow, latent, flat[token, latent].relu(), W_enc.shape[1], tuple(x.shape[:-1]))


def find_support(acts: Tensor, *, capacity: int | None = None) -> SparseActs:
    """The entries that are not 0, latents ascending."""
    return SparseActs.from_dense(acts) if capacity is None else _first(acts, acts.detach() != 0, capacity)


def _first(dense: Tensor, kept: Tensor, capacity: int) -> SparseActs:
    """The first `capacity` entries of each token of dense [..., F] that are kept; value 0 and latent 0 if there are fewer."""
    indices = kept.sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    there = kept.gather(-1, indices)
    values = torch.where(there, dense.gather(-1, indices), 0)
    return SparseActs(values, indices.where(there, 0), dense.shape[-1], found=kept.sum(-1))


def sparse_decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """acts @ W_dec + b_dec with dense acts in float64, then rounded: [..., d]."""
    x_hat = acts.to_dense().double() @ W_dec.double()
    return (x_hat if b_dec is None else x_hat + b_dec.double()).to(W_dec.dtype)


def pursuit(
    x: Tensor,
    dictionary: Tensor,
    l0: int | Tensor,
    *,
    method: str = "gradient",
    bias: Tensor | None = None,
    keep_chosen: bool = False,
    nonnegative: bool = False,
    residual_threshold: float = 0.0,
    stop_on_duplicate: bool = False,
) -> Tensor:
    """Dense weights [..., F] in float64 of `darkmatter_ext.pursuit`, token by token and step by step.

    The definition, for any dtype: all given numbers are widened to float64 as they are, so is x - bias, and
    every residual, product and weight is float64; nothing is rounded between steps. Rounding must not decide anything, or
    two correct implementations would diverge at each tie. With noise = 2^-40 |x - bias| max_j |d_j|:

    - Each step chooses the atom with the largest product with the residual ("orthogonal" without `nonnegative`: absolute
      product). Products within noise of the largest count as equal to it, and the lowest index wins.
    - A product or gradient of at most noise counts as 0. A token has converged and stops when only 0 is left to add:
      for "gradient" on its whole support (the released code divides 0 by 0), for "matching" and "orthogonal" at the best atom.
    """
    D = dictionary.double()
    rows = (x.double() if bias is None else x.double() - bias.double()).reshape(-1, D.shape[1])
    steps = torch.as_tensor(l0).expand(x.shape[:-1]).reshape(-1).tolist()
    weights = torch.zeros(len(rows), len(D), dtype=torch.float64)
    for target, w, own in zip(rows, weights, steps, strict=True):
        for after in pursuit_path(
            target,
            D,
            own,
            method=method,
            keep_chosen=keep_chosen,
            nonnegative=nonnegative,
            residual_threshold=residual_threshold,
            stop_on_duplicate=stop_on_duplicate,
        ):
            w.copy_(after)
    return weights.reshape(*x.shape[:-1], len(D))


def pursuit_path(
    target: Tensor,
    D: Tensor,
    l0: int,
    *,
    method: str = "gradient",
    keep_chosen: bool = False,
    nonnegative: bool = False,
    residual_threshold: float = 0.0,
    stop_on_duplicate: bool = False,
) -> Iterator[Tensor]:
    """Yield the weights [F] of one target [d] after each step, until it stops; both float64. One tensor, changed in place."""
    w, chosen = target.new_zeros(len(D)), []
    noise = PURSUIT_NOISE * target.norm() * D.norm(dim=1).max()
    for _ in range(l0):
        residual = target - w @ D
        products = D @ residual
        scores = products.abs() if method == "orthogonal" and not nonnegative else products
        best = int((~(scores < scores.max() - noise)).nonzero()[0])
        new, before = best not in chosen, w.clone()
        chosen += [best] * new
        if method == "gradient":
            done = not _gradient_update(D, residual, products, w, chosen if keep_chosen else [best], noise)
        elif bool(scores[best] <= noise):
            done = True
        elif method == "matching":
            w[best] += products[best]
            done = stop_on_duplicate and not new
        else:
            done = not new or not _refit(D, target, w, chosen, nonnegative)
        if done and method == "orthogonal":
            w.copy_(before)
        yield w
        if done or (residual_threshold > 0 and (target - w @ D).norm() < residual_threshold):
            return


def _gradient_update(D: Tensor, residual: Tensor, products: Tensor, w: Tensor, extra: list[int], noise: Tensor) -> bool:
    """w = max(0, w + step g), with g the gradient on the support of w and `extra`; False if g is 0 up to noise."""
    support = w != 0
    support[extra] = True
    gradient = torch.where(support, products, 0.0)
    direction = gradient @ D
    if not bool((gradient.abs() > noise).any()) or not direction.any():
        return False
    w.copy_((w + (direction @ residual) / (direction @ direction) * gradient).clamp(min=0))
    return True


def _refit(D: Tensor, target: Tensor, w: Tensor, chosen: list[int], nonnegative: bool) -> bool:
    """Least squares on the chosen atoms, written to w; False if the newest is in the span of the others."""
    atoms = D[chosen]
    old = atoms[:-1].mT
    outside = atoms[-1] - (old @ lstsq(old, atoms[-1:].mT))[:, 0] if len(chosen) > 1 else atoms[-1]
    if outside.square().sum() <= 1e-10 * atoms[-1].square().sum():
        return False
    if nonnegative:
        from scipy.optimize import nnls

        found = torch.from_numpy(nnls(atoms.mT.numpy(), target.numpy())[0])
    else:
        found = lstsq(atoms.mT, target[:, None])[:, 0]
    w.zero_()
    w[chosen] = found
    return True
