"""SAELens: `cfg.json` (old and new) and `sae_weights.safetensors`."""

from __future__ import annotations

from darkmatter_ext.saes.formats.layout import Config, Format, Place, Weights, read_json


def _config(place: Place) -> Config:
    """As SAELens reads it, old files too; a new file's metadata without a version is kept, not taken for an old file."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    content = read_json(place.folder / "cfg.json")
    config = handle_config_defaulting(dict(content))
    return config | {"metadata": dict(content.get("metadata") or config["metadata"])}


def _weights(place: Place, config: Config) -> Weights:
    from sae_lens.loading.pretrained_sae_loaders import read_sae_components_from_disk

    wanted = {"finetuning_scaling_factor": False} | read_json(place.folder / "cfg.json") | config
    return read_sae_components_from_disk(wanted, place.weights)[1]


SAELENS = Format("SAELens", "cfg.json", ("sae_weights.safetensors",), _config, _weights)
