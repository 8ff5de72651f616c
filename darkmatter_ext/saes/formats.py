"""Layouts of SAEs on disk, each read into SAELens' terms: a configuration, and weights under SAELens' names.

- SAELens: `cfg.json` (old and new) and `sae_weights.safetensors`.
- EleutherAI sparsify: `cfg.json` and `sae.safetensors`, below a folder that may hold the training's `config.json`.
- dictionary_learning: `ae.pt` (read with weights_only) and `config.json`.
- Gemma Scope: `params.npz` alone; the names of the folders say the rest.

What a file does not say is left out of the metadata instead of guessed, so that a run asks or says so.

Shapes: d_in width, F latents.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

Config = dict[str, Any]
Weights = dict[str, Tensor]
# Modules whose output is a hook point: blocks by the names Hugging Face gives them, or the MLP or attention inside.
_MODULE = re.compile(r"(?:[\w.]*\.)?(?:layers|h)[._](\d+)(?:[._](mlp|attn|self_attn|attention))?")
_KINDS = {None: "hook_resid_post", "mlp": "hook_mlp_out"}


@dataclass(frozen=True)
class Format:
    """One library's layout of a folder."""

    name: str
    config_name: str | None  # None: the weights' file is all there is
    weights_name: str
    config: Callable[[Path], Config]  # folder -> SAELens' configuration with `metadata`
    weights: Callable[[Path, Config], Weights]  # folder, its configuration -> SAELens' state_dict

    @property
    def files(self) -> str:
        """Their names, for a message."""
        return " and ".join(name for name in (self.config_name, self.weights_name) if name)

    def fits(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in (self.config_name, self.weights_name) if name)

    def converter(self, path: Path, device: str, cfg_overrides: Config | None = None) -> tuple[Config, Weights]:
        """What SAELens' `load_from_disk` takes."""
        from sae_lens import __version__

        config: Config = {**self.config(Path(path)), "device": device, **(cfg_overrides or {})}
        config["metadata"].setdefault("sae_lens_version", __version__)  # else it is taken for an old file again
        return config, {name: tensor.to(device) for name, tensor in self.weights(Path(path), config).items()}


def folder_of(spec: str | Path) -> Path | None:
    """The folder of an SAE on this machine, given itself or by its weights' file; None for anything else."""
    path = Path(spec)
    if path.is_file() and path.name in {known.weights_name for known in FORMATS}:
        return path.parent
    return path if path.is_dir() else None


def format_of(folder: Path) -> Format:
    """The layout of a folder. Raises ValueError, one line, when it is none of FORMATS."""
    for known in FORMATS:
        if known.fits(folder):
            return known
    wanted = " or ".join(known.files for known in FORMATS)
    config, weights = FORMATS[0].config_name, FORMATS[0].weights_name
    missing = weights if config and (folder / config).is_file() else config
    raise InputError(f"sae: must be a folder with {wanted}, got {folder} without {missing}")


def _json(path: Path) -> Config:
    return json.loads(path.read_text())


# ---- SAELens


def _saelens_config(folder: Path) -> Config:
    """As SAELens reads it, old files too; a new file's metadata without a version is kept, not taken for an old file."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    content = _json(folder / "cfg.json")
    config = handle_config_defaulting(dict(content))
    return config | {"metadata": dict(content.get("metadata") or config["metadata"])}


def _saelens_weights(folder: Path, config: Config) -> Weights:
    from sae_lens.loading.pretrained_sae_loaders import read_sae_components_from_disk

    wanted = {"finetuning_scaling_factor": False} | _json(folder / "cfg.json") | config
    return read_sae_components_from_disk(wanted, folder / "sae_weights.safetensors")[1]


# ---- sparsify


def module_hook(module: str, model: str) -> str | None:
    """The hook point of a module's output, where both libraries mean the same tensor; None where that is not known."""
    match = _MODULE.fullmatch(module)
    if match is None or match[2] not in _KINDS:
        return None
    if match[2] and "gemma" in model.lower():
        return None  # Gemma norms what its MLP writes, and TransformerLens reads after that norm
    return f"blocks.{match[1]}.{_KINDS[match[2]]}"


def _sparsify_config(folder: Path) -> Config:
    own, run = _json(folder / "cfg.json"), {}
    if (folder.parent / "config.json").is_file():
        run = _json(folder.parent / "config.json")
    if own.get("transcode") or own.get("skip_connection"):
        raise ValueError("SAELens has no TopK transcoder to load it as")
    if own.get("activation", "topk") != "topk" or own.get("signed"):
        raise ValueError(f"activation must be topk, got {'signed topk' if own.get('signed') else own['activation']}")
    metadata = {
        "model_name": run.get("model"),
        "hook_name": module_hook(folder.name, str(run.get("model", ""))),
        "context_size": run.get("ctx_len"),
        "dataset_path": run.get("dataset"),
        "normalize_decoder": own.get("normalize_decoder", True),
    }
    return {
        "architecture": "topk",
        "d_in": own["d_in"],
        "d_sae": own.get("num_latents") or own["d_in"] * own["expansion_factor"],
        "k": own["k"],
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "metadata": _said(metadata),
    }


def _sparsify_weights(folder: Path, config: Config) -> Weights:
    from safetensors.torch import load_file

    found = load_file(folder / "sae.safetensors")
    config["dtype"] = str(found["W_dec"].dtype).removeprefix("torch.")
    return {  # W_dec is [F, d_in] already, encoder.weight [F, d_in] as torch keeps it
        "W_enc": found["encoder.weight"].T.contiguous(),
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
    }


# ---- dictionary_learning

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


def _dictionary_config(folder: Path) -> Config:
    content = _json(folder / "config.json")
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
        "metadata": _said(metadata),
        **({"k": trainer["k"]} if kind == "AutoEncoderTopK" else {}),
    }


def _dictionary_weights(folder: Path, config: Config) -> Weights:
    found = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
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


# ---- Gemma Scope

_GEMMA_SCOPE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?![a-z])")
_LAYER = re.compile(r"layer_(\d+)")
_GEMMA_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_GEMMA_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a .npz, by their headers alone: the file may have gigabytes."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shapes[member.removesuffix(".npy")] = read[np.lib.format.read_magic(file)[0]](file)[0]
    return shapes


def _gemma_scope_config(folder: Path) -> Config:
    """The repository's name in the path gives model and site (also in a hub's cache), `layer_20` the layer."""
    repository, below = _gemma_scope_place(folder)
    layer = _LAYER.search(below)
    shapes = {_gemma_name(name): shape for name, shape in _npz_shapes(folder / "params.npz").items()}
    if missing := [name for name in _GEMMA_WEIGHTS if name not in shapes]:
        raise ValueError(f"params.npz must have {', '.join(_GEMMA_WEIGHTS)}, got none named {', '.join(missing)}")
    metadata: Config = {}
    if repository:
        size, tuned, site = repository.groups()
        embedded = "hook_embed" if _embedded(folder) else None
        if site == "transcoders":
            raise ValueError("params.npz of transcoders are not read")
        metadata = {
            "model_name": f"google/gemma-2-{size}" + ("-it" if tuned == "it" else ""),
            "hook_name": f"blocks.{layer[1]}.{_GEMMA_HOOKS[site]}" if layer else embedded,
            "context_size": 1024,
            "prepend_bos": True,
        }
    d_in, d_sae = shapes["W_enc"]
    return {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "metadata": _said(metadata),
    }


def _gemma_scope_place(folder: Path) -> tuple[re.Match[str] | None, str]:
    """The repository's name in the path, and what comes below it; without one, the folder's own name."""
    path = folder.absolute().as_posix()
    found = list(_GEMMA_SCOPE.finditer(path))
    return (found[-1], path[found[-1].end() :]) if found else (None, folder.absolute().name)


def _embedded(folder: Path) -> bool:
    """Whether an SAE is of the embeddings: a folder of that name instead of a layer's."""
    below = _gemma_scope_place(folder)[1]
    return "embedding" in below.split("/") and _LAYER.search(below) is None


def _gemma_name(name: str) -> str:
    return "W" + name[1:] if name.startswith("w_") else name


def _gemma_scope_weights(folder: Path, config: Config) -> Weights:
    with np.load(folder / "params.npz") as data:
        found = {_gemma_name(name): torch.from_numpy(data[name]) for name in data}
    config["dtype"] = str(found["W_enc"].dtype).removeprefix("torch.")
    if not bool((found.pop("scaling_factor", torch.ones(1)) == 1).all()):
        raise ValueError("scaling_factor must be 1, got others")
    if _embedded(folder):  # trained on embeddings as the model scales them, by the root of its width
        root = config["d_in"] ** 0.5
        found |= {"W_enc": found["W_enc"] / root, "W_dec": found["W_dec"] * root}
    return {name: found[name] for name in _GEMMA_WEIGHTS}


def _said(metadata: Config) -> Config:
    return {key: value for key, value in metadata.items() if value is not None}


FORMATS = (
    Format("SAELens", "cfg.json", "sae_weights.safetensors", _saelens_config, _saelens_weights),
    Format("sparsify", "cfg.json", "sae.safetensors", _sparsify_config, _sparsify_weights),
    Format("dictionary_learning", "config.json", "ae.pt", _dictionary_config, _dictionary_weights),
    Format("Gemma Scope", None, "params.npz", _gemma_scope_config, _gemma_scope_weights),
)
