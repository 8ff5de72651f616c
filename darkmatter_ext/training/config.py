"""What is trained, how, and on which tokens. Data and checks only; nothing is read or run here.

Units: activations are divided by one number so that their variance is 1 per dimension. Losses, thresholds and the
bandwidth are in these units; the saved SAE is in the units of the activations.
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
    """active latents per token: exact (topk), mean over a batch (batchtopk, matryoshka), or target (jumprelu)"""
    architecture: str = "topk"
    """topk, batchtopk, jumprelu or matryoshka (a BatchTopK SAE whose first latents also reconstruct on their own)"""
    steps: int = 400
    """optimiser steps"""
    batch_size: int = 2048
    """tokens per step"""
    learning_rate: float = 1e-3
    """peak learning rate of Adam"""
    schedule: str = "linear"
    """learning rate after warm-up: constant; linear or cosine: falls to 0 over the last part"""
    warmup_steps: int = 20
    """first steps, over which the learning rate rises from 0"""
    decay_share: float = 0.3
    """share of the steps over which the learning rate falls to 0"""
    max_gradient_norm: float = 0.0
    """clip the joint gradient of all weights to this norm; 0: no clipping"""
    dead_after_tokens: int = 50_000
    """a latent silent for this many tokens counts as dead and takes part in the auxiliary loss"""
    aux_coefficient: float = 1 / 32
    """weight of the auxiliary loss, in which dead latents alone explain the error (2406.04093, A.2); 0: none"""
    pre_act_coefficient: float = 1e-4
    """for jumprelu: weight of the loss that takes dead latents' thresholds to their pre-activations; 0: none"""
    aux_k: int = 0
    """dead latents per token in the auxiliary loss; 0: half of the model dimension"""
    decoder_norm: str = "unit"
    """unit: decoder rows keep norm 1 and gradients along them are removed; free: neither"""
    freeze: str = "none"
    """control (2602.14111): decoder or encoder stays as drawn; soft-decoder: cosine of each row with its start >= 0.8"""
    weights_dtype: str = "float32"
    """float32; bfloat16: steps in bfloat16 with float32 master weights; float64: slow, for comparisons"""
    matryoshka_widths: tuple[int, ...] = ()
    """numbers of first latents that also reconstruct alone, ascending; none: an eighth, a quarter and half of d_sae"""
    l0_coefficient: float = 0.1
    """weight of JumpReLU's sparsity penalty relative to the unexplained share of variance"""
    l0_penalty: str = "target"
    """for jumprelu (2407.14435): target: (L0 / k - 1)^2 of each token; count: L0"""
    bandwidth: float = 0.1
    """of the straight-through estimators for JumpReLU's threshold"""
    threshold_rate: float = 20.0
    """learning rate of JumpReLU's thresholds, in learning rates of the other weights: as slow as these, L0 misses k"""
    seed: int = 0
    """for the initial weights (with d_sae, so that widths share nothing) and the order of tokens"""

    def __post_init__(self) -> None:
        for name in ("d_sae", "steps", "batch_size"):
            require_at_least(name, 1, getattr(self, name))
        require(1 <= self.k <= self.d_sae, "k", f"must be from 1 to d_sae ({self.d_sae})", self.k)
        for name in (
            "warmup_steps", "max_gradient_norm", "dead_after_tokens", "aux_coefficient", "aux_k", "pre_act_coefficient",
        ):  # fmt: skip
            require_at_least(name, 0, getattr(self, name))
        for name in ("learning_rate", "bandwidth", "threshold_rate"):
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
        """Sizes of the prefixes of latents that each reconstruct x in their own loss; the last covers all latents."""
        if self.architecture != "matryoshka":
            return (self.d_sae,)
        return (*(self.matryoshka_widths or sorted({self.d_sae // part for part in (8, 4, 2)} - {0})), self.d_sae)


@dataclass(frozen=True)
class StreamConfig:
    """Which tokens of a source are trained on, which are held out, and how they are mixed."""

    held_out_share: float = 0.05
    """share of the text, at its end, on which all SAEs are evaluated and none is trained; 0: none"""
    evaluation_tokens: int = 16384
    """evaluate on at most this many held-out tokens, and on as many training tokens"""
    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians of the first buffer; 0: keep all"""
    buffer_tokens: int = 131_072
    """contexts are drawn at random and read this many tokens at a time; the tokens are then shuffled"""

    def __post_init__(self) -> None:
        require(0 <= self.held_out_share < 1, "held_out_share", "must be from 0 to below 1", self.held_out_share)
        for name, least in (
            ("evaluation_tokens", 1),
            ("drop_positions", 0),
            ("max_norm_ratio", 0),
            ("buffer_tokens", 1),
        ):
            require_at_least(name, least, getattr(self, name))
