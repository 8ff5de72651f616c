"""The reconstruction losses of a batch and their explicit gradients: sums over active latents only.

Every prefix m of the latents (one, all of them, unless the SAE is a Matryoshka) reconstructs x:
    x_hat_m = sum over the active j < m of v_j w_j + b_dec,     loss = sum over m of mean((x_hat_m - x)^2).
With g_m the gradient of the loss by x_hat_m and G_j the sum of g_m over the prefixes m that hold latent j,
    dL/dv_ij = <G_j(i), w_j>,   dL/dw_j = sum over i of v_ij G_j(i),   dL/db_dec = sum over i and m of g_m(i).
Each entry belongs to one span of latents between two prefixes, so the pairs (token, span) are the "tokens" of one sparse
decode, one decoder_dot and one decoder_outer, whatever the number of prefixes.

A batch may be divided among processes. Losses and gradients are then this part's share of those of the whole batch, and
summing over the processes gives the whole.

Shapes: N tokens (of this process), d model dimension, F latents, S prefixes, z stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_dot, decoder_outer, sparse_decode
from darkmatter_ext.ops.ragged import by_spans


class Gradients(NamedTuple):
    """Gradients of the loss by the entries' values (same shape), W_dec [F, d] and b_dec [d]."""

    values: Tensor
    W_dec: Tensor | None
    b_dec: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of a batch from its active latents."""

    acts: SparseActs  # by spans
    error: Tensor  # [N, S, d] x_hat_m - x, in the dtype of x
    loss: Tensor  # [S] this part's share of the mean squared error of each prefix
    n_tokens: int  # of the whole batch

    @classmethod
    def of(
        cls, x: Tensor, acts: SparseActs, W_dec: Tensor, b_dec: Tensor, prefixes: Sequence[int], n_tokens: int
    ) -> Reconstruction:
        """x [N, d] has the dtype of the losses; acts and weights have the dtype of the step."""
        spans = by_spans(acts, prefixes)
        if len(prefixes) == 1:
            x_hat = sparse_decode(spans, W_dec, b_dec)[:, None].to(x.dtype)
        else:
            parts = sparse_decode(spans, W_dec).to(x.dtype).unflatten(0, (len(x), len(prefixes)))
            x_hat = parts.cumsum(1) + b_dec.to(x.dtype)
        error = x_hat - x[:, None]
        return cls(spans, error, error.square().sum((0, 2)) / (n_tokens * x.shape[1]), n_tokens)

    def gradients(self, W_dec: Tensor, *, of_weights: bool) -> Gradients:
        """Gradients of the summed loss. Cost: 2 z d multiply-adds."""
        n, spans, d = self.error.shape
        own = self.error * (2 / (self.n_tokens * d))
        later = own if spans == 1 else own.flip(1).cumsum(1).flip(1)  # G of each span
        rows = later.reshape(n * spans, d).to(W_dec.dtype)
        values = decoder_dot(rows, self.acts, W_dec).reshape(self.acts.values.shape)
        outer = decoder_outer(self.acts, rows) if of_weights else None
        return Gradients(values, outer, later[:, 0].sum(0))
