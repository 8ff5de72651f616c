"""Llama Scope (OpenMOSS): `hyperparams.json`, and the weights in a folder below.

Its library changes the weights when it loads them, in this order, and only then has the activation its meaning:
1. `norm_activation: dataset-wise`: activations were multiplied by s = sqrt(d) / their average norm; the biases are
   divided by s, so that activations are taken as they are. With another site written, the decoder is multiplied by the
   quotient of both s.
2. `sparsity_include_decoder_norm`: decoder rows are made unit vectors, their norms go to the encoder and its bias.
3. `jump_relu_threshold` is compared with what these weights give. TopK with a threshold is JumpReLU.
SAELens leaves out step 2: where rows are not unit vectors, it compares with something else.

Shapes: d width, F latents.
"""

from __future__ import annotations

from typing import Any

import torch

from darkmatter_ext.saes.formats.layout import (
    Config,
    Format,
    Place,
    Weights,
    dtype_name,
    read_json,
    require_tensors,
    said,
)

_ACTIVATIONS = {"jumprelu": "jumprelu", "topk": "topk", "relu": "standard"}
_NORMS = {"dataset-wise": "none", "inference": "none", "none": "none", "token-wise": "constant_norm_rescale"}


def _kind(own: Config) -> str:
    kind = _ACTIVATIONS.get(str(own.get("act_fn", "relu")).lower())
    if kind is None:
        raise ValueError(f"act_fn must be one of {', '.join(_ACTIVATIONS)}, got {own['act_fn']}")
    return "jumprelu" if kind == "topk" and _threshold(own) > 0 else kind


def _threshold(own: Config) -> float:
    return float(own.get("jump_relu_threshold") or 0.0)


def _normalisation(own: Config) -> str:
    kind = str(own.get("norm_activation", "none"))
    if kind not in _NORMS:
        raise ValueError(f"norm_activation must be one of {', '.join(_NORMS)}, got {kind}")
    return _NORMS[kind]


def _factors(own: Config) -> tuple[float, float]:
    """s of what is read and of what is written."""
    if own.get("norm_activation") != "dataset-wise":
        return 1.0, 1.0
    norms, root = own.get("dataset_average_activation_norm") or {}, own["d_model"] ** 0.5
    if not all(isinstance(norms.get(side), int | float) and norms[side] > 0 for side in ("in", "out")):
        raise ValueError(f"dataset_average_activation_norm must have in and out above 0, got {norms or 'none'}")
    return root / norms["in"], root / norms["out"]


def _config(place: Place) -> Config:
    own = read_json(place.folder / "hyperparams.json")
    reads, writes = own.get("hook_point_in"), own.get("hook_point_out") or own.get("hook_point_in")
    kind, transcodes = _kind(own), writes != reads
    centres = bool(own.get("use_decoder_bias", True)) and bool(own.get("apply_decoder_bias_to_pre_encoder", True))
    _factors(own)
    if own.get("use_glu_encoder"):
        raise ValueError("use_glu_encoder must be false, got true")
    if _threshold(own) < 0:
        raise ValueError(f"jump_relu_threshold must be at least 0, got {_threshold(own)}")
    if transcodes and centres:
        raise ValueError("apply_decoder_bias_to_pre_encoder must be false where another site is written, got true")
    metadata = {
        "model_name": own.get("model_name")
        or ("meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in place.name else None),
        "hook_name": reads,
        "hook_name_out": writes if transcodes else None,
        "normalize_decoder": None if transcodes else bool(own.get("sparsity_include_decoder_norm", True)),
        "k": own.get("top_k"),
    }
    transcoder = {"standard": "transcoder"}.get(kind, f"{kind}_transcoder")
    return {
        "architecture": transcoder if transcodes else kind,
        "d_in": own["d_model"],
        "d_sae": own.get("d_sae") or own["d_model"] * own["expansion_factor"],
        "dtype": "float32",
        "apply_b_dec_to_input": centres,
        "normalize_activations": _normalisation(own),
        "metadata": said(metadata),
        **({"k": own["top_k"]} if kind == "topk" else {}),
        **({"d_out": own["d_model"]} if transcodes else {}),
    }


@torch.no_grad()
def _weights(place: Place, config: Config) -> Weights:
    from safetensors.torch import load_file

    own, found = read_json(place.folder / "hyperparams.json"), load_file(place.weights)
    require_tensors(found, ("encoder.weight", "encoder.bias", "decoder.weight"), place.weights.name)
    dtype, (s_in, s_out) = found["encoder.weight"].dtype, _factors(own)
    config["dtype"] = dtype_name(found["encoder.weight"])
    wide = {name: found[name].double() if found[name].ndim == 1 else found[name].float() for name in found}
    rows = wide["decoder.weight"].mT * (s_in / s_out)  # [F, d]
    norms = (
        rows.norm(dim=1, keepdim=True) if own.get("sparsity_include_decoder_norm", True) else torch.ones(len(rows), 1)
    )
    bias = wide.get("decoder.bias", torch.zeros(rows.shape[1]))
    weights: dict[str, Any] = {
        "W_enc": (wide["encoder.weight"] * norms).mT,
        "b_enc": wide["encoder.bias"] / s_in * norms[:, 0],
        "W_dec": rows / torch.where(norms > 0, norms, 1),
        "b_dec": bias / s_out,
    }
    if "jumprelu" in config["architecture"]:
        weights["threshold"] = torch.full((len(rows),), _threshold(own))
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


LLAMA_SCOPE = Format(
    "Llama Scope",
    "hyperparams.json",
    ("checkpoints/final.safetensors", "checkpoints/pruned.safetensors", "sae_weights.safetensors"),
    _config,
    _weights,
)
