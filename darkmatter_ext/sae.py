"""SAELens objects for the experiments: load from a folder with clear errors, reconstruct and count latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
