"""Reconstructions"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.measurement.decompose import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.ops.decode import sparse_decode
from darkmatter_ext.ops.pursuit import prepare_dictionary, pursuit
from darkmatter_ext.saes.encoders import as_encoder, shuffled_sae

if TYPE_CHECKING:
    from sae_lens import SAE


def as_reconstruct(sae: SAE) -> Reconstruct:
    """The function `decompose_stream` wants, for an SAE: Sae(x) and L0 of a batch; see `as_encoder`."""
    encode = as_encoder(sae)

    def reconstruct(batch: TokenBatch) -> Reconstruction:
        encoded = encode(batch.x)
        return Reconstruction(encoded.x_hat, encoded.l0)

    return reconstruct


def random_dictionary(mean: Tensor, n_latents: int, l0: int, *, seed: int) -> Reconstruct:
    """Pursuit with `l0` steps over `n_latents` random unit directions about `mean` [d]: good codes, nothing learned.

    Gradient pursuit chooses the codes: an encoder for directions nobody trained would have to be invented. It runs on
    the CPU, wherever the batches are. Cost: see `batched_pursuit.pursuit`. Raises ValueError as it does.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_latents, len(mean), generator=generator)
    dictionary, bias = prepare_dictionary(rows / rows.norm(dim=1, keepdim=True)), mean.float().cpu()

    def reconstruct(batch: TokenBatch) -> Reconstruction:
        acts = pursuit(batch.x.float().cpu(), dictionary, l0, bias=bias)
        return Reconstruction(sparse_decode(acts, dictionary.rows, bias).to(batch.x), acts.l0().to(batch.x.device))

    return reconstruct


def shuffled_decoder(sae: SAE, *, seed: int) -> Reconstruct:
    """`shuffled_sae` as the function `decompose_stream` wants."""
    return as_reconstruct(shuffled_sae(sae, seed=seed))
