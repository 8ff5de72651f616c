"""Shared storage for W_enc and the packed rows of the encoder: W_enc [d, F] as the transposed view of contiguous rows [F, d].

An encoder whose W_enc is stored this way (some of SAELens' loaders do it) keeps no copy of it. `lay_as_rows` stores it so,
only on request: values, shape and dtype stay, but W_enc is then not contiguous, and dense products of fewer than about 8
tokens take 1.2 to 1.6 times as long in float32 (16-bit ones are faster on a CPU without 16-bit products). A fused optimiser
that already has averages in the other layout would mix them up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def shares_rows(W_enc: Tensor) -> bool:
    """Whether the rows of W_enc^T can be read in place."""
    return W_enc.ndim == 2 and W_enc.mT.is_contiguous()


def _is_alone(W_enc: Any) -> bool:
    """Whether no other holder of the storage is visible, and no gradient or optimiser at work on it."""
    if type(W_enc) is not nn.Parameter or not W_enc.is_leaf or W_enc.is_inference() or W_enc.grad is not None:
        return False
    storage = W_enc.untyped_storage()
    if storage.nbytes() != W_enc.numel() * W_enc.element_size():
        return False
    # Two: the parameter and `storage`. Views, numpy arrays and tied parameters each add to the count.
    return torch._C._storage_Use_Count(storage._cdata) == 2


@torch.no_grad()
def lay_as_rows(W_enc: Any) -> bool:
    """Store W_enc as the transposed view of contiguous rows if nobody else holds its storage; returns whether it now is."""
    if _is_alone(W_enc) and W_enc.is_contiguous():
        with torch.inference_mode(False):
            W_enc.data = W_enc.data.mT.contiguous().mT
    return shares_rows(W_enc)


@torch.no_grad()
def lay_contiguous(W_enc: Any) -> None:
    """Store W_enc as torch does by default, unless others hold its storage: their edits would no longer reach it."""
    if _is_alone(W_enc) and not W_enc.is_contiguous():
        with torch.inference_mode(False):
            W_enc.data = W_enc.data.contiguous()
