"""How well SAEs trained here explain their training text compared with held-out text: how much of FVU is overfitting.

An SAE that has seen its text several times explains it better than other text, all the more so the wider it is. A power law
of held-out FVU over width is then partly a law of that gap, so every result reports both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.measurement.error import sae_error
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import SAE_TRAINING
from darkmatter_ext.saes.encoders import Encode

BATCH = 4096


def training_sample(tokens: StoredTokens, most: int, *, seed: int) -> Tensor:
    """About `most` of the tokens that train SAEs, [n, d], drawn from all their contexts; memory: these and one shard."""
    share = min(1.0, most / max(1, tokens.count(SAE_TRAINING)))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shard, roles in tokens.shards():
        x = shard.activations[roles == SAE_TRAINING]
        found.append(x[torch.rand(len(x), generator=generator) < share])
    return torch.cat(found)


@torch.no_grad()
def fvu_on(x: Tensor, encode: Encode, error_map: LinearMap) -> dict[str, float]:
    """`fvu_training_text` and `fvu_nonlinear_training_text` on x [n, d], with b* as fitted on measured text."""
    error_square = rest_square = 0.0
    for part in x.split(BATCH):
        error = sae_error(part, encode(part).x_hat).double()
        error_square += error.square().sum().item()
        rest_square += (error - error_map(part)).square().sum().item()
    variance = (x.double() - x.double().mean(0)).square().sum().item()
    return {
        "fvu_training_text": error_square / variance,
        "fvu_nonlinear_training_text": rest_square / variance,
    }
