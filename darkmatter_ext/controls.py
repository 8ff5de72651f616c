"""Controls that stand beside a trained SAE: what the same number of latents gives with nothing learned in them.

A result that a random dictionary shares is no result of training (sanity checks, 2602.14111). Each control is a
`Reconstruct` or an `Encoder`, used as an SAE is.

Shapes: d model dimension, F latents.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.batched_pursuit import prepare_dictionary, pursuit
from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.ops import prepare_encoder, sparse_decode, topk_encode
from darkmatter_ext.sae import Encoded, Encoder, as_reconstruct

if TYPE_CHECKING:
    from sae_lens import SAE


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


def random_directions(sae: SAE, l0: int, *, seed: int) -> Encoder:
    """As many latents as `sae` has, with random unit directions: TopK of the tied encoder, `l0` active, about b_dec.

    Its codes are as cheap as an SAE's, and poorer than those of `random_dictionary`. Raises ValueError as `topk_encode`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.W_dec.shape, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(sae.W_dec)
    columns, center, no_bias = rows.mT.contiguous(), sae.b_dec.detach(), rows.new_zeros(len(rows))
    prepared = prepare_encoder(columns, no_bias, b_dec=center)

    def encode(x: Tensor) -> Encoded:
        acts = topk_encode(x.to(rows.dtype), columns, no_bias, l0, b_dec=center, prepared=prepared)
        return Encoded(sparse_decode(acts, rows, center).to(x.dtype), acts.l0(), acts)

    return encode


def shuffled_sae(sae: SAE, *, seed: int) -> SAE:
    """A copy with its decoder rows [F, d] permuted: the same codes, read at the wrong places."""
    shuffled = copy.deepcopy(sae)
    order = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    shuffled.W_dec.data = sae.W_dec.detach()[order.to(sae.W_dec.device)].contiguous()
    return shuffled


def shuffled_decoder(sae: SAE, *, seed: int) -> Reconstruct:
    """`shuffled_sae` as the function `decompose_stream` wants."""
    return as_reconstruct(shuffled_sae(sae, seed=seed))
