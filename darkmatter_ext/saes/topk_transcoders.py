"""TopK transcoders as SAELens objects: other libraries train them, but SAELens has no class for them.

They are not added to SAELens' registry of architectures; `loading.load_sae` creates them. Import this module only where
one is needed, because it imports SAELens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig


@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """Configuration of a transcoder whose k largest latents are active."""

    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"


@dataclass
class TopKSkipTranscoderConfig(SkipTranscoderConfig):
    """Configuration of a transcoder that also adds a linear map of its input to its output."""

    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKTranscoder(Transcoder):
    """relu of the k largest of x @ W_enc + b_enc, times W_dec, plus b_dec."""

    cfg: TopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]  (as SAELens does)

    def get_activation_fn(self) -> Any:
        return TopK(self.cfg.k)

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        return cls

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> Any:
        return CONFIGS[architecture]


class TopKSkipTranscoder(SkipTranscoder, TopKTranscoder):
    """A TopKTranscoder plus x @ W_skip.T."""

    cfg: TopKSkipTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]  (as SAELens does)


CONFIGS = {"topk_transcoder": TopKTranscoderConfig, "topk_skip_transcoder": TopKSkipTranscoderConfig}
CLASSES = {"topk_transcoder": TopKTranscoder, "topk_skip_transcoder": TopKSkipTranscoder}
