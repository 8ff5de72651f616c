"""SAEBench's core numbers of a measured SAE, except those that need splicing; prefixed where SAEBench's definition differs.

They come from the sums of a measurement and the weights; nothing is read again. For CE loss and KL see `downstream`.

Shapes: d width of the SAE's output, F latents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.saes.sanity import ROWS, decoder_rows

SAMPLED_LATENTS = 1024  # latents whose nearest decoder row is found; their mean is within a few percent of that of all


def core_numbers(site: SiteMeasurement, name: str, sae: Any) -> dict[str, float]:
    """The core numbers of one SAE, by name:

    - `explained_variance`: 1 - FVU, about the mean of each dimension.
    - `saebench/explained_variance`: as sae_bench 0.6.0 computes it. Its total variance is the mean squared norm minus the
      square of the mean square of an entry; that is not a variance and can be negative.
    - `saebench/relative_reconstruction_bias`: mean ||Sae(x)||^2 over mean <x, Sae(x)>; below 1 means shrinkage.
    - `alive_latents`, `alive_share`: latents that fired on a fit or held-out token.
    - `max_decoder_cosine`: mean cosine of a decoder row with its nearest other row, over at most SAMPLED_LATENTS rows.
    - `encoder_decoder_cosine`: mean cosine of a latent's encoder and decoder directions; NaN for a transcoder.

    Cost: one product of SAMPLED_LATENTS rows with the decoder.
    """
    own = site.decomposition(name)
    x, x_hat, error = (own.mean_squared_norm[key] for key in ("x", "sae", "error"))
    spread = x - (x / site.width) ** 2
    product = (x + x_hat - error) / 2
    fired = site.latents[name].fired
    alive = int((fired > 0).sum())
    return {
        "explained_variance": 1 - own.fvu,
        "saebench/explained_variance": 1 - error / spread if spread != 0 else math.nan,
        "saebench/relative_reconstruction_bias": x_hat / product if product != 0 else math.nan,
        "alive_latents": alive,
        "alive_share": alive / len(fired),
        **_cosines(sae),
    }


@torch.no_grad()
def _cosines(sae: Any) -> dict[str, float]:
    W_dec, W_enc = sae.W_dec.detach(), getattr(sae, "W_enc", None)
    norms, cosines = decoder_rows(W_dec, None if "transcoder" in sae.cfg.architecture() else W_enc)
    used = norms > 0
    both = math.nan if cosines is None else cosines[used].mean().item()
    return {"max_decoder_cosine": _nearest(W_dec), "encoder_decoder_cosine": both}


def _nearest(W_dec: Tensor) -> float:
    """Mean cosine of a sample of rows [F, d] with their nearest other row; NaN if there is none. Memory: ROWS in float32."""
    if len(W_dec) < 2:
        return math.nan
    chosen = torch.linspace(0, len(W_dec) - 1, min(len(W_dec), SAMPLED_LATENTS), device=W_dec.device).long()
    own = normalize(W_dec[chosen].float(), dim=1)
    largest = torch.full((len(chosen),), -math.inf, device=W_dec.device)
    for start in range(0, len(W_dec), ROWS):
        cosine = own @ normalize(W_dec[start : start + ROWS].float(), dim=1).mT
        inside = (chosen >= start) & (chosen < start + cosine.shape[1])
        cosine[inside, chosen[inside] - start] = -math.inf
        largest = torch.maximum(largest, cosine.max(dim=1).values)
    return largest.mean().item()
