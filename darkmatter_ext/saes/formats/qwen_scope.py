"""Qwen Scope: `layerN.sae.pt`, a TopK SAE of one layer; the repository's name gives model, width and k.

Shapes: d_in width, F latents.
"""

from __future__ import annotations

import re

from darkmatter_ext.saes.formats.layout import (
    Config,
    Format,
    Place,
    Weights,
    dtype_name,
    require_tensors,
    said,
    unpickled,
)

_REPOSITORY = re.compile(r"SAE-Res-[^/]+?-W\d+K-L0_\d+")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def _config(place: Place) -> Config:
    """As SAELens reads it, by the repository's name (also in a hub's cache)."""
    from sae_lens.loading.pretrained_sae_loaders import get_qwen_scope_config_from_hf, handle_config_defaulting

    found = _REPOSITORY.findall(place.folder.absolute().as_posix())
    if not found:
        raise ValueError("k is in the name of its repository: the path must have SAE-Res-MODEL-WnK-L0_k")
    config = handle_config_defaulting(get_qwen_scope_config_from_hf(found[-1], place.weights.name, "cpu"))
    return config | {"metadata": said(dict(config["metadata"]))}


def _weights(place: Place, config: Config) -> Weights:
    found = unpickled(place.weights)
    require_tensors(found, _TENSORS, place.weights.name)
    config["dtype"] = dtype_name(found["W_enc"])
    columns = {name: found[name].T.contiguous() for name in ("W_enc", "W_dec")}  # [F, d_in] and [d_in, F] there
    return columns | {"b_enc": found["b_enc"], "b_dec": found["b_dec"]}


QWEN_SCOPE = Format("Qwen Scope", None, ("layer*.sae.pt",), _config, _weights)
