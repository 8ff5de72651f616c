"""SAELens objects for the experiments: reconstruct, and count latents (`loading.py` reads them from their files)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.drop_in import accelerate, is_accelerated
from darkmatter_ext.encoders import for_flat_activations
from darkmatter_ext.loading import load_sae  # noqa: F401  (users load an SAE and run it from one place)
from darkmatter_ext.sparse import SparseActs

if TYPE_CHECKING:
    from sae_lens import SAE


class Encoded(NamedTuple):
    """What an SAE makes of activations [n, d]."""

    x_hat: Tensor  # [n, d]
    l0: Tensor  # [n] number of active latents
    acts: SparseActs  # [n, F]


Encoder = Callable[[Tensor], Encoded]


def as_encoder(sae: SAE) -> Encoder:
    """x [n, d] -> Sae(x), L0 and active latents, Sae(x) in the dtype of x.

    Accelerated where it can be; others (temporal, own classes) run SAELens' code. SAEs on hook_z take x with heads
    flattened, as our sources give it. The object given shares its weights and stays as it was.

    Raises ValueError when the SAE needs activations scaled by a factor that it does not carry.
    """
    own: Any = for_flat_activations(sae)
    with contextlib.suppress(ValueError):  # the reason is in accelerate's message; every SAE gives its own answer
        accelerate(own)

    def encode(x: Tensor) -> Encoded:
        given = x.to(own.dtype)
        if is_accelerated(own):
            acts = own.encode_sparse(given)
            return Encoded(own.decode_sparse(acts).to(x.dtype), acts.l0(), acts)
        dense = own.encode(given)
        return Encoded(own.decode(dense).to(x.dtype), (dense != 0).sum(-1), SparseActs.from_dense(dense))

    return encode


def as_reconstruct(sae: SAE) -> Reconstruct:
    """The function `decompose_stream` wants, for an SAE: Sae(x) and L0 of a batch; see `as_encoder`."""
    encode = as_encoder(sae)

    def reconstruct(batch: TokenBatch) -> Reconstruction:
        encoded = encode(batch.x)
        return Reconstruction(encoded.x_hat, encoded.l0)

    return reconstruct
