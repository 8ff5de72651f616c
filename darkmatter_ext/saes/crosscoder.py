"""Crosscoders between two models: which latents does only one of them have?

A crosscoder (Lindsey et al. 2024) is an SAE on the concatenated activations of two models, v = [x_A, x_B]: one encoder
reads both, and each latent has a decoder row for each. The two rows together have norm 1, so a latent that only one model
has puts nearly all of its norm in that half. There are two measures of this:
- the *relative norm* rho = |d_B| / (|d_A| + |d_B|), from the decoder alone;
- *latent scaling* (after 2504.02922; their exact variants may differ): with d the unit direction of the larger half and
  e_m,-j the error of model m with latent j removed from the reconstruction,
      beta_m = argmin over beta of the sum over tokens of |e_m,-j - beta f_j d|^2,
  the *scaling ratio* nu is beta of the smaller half over beta of the larger one. If the smaller half of a decoder was
  shrunk, but what it should write is still in that model's error, nu reflects what is in the activations.

Shapes: n tokens, d width of each model, F latents; W_dec [F, 2 d].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_outer, sparse_decode
from darkmatter_ext.runtime.inputs import require

SHARED = (0.4, 0.6)  # relative norm of a latent that both models have
SAME_LATENT = 0.7  # two crosscoders' rows with a higher cosine are the same latent


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The two models' parts [..., d] of rows [..., 2 d]. Raises InputError for an odd width."""
    require(rows.shape[-1] % 2 == 0, "rows", "must be of two halves of one width", list(rows.shape))
    first, second = rows.chunk(2, dim=-1)
    return first, second


def relative_norm(W_dec: Tensor) -> Tensor:
    """rho [F], float64: 0 for a latent of only the first model, 1 for one of only the second; NaN for an all-zero row."""
    first, second = (half.double().norm(dim=1) for half in halves(W_dec))
    return second / (first + second)


def half_cosine(W_dec: Tensor) -> Tensor:
    """[F], float64: the cosine between a latent's two directions; 0 if one is zero."""
    first, second = (half.double() for half in halves(W_dec))
    norms = (first.norm(dim=1) * second.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.linalg.vecdot(first, second) / norms


@dataclass
class LatentSums:
    """The sums over a crosscoder's tokens that latent scaling needs. Memory: 16 F d bytes."""

    W_dec: Tensor  # [F, 2 d]
    count: Tensor = field(init=False)  # [F] tokens at which a latent is active
    total: Tensor = field(init=False)  # [F] sum of f_j
    square: Tensor = field(init=False)  # [F] sum of f_j^2
    error: Tensor = field(init=False)  # [F, 2 d] sum of f_j e

    def __post_init__(self) -> None:
        zeros = torch.zeros(len(self.W_dec), dtype=torch.float64, device=self.W_dec.device)
        self.count, self.total, self.square = zeros, zeros.clone(), zeros.clone()
        self.error = torch.zeros_like(self.W_dec, dtype=torch.float64)

    @torch.no_grad()
    def update(self, acts: SparseActs, error: Tensor) -> None:
        """Add tokens: their acts, and v - v_hat [n, 2 d]. Cost: 2 z d multiply-adds for z active latents."""
        values = acts.values.reshape(-1).double()
        self.count.index_add_(0, acts.col_indices, (values > 0).double())
        self.total.index_add_(0, acts.col_indices, values)
        self.square.index_add_(0, acts.col_indices, values.square())
        self.error += decoder_outer(acts, error.to(acts.values.dtype)).double()

    def scaling_ratio(self) -> Tensor:
        """nu [F], float64; NaN for a latent that is never active or whose larger half explains nothing."""
        rows = torch.stack(halves(self.W_dec)).double()  # [2, F, d]
        larger = (rows[1].norm(dim=1) > rows[0].norm(dim=1)).long()
        each = torch.arange(len(self.W_dec), device=rows.device)
        unit = torch.nn.functional.normalize(rows[larger, each], dim=1)
        # e_m,-j = e_m + f_j d_j^m, so that beta_m = <sum of f_j e_m, d> / sum of f_j^2 + <d_j^m, d>
        missed = torch.stack(halves(self.error)) / self.square[:, None]
        beta = torch.linalg.vecdot(missed + rows, unit)  # [2, F]
        top, bottom = beta[1 - larger, each], beta[larger, each]
        return torch.where(bottom > 0, top / bottom, torch.nan)


@dataclass(frozen=True)
class LatentKinds:
    """Which of the sufficiently used latents belong to one model alone, each [F] bool."""

    used: Tensor
    shared: Tensor  # by relative norm
    first_by_norm: Tensor
    second_by_norm: Tensor
    first_by_scaling: Tensor  # of those with their larger half in one model, whatever their norms
    second_by_scaling: Tensor

    @classmethod
    def of(cls, sums: LatentSums, *, unique: float, least: int) -> LatentKinds:
        """`unique`: relative norm of a latent of one model alone; nu must be below the ratio of norms it corresponds to.

        `least`: number of tokens at which a latent must be active to be counted at all.
        """
        rho, nu, used = relative_norm(sums.W_dec), sums.scaling_ratio(), sums.count >= least
        alone = used & (nu < (1 - unique) / unique)
        first, second = used & (rho < 1 - unique), used & (rho > unique)
        shared = used & (rho > SHARED[0]) & (rho < SHARED[1])
        return cls(used, shared, first, second, alone & (rho < 0.5), alone & (rho > 0.5))


def found_again(rows: Tensor, others: Sequence[Tensor]) -> float:
    """Share of rows [m, d] with a row of the same direction in another set, averaged over the sets; NaN without rows."""
    if len(rows) == 0 or not others:
        return float("nan")
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    shares = []
    for other in others:
        cosine = unit @ torch.nn.functional.normalize(other.double(), dim=1).mT
        best = cosine.amax(1) if len(other) else torch.zeros(len(rows), dtype=torch.float64)
        shares.append((best > SAME_LATENT).double().mean().item())
    return sum(shares) / len(shares)


def written(acts: SparseActs, W_dec: Tensor, chosen: Tensor) -> Tensor:
    """What the latents chosen [F] (1 or True) write: [n, d] for rows W_dec [F, d]."""
    return sparse_decode(acts.scaled(chosen.to(acts.values)), W_dec)


def activation_of(acts: SparseActs, chosen: Tensor) -> Tensor:
    """The summed activation of the latents chosen [F] (bool) at every token: [n]."""
    values = acts.scaled(chosen.to(acts.values)).values.reshape(-1)
    return values.new_zeros(acts.n_tokens).index_add_(0, acts.token_numbers(), values)


def matched_latents(chosen: Tensor, candidates: Tensor, features: Tensor, *, seed: int, among: int = 5) -> Tensor:
    """For each chosen latent, one of its nearest candidates by features, no candidate twice: a control for its effect.

    Args:
        chosen, candidates: numbers [m] and [c] of latents.
        features: [F, q], e.g. the logarithms of frequency and size.
        among: draw from this many nearest candidates, with `seed`.

    Returns:
        Numbers [min(m, c)], in the order of `chosen`.
    """
    random, left, found = torch.Generator().manual_seed(seed), candidates.clone(), []
    for latent in chosen[: len(candidates)]:
        nearest = (features[left] - features[latent]).norm(dim=1).argsort()[:among]
        pick = nearest[int(torch.randint(len(nearest), (1,), generator=random))]
        found.append(left[pick])
        left = left[left != left[pick]]
    return torch.stack(found) if found else candidates[:0]
