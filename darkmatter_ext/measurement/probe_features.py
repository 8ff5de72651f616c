"""What a probe reads from a text: its activation, an SAE's latents and parts of its error, its words.

Shapes: N texts, T kept tokens, d width of the site, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from darkmatter_ext.activations.text_sites import TextSites
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.measurement.error import sae_error
from darkmatter_ext.saes.encoders import Encode

PARTS = ("sae", "error", "linear", "nonlinear", "without_nonlinear")  # each [N, d]
FEWEST_TEXTS_WITH_A_WORD = 5  # needed for the word to be a feature
_BATCH = 4096


@torch.no_grad()
def features(sites: TextSites, hook: str, encode: Encode, b_star: LinearMap, device: str = "cpu") -> dict[str, Tensor]:
    """The features of each text, float32: `x`, PARTS (x without its nonlinear error is Sae(x) + b* x), `latents` [N, F].

    If several tokens of a text are kept, features are averaged over them. Memory: 4 T (6 d + F) bytes.
    """
    found: dict[str, list[Tensor]] = {}
    for part in sites.x[hook].split(_BATCH):
        x = part.to(device)
        encoded = encode(x)
        error = sae_error(x, encoded.x_hat)
        linear = b_star(x).to(error.dtype)
        nonlinear = error - linear
        values = (encoded.x_hat, error, linear, nonlinear, x - nonlinear)
        named = {"x": x, **dict(zip(PARTS, values, strict=True)), "latents": encoded.acts.to_dense()}
        for name, value in named.items():
            found.setdefault(name, []).append(value.float().cpu())
    return {name: sites.pooled(torch.cat(value)) for name, value in found.items()}


@torch.no_grad()
def codes(sites: TextSites, hook: str, encode: Encode, device: str = "cpu") -> Tensor:
    """Latents alone, [N, F]."""
    parts = [encode(x.to(device)).acts.to_dense().float().cpu() for x in sites.x[hook].split(_BATCH)]
    return sites.pooled(torch.cat(parts))


def words(tokens: Sequence[Sequence[int]]) -> Tensor:
    """[N, V] which tokens each text contains, among those in at least FEWEST_TEXTS_WITH_A_WORD texts."""
    pairs = torch.tensor([(text, token) for text, own in enumerate(tokens) for token in sorted(set(own))])
    ids, column, counts = pairs[:, 1].unique(return_inverse=True, return_counts=True)
    found = torch.zeros(len(tokens), len(ids))
    found[pairs[:, 0], column] = 1
    return found[:, counts >= FEWEST_TEXTS_WITH_A_WORD]
