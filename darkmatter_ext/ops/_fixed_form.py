"""The forms of fixed shape on the CPU, where nobody waits for a device: made of the ragged ones.

Shapes: N tokens, F latents, z stored entries, capacity: entries that a token has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl

from darkmatter_ext.ops import _library  # noqa: F401  (defines torch.ops.darkmatter)

_ops = torch.ops.darkmatter


def _places(crow: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Where each place [N, capacity] has its entry in [z], z where it has none; and how many [N] a token has."""
    found = crow.diff()
    place = torch.arange(capacity, device=crow.device)
    return torch.where(place < found[:, None], crow[:-1, None] + place, crow[-1:]), found


def _rows(entries: Tensor, place: Tensor) -> Tensor:
    """[z] -> [N, capacity], zeros where a place has no entry."""
    return torch.cat([entries, entries.new_zeros(1)])[place]


@impl("darkmatter::threshold_encode_fixed", "CPU")
def _(x, W_enc, b_enc, b_dec, threshold, capacity, *packed) -> tuple[Tensor, Tensor, Tensor]:
    _check_capacity(capacity, W_enc)
    values, crow, col = _ops.threshold_encode(x, W_enc, b_enc, b_dec, threshold, *packed)
    place, found = _places(crow, capacity)
    return _rows(values, place), _rows(col, place), found


@impl("darkmatter::find_support_fixed", "CPU")
def _(acts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    _check_capacity(capacity, acts)
    crow, col = _ops.find_support(acts)
    place, found = _places(crow, capacity)
    return _rows(col, place), found


def _check_capacity(capacity: int, of_latents: Tensor) -> None:
    n_latents = of_latents.shape[-1]
    if not 0 <= capacity <= n_latents:
        raise RuntimeError(f"capacity: must be from 0 to {n_latents} (latents), got {capacity}")
