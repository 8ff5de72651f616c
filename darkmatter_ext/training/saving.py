"""A trained SAE as a SAELens object, and on disk: SAELens' layout, or EleutherAI sparsify's.

The number that divided the activations is folded into the biases and the threshold: Sae(x) = scale * sae(x / scale).
This is exact because scaling does not change what relu, top-k and thresholds select. BatchTopK and Matryoshka SAEs become
JumpReLU SAEs with a single threshold, as in SAELens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from darkmatter_ext.runtime.inputs import InputError, require_one_of
from darkmatter_ext.runtime.storage import atomic_folder
from darkmatter_ext.training.config import TrainingConfig
from darkmatter_ext.training.selection import BatchTopK
from darkmatter_ext.training.trainer import SaeTrainer

if TYPE_CHECKING:
    from sae_lens import SAE

LAYOUTS = ("saelens", "sparsify")


@dataclass(frozen=True)
class TrainedSae:
    """A trained SAE, with how it was trained and how well it performs."""

    sae: SAE  # a SAELens object, in the units of the activations
    config: TrainingConfig
    report: dict[str, float]
    """final numbers: loss, dead_share, and under `train/` and `held_out/`: fvu, l0, silent_share, tokens"""
    history: list[dict[str, float]] = field(repr=False)  # every `log_every` steps

    def save(self, folder: str | Path, layout: str = "saelens") -> Path:
        """Write the SAE, with `training.json` beside it; the folder appears only when complete.

        Args:
            folder: must not exist; an existing one is left unchanged.
            layout: saelens, or sparsify (TopK only, as sparsify has nothing else).

        Raises InputError for another layout, or one that cannot hold this SAE; OSError if nothing can be written.
        """
        require_one_of("layout", LAYOUTS, layout)
        if layout == "sparsify" and self.config.architecture != "topk":
            raise InputError(f"layout: must be saelens for a {self.config.architecture} SAE, got 'sparsify'")
        with atomic_folder(Path(folder)) as part:
            if layout == "sparsify":
                self._save_sparsify(part)
            else:
                self.sae.save_model(part)
            content = {"config": dataclasses.asdict(self.config), "report": self.report, "history": self.history}
            (part / "training.json").write_text(json.dumps(content, indent=1))
        return Path(folder)

    def _save_sparsify(self, folder: Path) -> None:
        from safetensors.torch import save_file

        weights = {name: weight.detach().cpu() for name, weight in self.sae.state_dict().items()}
        named = {
            "encoder.weight": weights["W_enc"].mT.contiguous(),
            "encoder.bias": weights["b_enc"],
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_dec"],
        }
        save_file(named, folder / "sae.safetensors")
        d_sae, d_in = weights["W_dec"].shape
        config = {
            "activation": "topk",
            "expansion_factor": d_sae // d_in or 1,
            "normalize_decoder": self.config.decoder_norm == "unit",
            "num_latents": d_sae,
            "k": self.config.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": d_in,
        }
        (folder / "cfg.json").write_text(json.dumps(config))


def _about(config: TrainingConfig) -> dict[str, Any]:
    """What SAELens' metadata records about training. It names no version, as SAELens' own trainer was not involved."""
    said: dict[str, Any] = {"training_architecture": config.architecture, "sae_lens_training_version": None}
    aimed = config.architecture != "jumprelu" or config.l0_penalty == "target"
    return said | ({"k": config.k} if aimed else {})


@torch.no_grad()
def as_sae_lens(trainer: SaeTrainer, scale: float, metadata: Mapping[str, Any]) -> SAE:
    """The SAE for unscaled activations, which training divided by `scale`; float32, on the training device."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    config, weights = trainer.config, trainer.weights
    options: dict[str, Any] = {
        "d_in": len(weights["b_dec"]),
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": str(weights["b_dec"].device),
        "apply_b_dec_to_input": True,
        "metadata": SAEMetadata(**(_about(config) | dict(metadata))),
    }
    found = {
        "W_enc": weights["W_enc"].mT.contiguous(),
        "b_enc": weights["b_enc"] * scale,
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"] * scale,
    }
    if config.architecture == "topk":
        sae: SAE = TopKSAE(TopKSAEConfig(k=config.k, **options))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**options))
        own = trainer.selection
        threshold = (
            torch.full_like(found["b_enc"], own.threshold) if isinstance(own, BatchTopK) else weights["threshold"]
        )
        found["threshold"] = threshold * scale
    sae.load_state_dict({name: weight.float() for name, weight in found.items()})
    return sae.eval().requires_grad_(False)
