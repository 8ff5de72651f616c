"""EleutherAI sparsify: `cfg.json` and `sae.safetensors`, below a folder that may hold the training's `config.json`.

A transcoder (`transcode`) is trained from a module's input to its output and does not take b_dec from what it reads; with
`skip_connection` its output has W_skip times its input added.

Shapes: d width, F latents.
"""

from __future__ import annotations

import re

from darkmatter_ext.saes.formats.layout import Config, Format, Place, Weights, dtype_name, read_json, said

# Modules whose input and output are hook points: blocks by Hugging Face's names, or the MLP or attention inside.
_MODULE = re.compile(r"(?:[\w.]*\.)?(?:layers|h)[._](\d+)(?:[._](mlp|attn|self_attn|attention))?")
_READS = {None: "hook_resid_pre", "mlp": "mlp.hook_in"}
_WRITES = {None: "hook_resid_post", "mlp": "hook_mlp_out"}


def module_hook(module: str, model: str, *, reads: bool = False) -> str | None:
    """The hook point of a module's output (or its input), where both libraries mean the same tensor; else None."""
    match = _MODULE.fullmatch(module)
    if match is None or match[2] not in _WRITES:
        return None
    kind = (_READS if reads else _WRITES)[match[2]]
    if kind == "hook_mlp_out" and "gemma" in model.lower():
        kind = "mlp.hook_out"  # Gemma norms what its MLP writes, and hook_mlp_out comes after that norm
    return f"blocks.{match[1]}.{kind}"


def _config(place: Place) -> Config:
    own, run = read_json(place.folder / "cfg.json"), {}
    if (place.folder.parent / "config.json").is_file():
        run = read_json(place.folder.parent / "config.json")
    transcodes = bool(own.get("transcode"))
    if own.get("skip_connection") and not transcodes:
        raise ValueError("skip_connection must go with transcode, got an SAE with a skip of its own input")
    if own.get("activation", "topk") != "topk" or own.get("signed"):
        raise ValueError(f"activation must be topk, got {'signed topk' if own.get('signed') else own['activation']}")
    module, model = place.folder.name, str(run.get("model", ""))
    metadata = {
        "model_name": run.get("model"),
        "hook_name": module_hook(module, model, reads=transcodes),
        "hook_name_out": module_hook(module, model) if transcodes else None,
        "context_size": run.get("ctx_len"),
        "dataset_path": run.get("dataset"),
        "normalize_decoder": None if transcodes else own.get("normalize_decoder", True),
    }
    transcoder = "topk_skip_transcoder" if own.get("skip_connection") else "topk_transcoder"
    return {
        "architecture": transcoder if transcodes else "topk",
        "d_in": own["d_in"],
        "d_sae": own.get("num_latents") or own["d_in"] * own["expansion_factor"],
        "k": own["k"],
        "dtype": "float32",
        "apply_b_dec_to_input": not transcodes,
        "metadata": said(metadata),
        **({"d_out": own["d_in"]} if transcodes else {}),
    }


def _weights(place: Place, config: Config) -> Weights:
    from safetensors.torch import load_file

    found = load_file(place.weights)
    config["dtype"] = dtype_name(found["W_dec"])
    skip = {"W_skip": found["W_skip"]} if config["architecture"] == "topk_skip_transcoder" else {}
    return {  # W_dec is [F, d] already, encoder.weight [F, d] as torch keeps it
        "W_enc": found["encoder.weight"].T.contiguous(),
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
        **skip,
    }


SPARSIFY = Format("sparsify", "cfg.json", ("sae.safetensors",), _config, _weights)
