"""SAELens objects for the experiments: load from a folder with clear errors, reconstruct and count latents."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.drop_in import accelerate, is_accelerated
from darkmatter_ext.sparse import SparseActs

if TYPE_CHECKING:
    from sae_lens import SAE

CONFIG_NAME, WEIGHTS_NAME = "cfg.json", "sae_weights.safetensors"


def load_sae(folder: str | Path, *, device: str = "cpu") -> SAE:
    """An SAE from a folder in SAELens' format.

    Raises ValueError, in one line, when the folder or a file is missing, truncated or not what it should be, or a
    weight is NaN.
    """
    from sae_lens import SAE

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"--sae: must be a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {folder} (no such folder)"
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--sae: must be a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {folder} without {missing[0]}"
        )
    try:
        sae = SAE.load_from_disk(folder, device=device)
    except Exception as error:  # json, safetensors, torch and sae_lens each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--sae: must be a complete SAE in SAELens format, got {folder} ({reason})") from None
    for name, parameter in sae.named_parameters():
        if bool(parameter.isnan().any()):
            raise ValueError(f"--sae: weights must not be NaN, got NaN in {name} of {folder}")
    return sae.eval().requires_grad_(False)


@dataclass(frozen=True)
class SaeDescription:
    """What an SAE's configuration says, without its weights."""

    spec: str  # a folder, or RELEASE:ID
    name: str
    d_in: int
    d_sae: int
    architecture: str
    metadata: dict[str, Any]  # SAELens' keys: model_name, hook_name, context_size, prepend_bos, ...

    @property
    def weight_bytes(self) -> int:
        """Of encoder and decoder in float32."""
        return 8 * self.d_in * self.d_sae


def _release_and_id(spec: str) -> tuple[str, str]:
    release, _, sae_id = spec.partition(":")
    if not sae_id:
        raise ValueError(f"--sae: must be a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or RELEASE:ID, got {spec!r}")
    return release, sae_id


def _converter(release: str) -> str | None:
    """SAELens' name of the format of a repository it knows by other releases; None: it knows the release itself."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory, get_releases_for_repo_id

    directory = get_pretrained_saes_directory()
    siblings = get_releases_for_repo_id(release) if release not in directory else []
    return (directory[siblings[0]].conversion_func or "sae_lens") if siblings else None


def describe_sae(spec: str) -> SaeDescription:
    """The configuration of an SAE: of a folder in SAELens' format, or of RELEASE:ID (a release of SAELens' list, or a
    repository one of them is from). Downloads at most a small file.

    Raises ValueError, one line, when it is neither or cannot be read.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = Path(spec)
    try:
        if folder.is_dir():
            content = json.loads((folder / CONFIG_NAME).read_text())
            name = folder.resolve().name
        else:
            release, name = _release_and_id(spec)
            converter = _converter(release)
            if converter is None:
                content = loaders.load_sae_config_from_huggingface(release, name)
            else:
                getter = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[converter]
                content = loaders.handle_config_defaulting(getter(release, name, "cpu", False, {}))
        metadata = content.get("metadata") or {}
        return SaeDescription(
            spec, name, content["d_in"], content["d_sae"], content.get("architecture", "standard"), metadata
        )
    except Exception as error:  # hub, network, json and configuration errors each have their own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, ValueError) and reason.startswith("--sae"):
            raise
        raise ValueError(f"--sae: must be an SAE that can be read, got {spec} ({reason})") from None


def load_spec(spec: str, *, device: str = "cpu", dtype: str = "float32") -> SAE:
    """The SAE of a folder or RELEASE:ID, as `describe_sae` names them; RELEASE:ID downloads it once.

    Raises ValueError, one line, when it cannot be loaded.
    """
    import torch
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    if Path(spec).is_dir():
        return load_sae(spec, device=device).to(getattr(torch, dtype))
    release, sae_id = _release_and_id(spec)
    converter = _converter(release)
    loader = None if converter is None else NAMED_PRETRAINED_SAE_LOADERS[converter]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace repo_id")
            sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype, converter=loader)
    except Exception as error:  # hub, network and configuration errors each have their own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--sae: must be an SAE that can be loaded, got {spec} ({reason})") from None
    return sae.eval().requires_grad_(False)


class Encoded(NamedTuple):
    """What an SAE makes of activations [n, d]."""

    x_hat: Tensor  # [n, d]
    l0: Tensor  # [n] number of active latents
    acts: SparseActs  # [n, F]


Encoder = Callable[[Tensor], Encoded]


def as_encoder(sae: SAE) -> Encoder:
    """x [n, d] -> Sae(x), L0 and active latents, Sae(x) in the dtype of x.

    Accelerates `sae`, in place, where it can be; others (temporal, own classes) run SAELens' code. SAEs on hook_z take x
    with heads flattened, as our sources give it.
    """
    if sae.cfg.reshape_activations == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
    with contextlib.suppress(ValueError):  # the reason is in accelerate's message; every SAE gives its own answer
        accelerate(sae)

    def encode(x: Tensor) -> Encoded:
        given, own = x.to(sae.dtype), cast("Any", sae)
        if is_accelerated(sae):
            acts = own.encode_sparse(given)
            return Encoded(own.decode_sparse(acts).to(x.dtype), acts.l0(), acts)
        dense = sae.encode(given)
        return Encoded(sae.decode(dense).to(x.dtype), (dense != 0).sum(-1), SparseActs.from_dense(dense))

    return encode


def as_reconstruct(sae: SAE) -> Reconstruct:
    """The function `decompose_stream` wants, for an SAE: Sae(x) and L0 of a batch; see `as_encoder`."""
    encode = as_encoder(sae)

    def reconstruct(batch: TokenBatch) -> Reconstruction:
        encoded = encode(batch.x)
        return Reconstruction(encoded.x_hat, encoded.l0)

    return reconstruct
