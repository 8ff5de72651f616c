"""Training TopK SAEs with this package's own ops, saved in SAELens' format.

Gao et al., "Scaling and evaluating sparse autoencoders", 2406.04093: TopK activation, unit-norm decoder rows, encoder
initialised to the decoder's transpose, auxiliary loss on dead latents. SAELens' TopKSAE holds and saves the weights; its
trainer is not used because it works on dense pre-activations [n, F].

Shapes: n tokens of a batch, d model dimension, F latents, k active.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import sparse_decode
from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.storage import atomic_folder

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True)
class TrainingConfig:
    """One TopK SAE and how it is trained."""

    d_sae: int
    k: int = 32
    steps: int = 400
    batch_size: int = 2048
    learning_rate: float = 1e-3
    decay_share: float = 0.3  # the last part of training, over which the learning rate goes to 0 linearly
    dead_after_tokens: int = 50_000  # a latent silent for so many tokens counts as dead
    aux_coefficient: float = 1 / 32  # weight of the auxiliary loss (2406.04093, appendix A.2)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_sae", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k: must be from 1 to d_sae ({self.d_sae}), got {self.k}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate: must be above 0, got {self.learning_rate}")


@dataclass
class _TopKTrainer:
    """Weights, optimiser and dead-latent counters of one SAE in training, in units where E||x||^2 = d."""

    config: TrainingConfig
    W_enc: Tensor  # [d, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d], unit rows
    b_dec: Tensor  # [d]
    optimiser: torch.optim.Optimizer
    silent_tokens: Tensor  # [F] tokens since each latent last fired

    @classmethod
    def start(cls, config: TrainingConfig, mean: Tensor) -> _TopKTrainer:
        generator = torch.Generator().manual_seed(config.seed)
        W_dec = torch.randn(config.d_sae, len(mean), generator=generator)
        W_dec = (W_dec / W_dec.norm(dim=1, keepdim=True)).to(mean.device)
        W_enc, b_enc, b_dec = W_dec.mT.contiguous(), torch.zeros(config.d_sae, device=mean.device), mean.clone()
        parameters = [weight.requires_grad_() for weight in (W_enc, b_enc, W_dec, b_dec)]
        # foreach=True: one fused pass over the parameters; eps as in 2406.04093.
        optimiser = torch.optim.Adam(
            parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=6.25e-10, foreach=True
        )
        silent = torch.zeros(config.d_sae, dtype=torch.int64, device=mean.device)
        return cls(config, W_enc, b_enc, W_dec, b_dec, optimiser, silent)

    def step(self, x: Tensor) -> float:
        """One optimiser step on x [n, d]; returns the mean squared error of the batch."""
        acts = topk_encode(x, self.W_enc, self.b_enc, self.config.k, b_dec=self.b_dec)
        error = x - sparse_decode(acts, self.W_dec, self.b_dec)  # [n, d]
        mse = error.square().mean()
        self._count_firing(acts, len(x))
        loss = mse + self.config.aux_coefficient * self._auxiliary_loss(x, error.detach())
        self.optimiser.zero_grad()
        loss.backward()
        self._project_decoder_gradient()
        self.optimiser.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return mse.item()

    def _count_firing(self, acts: SparseActs, n_tokens: int) -> None:
        fired = acts.indices[acts.values > 0]
        self.silent_tokens += n_tokens
        self.silent_tokens[fired] = 0

    def dead(self) -> Tensor:
        """Numbers of the dead latents."""
        return (self.silent_tokens > self.config.dead_after_tokens).nonzero().flatten()

    def _auxiliary_loss(self, x: Tensor, error: Tensor) -> Tensor:
        """How badly the dead latents alone explain the error, relative to its variance (2406.04093, A.2)."""
        dead = self.dead()
        if len(dead) == 0:
            return x.new_zeros(())
        k = min(len(dead), x.shape[1] // 2)
        acts = topk_encode(x, self.W_enc[:, dead], self.b_enc[dead], k, b_dec=self.b_dec.detach())
        explained = sparse_decode(acts, self.W_dec[dead])
        loss = (error - explained).square().mean() / error.var().clamp(min=torch.finfo(error.dtype).tiny)
        return loss.nan_to_num(0.0)  # an exactly zero error has no variance to explain

    @torch.no_grad()
    def _project_decoder_gradient(self) -> None:
        """Remove the part of the gradient along each decoder row: the renormalisation would undo it."""
        gradient = self.W_dec.grad
        assert gradient is not None
        gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec


@torch.enable_grad()  # also where an experiment measures without gradients
def train_topk_sae(
    x: Tensor,
    config: TrainingConfig,
    *,
    metadata: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[SAE, dict[str, float]]:
    """Train a TopK SAE on activations x [n, d] in memory.

    Args:
        x: training activations, floating point, at least one batch of them.
        config: see TrainingConfig; batches are drawn in seeded epochs.
        metadata: kept in the SAE's configuration (model_name, hook_name, ...).
        progress: called with the number of steps done since the last call.

    Returns:
        the SAE (a SAELens TopKSAE, float32, in the scale of x) and its training report: final_mse relative to the
        variance, share of dead latents.

    Raises:
        ValueError: too few tokens, or a loss that is not finite.
        TypeError: x not floating point.

    Cost: steps * batch_size exact encodes (batch_size k d_sae values are never made dense) and Adam on 2 d_sae d weights.
    """
    if x.ndim != 2 or len(x) < config.batch_size:
        raise InputError(f"x: must hold at least one batch [{config.batch_size}, d], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: must be a floating-point tensor, got {x.dtype}")
    x = x.float()
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().item()  # activations are trained at unit variance a dimension
    if not 0 < scale < float("inf"):
        raise InputError(f"x: must be finite and vary, got a standard deviation of {scale}")
    trainer = _TopKTrainer.start(config, mean / scale)
    generator = torch.Generator().manual_seed(config.seed + 1)
    order, at, mse = torch.empty(0, dtype=torch.int64), 0, 0.0
    decay_steps = max(1, round(config.decay_share * config.steps))
    for step in range(config.steps):
        if at + config.batch_size > len(order):
            order, at = torch.randperm(len(x), generator=generator), 0
        rate = config.learning_rate * min(1.0, (config.steps - step) / decay_steps, (step + 1) / 20)
        trainer.optimiser.param_groups[0]["lr"] = rate
        mse = trainer.step(x[order[at : at + config.batch_size]] / scale)
        at += config.batch_size
        if math.isnan(mse):
            raise InputError(f"learning_rate: training diverged at step {step}, got {config.learning_rate}")
        if progress is not None:
            progress(1)
    report = {"final_mse": mse, "dead_share": len(trainer.dead()) / config.d_sae}
    return _as_sae_lens(trainer, scale, config, metadata or {}), report


def _as_sae_lens(trainer: _TopKTrainer, scale: float, config: TrainingConfig, metadata: dict[str, Any]) -> SAE:
    """Fold the scale into the biases: Sae(x) = scale * sae(x / scale), because relu and top-k are scale-free."""
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    d_in = len(trainer.b_dec)
    cfg = TopKSAEConfig(
        d_in=d_in,
        d_sae=config.d_sae,
        k=config.k,
        dtype="float32",
        device=str(trainer.b_dec.device),
        apply_b_dec_to_input=True,
        metadata=SAEMetadata(**metadata),
    )
    sae = TopKSAE(cfg)
    weights = {
        "W_enc": trainer.W_enc,
        "b_enc": trainer.b_enc * scale,
        "W_dec": trainer.W_dec,
        "b_dec": trainer.b_dec * scale,
    }
    sae.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return sae.eval().requires_grad_(False)


def save_sae(sae: SAE, folder: Path, report: dict[str, Any], config: TrainingConfig) -> None:
    """Save in SAELens' format with the training report beside it; the folder appears only when complete."""
    with atomic_folder(folder) as part:
        sae.save_model(part)
        (part / "training.json").write_text(
            json.dumps({"config": dataclasses.asdict(config), "report": report}, indent=2)
        )
