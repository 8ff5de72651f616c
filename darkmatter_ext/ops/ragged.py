"""Parts and sums of sparse acts: selected entries, spans of latents, sums per latent or token.

Shapes: N tokens, F latents, S spans, z stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_outer


def latent_sums(values: Tensor, acts: SparseActs) -> Tensor:
    """Sum of the entries of each latent, [F]; values have the shape of acts.values. Deterministic."""
    if values.is_cpu:
        sums = values.new_zeros(acts.d_sae, dtype=torch.float64)
        return sums.index_add_(0, acts.col_indices, values.reshape(-1).double()).to(values.dtype)
    ones = values.new_ones(acts.n_tokens, 1)
    return decoder_outer(replace(acts, values=values), ones)[:, 0]


def token_sums(values: Tensor, acts: SparseActs) -> Tensor:
    """Sum of the entries of each token of ragged acts, [N]; values [z]."""
    return torch.segment_reduce(values, "sum", lengths=acts.crow_indices.diff())


def kept(acts: SparseActs, keep: Tensor) -> SparseActs:
    """The entries of ragged acts where keep [z] (bool) is true."""
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return replace(
        acts, values=acts.values[keep], stored_indices=acts.stored_indices[keep], crow=before[acts.crow_indices]
    )


def by_spans(acts: SparseActs, prefixes: Sequence[int]) -> SparseActs:
    """The same entries as acts of N S tokens, each with one span of the latents; each token's latents must ascend."""
    if len(prefixes) == 1:
        return acts
    ends = torch.tensor(prefixes, device=acts.values.device)
    span = torch.bucketize(acts.col_indices, ends, right=True)  # an end is the first latent of the next span
    n_rows = acts.n_tokens * len(prefixes)
    counts = torch.bincount(acts.token_numbers() * len(prefixes) + span, minlength=n_rows)
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseActs(acts.values, acts.col_indices, acts.d_sae, crow, (n_rows,))
