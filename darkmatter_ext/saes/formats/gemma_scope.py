"""Gemma Scope: `params.npz` alone; the names of the folders say the rest.

Its transcoders read what the norm before the MLP gives before its gain, and write what is added to the residual stream.

Shapes: d_in width, F latents.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from darkmatter_ext.runtime.storage import require_bounded_archive
from darkmatter_ext.saes.formats.layout import Config, Format, Place, Weights, dtype_name, said

_REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?![a-z])")
_LAYER = re.compile(r"layer_(\d+)")
_READS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a .npz, by their headers alone: the file may have gigabytes."""
    require_bounded_archive(path)
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shapes[_own_name(member.removesuffix(".npy"))] = read[np.lib.format.read_magic(file)[0]](file)[0]
    return shapes


def _own_name(name: str) -> str:
    return "W" + name[1:] if name.startswith("w_") else name


def _config(place: Place) -> Config:
    """The repository's name in the path gives model and site (also in a hub's cache), `layer_20` the layer."""
    repository, below = _of_path(place.folder)
    layer = _LAYER.search(below)
    shapes = _shapes(place.weights)
    if missing := [name for name in _TENSORS if name not in shapes]:
        raise ValueError(f"params.npz must have {', '.join(_TENSORS)}, got none named {', '.join(missing)}")
    metadata: Config = {}
    transcodes = repository is not None and repository[3] == "transcoders"
    if repository:
        size, tuned, site = repository.groups()
        embedded = "hook_embed" if _embedded(place.folder) else None
        metadata = {
            "model_name": f"google/gemma-2-{size}" + ("-it" if tuned == "it" else ""),
            "hook_name": f"blocks.{layer[1]}.{_READS[site]}" if layer else embedded,
            "hook_name_out": f"blocks.{layer[1]}.hook_mlp_out" if layer and transcodes else None,
            "context_size": 1024,
            "prepend_bos": True,
        }
    d_in, d_sae = shapes["W_enc"]
    return {
        "architecture": "jumprelu_transcoder" if transcodes else "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "metadata": said(metadata),
        **({"d_out": shapes["W_dec"][1]} if transcodes else {}),
    }


def _of_path(folder: Path) -> tuple[re.Match[str] | None, str]:
    """The repository's name in the path, and what comes below it; without one, the folder's own name."""
    path = folder.absolute().as_posix()
    found = list(_REPOSITORY.finditer(path))
    return (found[-1], path[found[-1].end() :]) if found else (None, folder.absolute().name)


def _embedded(folder: Path) -> bool:
    """Whether an SAE is of the embeddings: a folder of that name instead of a layer's."""
    below = _of_path(folder)[1]
    return "embedding" in below.split("/") and _LAYER.search(below) is None


def _weights(place: Place, config: Config) -> Weights:
    with np.load(place.weights) as data:
        found = {_own_name(name): torch.from_numpy(data[name]) for name in data}
    config["dtype"] = dtype_name(found["W_enc"])
    if not bool((found.pop("scaling_factor", torch.ones(1)) == 1).all()):
        raise ValueError("scaling_factor must be 1, got others")
    if _embedded(place.folder):  # trained on embeddings as the model scales them, by the root of its width
        root = config["d_in"] ** 0.5
        found |= {"W_enc": found["W_enc"] / root, "W_dec": found["W_dec"] * root}
    return {name: found[name] for name in _TENSORS}


GEMMA_SCOPE = Format("Gemma Scope", None, ("params.npz",), _config, _weights)
