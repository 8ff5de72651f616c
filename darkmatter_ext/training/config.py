"""What is trained and how, and which tokens train it. Data and checks; nothing is read or run here.

Units: activations are divided by one number, so that they have variance 1 a dimension. Losses, thresholds and the
bandwidth are in these units; the saved SAE is in those of the activations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from darkmatter_ext.runtime.inputs import InputError, require, require_at_least, require_one_of

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "matryoshka")
FREEZES = ("none", "decoder", "encoder", "soft-decoder")
DECODER_NORMS = ("unit", "free")
SCHEDULES = ("constant", "linear", "cosine")
L0_PENALTIES = ("target", "count")
WEIGHT_DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class TrainingConfig:
    """One SAE and how it is trained."""

    d_sae: int = 4096
    """latents"""
    k: int = 32
    """active latents a token: each token's (topk), the mean of a batch (batchtopk, matryoshka), aimed at (jumprelu)"""
    architecture: str = "topk"
    """topk, batchtopk, jumprelu or matryoshka (a BatchTopK SAE whose first latents alone reconstruct too)"""
    steps: int = 400
    """optimiser steps"""
    batch_size: int = 2048
    """tokens a step"""
    learning_rate: float = 1e-3
    """of Adam, at its highest"""
    schedule: str = "linear"
    """of the learning rate after its warm-up: constant; linear or cosine: over the last part it goes to 0"""
    warmup_steps: int = 20
    """first steps, over which the learning rate rises from 0"""
    decay_share: float = 0.3
    """share of the steps over which the learning rate goes to 0"""
    max_gradient_norm: float = 0.0
    """clip the gradient of all weights together to this norm; 0: do not"""
    dead_after_tokens: int = 50_000
    """a latent silent for so many tokens counts as dead, and takes part in the auxiliary loss"""
    aux_coefficient: float = 1 / 32
    """weight of the auxiliary loss, in which dead latents alone explain the error (2406.04093, A.2); 0: none"""
    aux_k: int = 0
    """dead latents a token in the auxiliary loss; 0: half of the model dimension"""
    decoder_norm: str = "unit"
    """unit: the decoder's rows keep norm 1, gradients along them are taken out; free"""
    freeze: str = "none"
    """control (2602.14111): decoder or encoder stays as drawn; soft-decoder: cosine of each row with its start >= 0.8"""
    weights_dtype: str = "float32"
    """float32; bfloat16: the step in bfloat16 with float32 masters; float64: slow, for comparisons"""
    matryoshka_widths: tuple[int, ...] = ()
    """first latents that reconstruct alone too, ascending; none: an eighth, a quarter and half of d_sae"""
    l0_coefficient: float = 0.1
    """weight of JumpReLU's sparsity penalty, against the share of variance not explained"""
    l0_penalty: str = "target"
    """of jumprelu (2407.14435): target: (L0 / k - 1)^2 of each token; count: L0"""
    bandwidth: float = 0.1
    """of the straight-through estimators of JumpReLU's threshold"""
    seed: int = 0
    """of the weights' start (with d_sae, so that widths share nothing) and of the order of tokens"""

    def __post_init__(self) -> None:
        for name in ("d_sae", "steps", "batch_size"):
            require_at_least(name, 1, getattr(self, name))
        require(1 <= self.k <= self.d_sae, "k", f"must be from 1 to d_sae ({self.d_sae})", self.k)
        for name in ("warmup_steps", "max_gradient_norm", "dead_after_tokens", "aux_coefficient", "aux_k"):
            require_at_least(name, 0, getattr(self, name))
        for name in ("learning_rate", "bandwidth"):
            require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))
        require(0 <= self.decay_share <= 1, "decay_share", "must be from 0 to 1", self.decay_share)
        require_at_least("l0_coefficient", 0, self.l0_coefficient)
        for name, allowed in (
            ("architecture", ARCHITECTURES), ("freeze", FREEZES), ("decoder_norm", DECODER_NORMS),
            ("schedule", SCHEDULES), ("l0_penalty", L0_PENALTIES), ("weights_dtype", WEIGHT_DTYPES),
        ):  # fmt: skip
            require_one_of(name, allowed, getattr(self, name))
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        if self.matryoshka_widths and self.architecture != "matryoshka":
            raise InputError(f"matryoshka_widths: must be left out with {self.architecture}, got it")
        widths = [0, *self.matryoshka_widths, self.d_sae]
        if any(second <= first for first, second in itertools.pairwise(widths)):
            raise InputError(
                f"matryoshka_widths: must ascend from 1 to below d_sae ({self.d_sae}), got {list(self.matryoshka_widths)}"
            )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """How many of the first latents reconstruct x, each in a loss of its own; the last is all of them."""
        if self.architecture != "matryoshka":
            return (self.d_sae,)
        return (*(self.matryoshka_widths or sorted({self.d_sae // part for part in (8, 4, 2)} - {0})), self.d_sae)


@dataclass(frozen=True)
class StreamConfig:
    """Which tokens of a source train, which are held out, and how they are mixed."""

    held_out_share: float = 0.05
    """share of the text, its end, that no SAE is trained on and all are evaluated on; 0: none"""
    evaluation_tokens: int = 16384
    """at most so many held-out tokens, and as many of those trained on, are evaluated"""
    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians of the first buffer; 0: keep all"""
    buffer_tokens: int = 131_072
    """contexts are drawn at random, read this many tokens at a time, and their tokens shuffled"""

    def __post_init__(self) -> None:
        require(0 <= self.held_out_share < 1, "held_out_share", "must be from 0 to below 1", self.held_out_share)
        for name, least in (
            ("evaluation_tokens", 1),
            ("drop_positions", 0),
            ("max_norm_ratio", 0),
            ("buffer_tokens", 1),
        ):
            require_at_least(name, least, getattr(self, name))
