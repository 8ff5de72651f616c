"""dictionary_learning: `ae.pt` (read with weights_only) and `config.json`."""

from __future__ import annotations

from darkmatter_ext.saes.formats.layout import Config, Format, Place, Weights, read_json, said, unpickled

_ARCHITECTURES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",  # at inference one threshold for all latents, as the library's own encode
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
}
_READS_AS_IT_IS = ("AutoEncoderNew", "JumpReluAutoEncoder")  # these do not subtract b_dec from their input
_NORMALISES = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")


def _config(place: Place) -> Config:
    content = read_json(place.folder / "config.json")
    trainer, buffer = content["trainer"], content.get("buffer") or {}
    kind = trainer["dict_class"]
    if kind not in _ARCHITECTURES:
        raise ValueError(f"dict_class must be one of {', '.join(_ARCHITECTURES)}, got {kind}")
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    residual = layer is not None and module.startswith("resid_post")
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{layer}.hook_resid_post" if residual else None,
        "context_size": buffer.get("ctx_len"),
        "normalize_decoder": kind in _NORMALISES,
        "k": trainer.get("k"),
    }
    return {
        "architecture": _ARCHITECTURES[kind],
        "d_in": trainer["activation_dim"],
        "d_sae": trainer["dict_size"],
        "dtype": "float32",
        "apply_b_dec_to_input": kind not in _READS_AS_IT_IS,
        "metadata": said(metadata),
        **({"k": trainer["k"]} if kind == "AutoEncoderTopK" else {}),
    }


def _weights(place: Place, config: Config) -> Weights:
    found = unpickled(place.weights)
    names = {
        "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
        "b_enc": ("b_enc", "encoder.bias"),
        "b_gate": ("gate_bias",),
        "b_mag": ("mag_bias",),
        "r_mag": ("r_mag",),
    }
    weights = {own: found[theirs] for own, several in names.items() for theirs in several if theirs in found}
    weights["W_enc"] = found["W_enc"] if "W_enc" in found else found["encoder.weight"].T.contiguous()
    weights["W_dec"] = found["W_dec"] if "W_dec" in found else found["decoder.weight"].T.contiguous()
    if config["architecture"] == "jumprelu":
        weights["threshold"] = found["threshold"].float().expand(config["d_sae"]).clone()
    if config["architecture"] == "topk" and "k" in found and int(found["k"]) != config["k"]:
        raise ValueError(f"k of ae.pt must be that of config.json, {config['k']}, got {int(found['k'])}")
    return weights


DICTIONARY_LEARNING = Format("dictionary_learning", "config.json", ("ae.pt",), _config, _weights)
