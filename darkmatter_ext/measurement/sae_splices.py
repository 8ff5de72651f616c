"""What replaces x to show what each part of an SAE's error does: Sae(x), with the linear part, with the nonlinear part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import Splice
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.measurement.decompose import Decomposition, TokenBatch, decompose_stream
from darkmatter_ext.measurement.nulls import other_tokens
from darkmatter_ext.measurement.run import Inputs
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches, StoredTokens
from darkmatter_ext.saes.encoders import Encode, Encoded


def sae_splices(encode: Encode, error_map: LinearMap, *, seed: int) -> dict[str, Splice]:
    """The four settings of one SAE, each a function of the activations [n, d] at the replaced places."""
    generator = torch.Generator().manual_seed(seed)

    def sae(x: Tensor) -> Tensor:
        return encode(x).x_hat

    def linear(x: Tensor) -> Tensor:
        return error_map(x).to(x.dtype)

    def shuffled(x: Tensor) -> Tensor:
        return sae(x) + linear(x)[other_tokens(len(x), generator).to(x.device)]

    return {
        "sae": sae,
        "linear": lambda x: sae(x) + linear(x),
        "nonlinear": lambda x: x - linear(x),  # Sae(x) + (x - Sae(x) - b*.x)
        "shuffled": shuffled,
    }


def decomposed(inputs: Inputs, tokens: StoredTokens) -> dict[str, Decomposition]:
    """b* and the numbers of every SAE, from all measured tokens at their one site."""

    def reads(encode: Encode) -> Callable[[TokenBatch], Encoded]:
        return lambda batch: encode(batch.x)

    batches = MeasuredBatches(tokens, inputs.settings.device)
    return decompose_stream(batches, {sae.name: reads(sae.own) for sae in inputs.saes})
