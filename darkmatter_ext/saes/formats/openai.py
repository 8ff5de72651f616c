"""OpenAI's sparse_autoencoder: a state_dict with its activation, `autoencoder.pt` or a layer's `8.pt`.

With TopK each activation is centred and divided by its standard deviation first, which is undone after decoding.

Shapes: d width, F latents.
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

_TENSORS = ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
# resid_post_mlp_v5_32k/autoencoders/8.pt: the release's names of places in a block
_LOCATION = re.compile(r"(resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp)(?:_v\w+)?(?=/)")
_HOOKS = {
    "resid_delta_attn": "hook_attn_out",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}


def _config(place: Place) -> Config:
    found = unpickled(place.weights)
    require_tensors(found, _TENSORS, place.weights.name)
    activation, options = found.get("activation", "ReLU"), found.get("activation_state_dict") or {}
    if activation not in ("ReLU", "TopK"):
        raise ValueError(f"activation must be ReLU or TopK, got {activation}")
    if activation == "TopK" and options.get("postact_fn") != "ReLU":
        raise ValueError(f"postact_fn of TopK must be ReLU, got {options.get('postact_fn')}")
    path = place.weights.absolute().as_posix()
    location, layer = _LOCATION.findall(path), re.fullmatch(r"\d+", place.weights.stem)
    known = bool(location and layer)
    metadata = {
        "model_name": "gpt2" if "gpt2-small" in path else None,
        "hook_name": f"blocks.{place.weights.stem}.{_HOOKS[location[-1]]}" if known else None,
    }
    d_sae, d_in = found["encoder.weight"].shape
    return {
        "architecture": "topk" if activation == "TopK" else "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": dtype_name(found["encoder.weight"]),
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if activation == "TopK" else "none",
        "metadata": said(metadata),
        **({"k": int(options["k"])} if activation == "TopK" else {}),
    }


def _weights(place: Place, config: Config) -> Weights:
    found = unpickled(place.weights)
    return {
        "W_enc": found["encoder.weight"].T.contiguous(),
        "b_enc": found["latent_bias"],
        "W_dec": found["decoder.weight"].T.contiguous(),
        "b_dec": found["pre_bias"],
    }


OPENAI = Format("OpenAI", None, ("autoencoder.pt", "[0-9]*.pt"), _config, _weights)
