"""SAELens objects seen through this package's ops: load from a folder, encode to SparseActs, decode.

topk, jumprelu and standard SAEs with plain inputs run on the ops; any other architecture or option runs SAELens' own
encode and decode, so every SAE gives its own answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext import ops
from darkmatter_ext.decomposition import Reconstruct, Reconstruction, TokenBatch
from darkmatter_ext.sparse import SparseActs

if TYPE_CHECKING:
    from sae_lens import SAE

    from darkmatter_ext.ops import PreparedEncoder

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
class SparseCoder:
    """An SAE as two functions: activations [n, d] -> SparseActs -> reconstruction [n, d]."""

    sae: SAE
    encode: Callable[[Tensor], SparseActs]
    decode: Callable[[SparseActs], Tensor]
    uses_ops: bool  # False: SAELens' own dense encode and decode

    def reconstruct(self, batch: TokenBatch) -> Reconstruction:
        """Sae(x) and L0 of a batch, in the dtype of the batch; SAELens' own casting rules inside."""
        acts = self.encode(batch.x.to(self.sae.dtype))
        return Reconstruction(self.decode(acts).to(batch.x.dtype), acts.l0())


def as_reconstruct(sae: SAE) -> Reconstruct:
    """The function `decompose_stream` wants, for an SAE."""
    return sparse_coder(sae).reconstruct


def _runs_on_ops(sae: SAE) -> bool:
    cfg = sae.cfg
    plain = cfg.normalize_activations == "none" and cfg.reshape_activations == "none"
    return (
        plain
        and cfg.architecture() in ("topk", "jumprelu", "standard")
        and not getattr(cfg, "rescale_acts_by_decoder_norm", False)
    )


def sparse_coder(sae: Any) -> SparseCoder:
    """Encode and decode functions for an SAE whose weights will not change any more (they are packed once here)."""
    if not _runs_on_ops(sae):
        return SparseCoder(
            sae,
            encode=lambda x: ops.find_support(sae.encode(x)),
            decode=lambda acts: sae.decode(acts.to_dense()),
            uses_ops=False,
        )
    b_dec = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
    prepared = ops.prepare_encoder(sae.W_enc, sae.b_enc, b_dec=b_dec)
    return SparseCoder(
        sae,
        encode=_encoder(sae, prepared, b_dec),
        decode=lambda acts: ops.sparse_decode(acts, sae.W_dec, sae.b_dec),
        uses_ops=True,
    )


def _encoder(sae: Any, prepared: PreparedEncoder, b_dec: Tensor | None) -> Callable[[Tensor], SparseActs]:
    W_enc, b_enc = sae.W_enc, sae.b_enc
    if sae.cfg.architecture() == "topk":
        k = sae.activation_fn.k  # what counts after construction, not cfg.k
        return lambda x: ops.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=prepared)
    threshold = sae.threshold if sae.cfg.architecture() == "jumprelu" else torch.zeros((), dtype=W_enc.dtype)
    # JumpReLU applies relu before its strict threshold, so a negative threshold keeps what relu keeps.
    threshold = threshold.detach().clamp(min=0)
    return lambda x: ops.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, prepared=prepared)
