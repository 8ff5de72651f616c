"""circuit-tracer's transcoders: `layer_N.safetensors` for each layer, and a `config.yaml` with the two hooks.

Shapes: d width, F latents.
"""

from __future__ import annotations

import re
from typing import Any

from darkmatter_ext.saes.formats.layout import Config, Format, Place, Weights, dtype_name, require_tensors, said

_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
_THRESHOLD = "activation_function.threshold"


def _shapes(place: Place) -> dict[str, tuple[list[int], str]]:
    """name -> shape and dtype of what a file holds, by its header."""
    from safetensors import safe_open

    with safe_open(place.weights, framework="pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118  (it cannot be iterated)


def _config(place: Place) -> Config:
    import yaml

    content: Any = yaml.safe_load((place.folder / "config.yaml").read_text())
    if not isinstance(content, dict) or not {"feature_input_hook", "feature_output_hook"} <= content.keys():
        raise ValueError("config.yaml must have feature_input_hook and feature_output_hook, got others")
    if (kind := content.get("model_kind", "transcoder_set")) != "transcoder_set":
        raise ValueError(f"model_kind must be transcoder_set, got {kind}")
    shapes = {name: shape for name, (shape, _) in _shapes(place).items()}
    if missing := [name for name in _TENSORS if name not in shapes]:
        raise ValueError(f"{place.weights.name} must have {', '.join(_TENSORS)}, got none named {', '.join(missing)}")
    if unknown := [name for name in shapes if name not in (*_TENSORS, "W_skip", _THRESHOLD)]:
        raise ValueError(f"{place.weights.name} must have known tensors only, got {', '.join(unknown)}")
    d_sae, d_in = shapes["W_enc"]
    layer = re.findall(r"\d+", place.weights.stem)[-1]
    kind = ("jumprelu_" if _THRESHOLD in shapes else "") + ("skip_" if "W_skip" in shapes else "")
    metadata = {
        "model_name": content.get("model_name"),
        "hook_name": f"blocks.{layer}.{content['feature_input_hook']}",
        "hook_name_out": f"blocks.{layer}.{content['feature_output_hook']}",
    }
    return {
        "architecture": f"{kind}transcoder",
        "d_in": d_in,
        "d_out": shapes["b_dec"][0],
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "metadata": said(metadata),
    }


def _weights(place: Place, config: Config) -> Weights:
    from safetensors.torch import load_file

    found = load_file(place.weights)
    require_tensors(found, _TENSORS, place.weights.name)
    config["dtype"] = dtype_name(found["W_enc"])
    d_sae, d_out = config["d_sae"], config["d_out"]
    rows = found["W_dec"]  # [F, d]; releases before 0.2 kept [d, F]
    weights = {
        "W_enc": found["W_enc"].T.contiguous(),
        "b_enc": found["b_enc"],
        "W_dec": rows if list(rows.shape) == [d_sae, d_out] else rows.T.contiguous(),
        "b_dec": found["b_dec"],
    }
    if "W_skip" in found:
        weights["W_skip"] = found["W_skip"]
    if _THRESHOLD in found:
        threshold = found[_THRESHOLD].expand(d_sae).clone()
        if bool((threshold < 0).any()):
            raise ValueError("thresholds must be at least 0, got some below")
        weights["threshold"] = threshold
    return weights


CIRCUIT_TRACER = Format("circuit-tracer", "config.yaml", ("layer_*.safetensors",), _config, _weights)
