"""Controls that stand beside a trained SAE: what the same number of latents gives with nothing learned in them.

A result that a random dictionary shares is no result of training (sanity checks, 2602.14111). Each control is a
`Reconstruct`, used as an SAE is.

Shapes: d model dimension, F latents.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkmatter_ext.batched_pursuit import prepare_dictionary, pursuit
from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.ops import sparse_decode
from darkmatter_ext.sae import as_reconstruct

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


def shuffled_decoder(sae: SAE, *, seed: int) -> Reconstruct:
    """The SAE's own codes read with its decoder rows [F, d] permuted: as sparse and as large, at the wrong places."""
    shuffled = copy.deepcopy(sae)
    order = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    shuffled.W_dec.data = sae.W_dec.detach()[order.to(sae.W_dec.device)].contiguous()
    return as_reconstruct(shuffled)
