"""One SAE in training: its weights, its optimiser, one step on a batch.

After Gao et al., "Scaling and evaluating sparse autoencoders", 2406.04093: the encoder starts as the decoder's transpose,
b_dec is subtracted from the input, decoder rows are unit vectors, dead latents are trained on the error. Activations
arrive already divided by one number (`config`).

Shapes: N tokens in a batch, d model dimension, F latents.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.batch_topk import EncoderRows
from darkmatter_ext.ops.decode import decoder_outer, sparse_decode
from darkmatter_ext.ops.ragged import latent_sums
from darkmatter_ext.runtime.processes import ALONE, Processes
from darkmatter_ext.training.auxiliary import OfDead, auxiliary_loss, pre_activation_loss
from darkmatter_ext.training.config import TrainingConfig
from darkmatter_ext.training.gradients import Reconstruction
from darkmatter_ext.training.seeds import generator
from darkmatter_ext.training.selection import Fired, selection_of

MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]
ADAM_EPS = 6.25e-10  # as in 2406.04093
ROWS_AT_A_TIME = 512  # these stay in the cache between two passes: a quarter of the time for 24576 rows of 768
LEAST_COSINE = 0.8  # between a soft-frozen decoder row and its start (2602.14111)
_FROZEN = {"decoder": ("W_dec",), "encoder": ("W_enc", "b_enc")}


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Factor on the learning rate at a step: warm-up, then decay over the last part."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = max(1, round(config.decay_share * config.steps))
    left = min(1.0, (config.steps - step) / decay_steps)
    if config.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(warm, 1.0 if config.schedule == "constant" else left)


@dataclass(frozen=True)
class StepReport:
    """Measurements of a step, as tensors [] on the device: reading them waits for the device."""

    loss: Tensor  # total
    mse: Tensor  # of the whole SAE: with activations of variance 1, about the FVU
    l0: Tensor  # mean over the batch


class SaeTrainer:
    """An SAE in training, in units where the activations have variance 1 per dimension."""

    def __init__(
        self,
        config: TrainingConfig,
        mean: Tensor,
        make_scheduler: MakeScheduler | None = None,
        own: Processes = ALONE,
    ) -> None:
        """`mean` [d] of the activations, on the training device; `own`: processes that each step on part of a batch."""
        self.config, self._own = config, own
        self.weights = start_weights(config, mean)
        self.selection = selection_of(config, self.weights, own)
        self.silent_tokens = torch.zeros(config.d_sae, dtype=torch.int64, device=mean.device)
        self.steps_done = 0
        self._start = self.weights["W_dec"].clone() if config.freeze == "soft-decoder" else None
        self.trained = [name for name in self.weights if name not in _FROZEN.get(config.freeze, ())]
        self.optimiser = torch.optim.Adam(self._groups(), lr=config.learning_rate, eps=ADAM_EPS, fused=True)
        make = make_scheduler or (lambda own: LambdaLR(own, lambda step: learning_rate_factor(config, step)))
        self._scheduler = make(self.optimiser)

    def _groups(self) -> list[dict[str, Any]]:
        """What Adam trains: JumpReLU's thresholds at a learning rate of their own.

        Adam moves each weight by about the learning rate a step. That suits the entries of a unit row, but thresholds are
        numbers near 2, and those of wide SAEs see few tokens: at that rate, 1600 steps left 4096 latents an L0 of 8, not 32.
        """
        own: list[dict[str, Any]] = [{"params": [self.weights[name] for name in self.trained if name != "threshold"]}]
        if "threshold" in self.weights:
            rate = self.config.learning_rate * self.config.threshold_rate
            own.append({"params": [self.weights["threshold"]], "lr": rate})
        return own

    # ---- the step

    @torch.no_grad()
    def step(self, x: Tensor) -> StepReport:
        """One optimiser step on a batch; x [N, d] is this process's part. Raises InputError if weights are NaN."""
        own = self._step_weights()
        x = x.to(self.weights["b_dec"].dtype)
        centred = (x - self.weights["b_dec"]).to(own["W_enc"].dtype)
        encoder = EncoderRows(own["W_enc"], own["b_enc"])
        if self.steps_done == 0:
            self.selection.start(centred, encoder)
        fired = self.selection.fired(centred, encoder)
        n_tokens = self._own.total(len(x), x.device)
        self._count_firing(fired.acts, n_tokens)
        found = Reconstruction.of(x, fired.acts, own["W_dec"], own["b_dec"], self.config.prefixes, n_tokens)
        grads = self._gradients(centred, fired, found, own)
        of_dead = self._add_losses_of_dead(centred, -found.error[:, -1], own, grads, n_tokens)
        for grad in grads.values():
            self._own.sum(grad)
        self._update(grads)
        loss = found.loss.sum() + fired.penalty + of_dead
        seen = torch.stack([loss, found.loss[-1], (fired.acts.values > 0).sum() / n_tokens])
        return StepReport(*self._own.sum(seen))

    def _step_weights(self) -> dict[str, Tensor]:
        """Weights in the dtype the ops run in: the master weights themselves, or copies."""
        if self.config.weights_dtype != "bfloat16":
            return self.weights
        return {name: weight.bfloat16() for name, weight in self.weights.items() if name != "threshold"}

    def _count_firing(self, acts: SparseActs, n_tokens: int) -> None:
        silent = torch.ones_like(self.silent_tokens)
        silent.index_fill_(0, acts.col_indices[acts.values.reshape(-1) > 0], 0)
        self.silent_tokens.add_(n_tokens).masked_fill_(self._own.sum(silent) < self._own.size, 0)

    def _gradients(
        self, centred: Tensor, fired: Fired, found: Reconstruction, own: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of reconstruction and penalty by every trained weight."""
        by = found.gradients(own["W_dec"], of_weights="W_dec" in self.trained)
        scores, threshold = fired.backward(by.values)
        scored = SparseActs(
            scores, fired.acts.stored_indices, fired.acts.d_sae, fired.acts.crow, fired.acts.ragged_batch_shape
        )
        b_enc = latent_sums(scores, scored)
        grads = {"b_dec": by.b_dec - (b_enc @ own["W_enc"]).to(by.b_dec.dtype)}  # it is also subtracted from x
        if by.W_dec is not None:
            grads["W_dec"] = by.W_dec
        if "W_enc" in self.trained:
            grads |= {"W_enc": decoder_outer(scored, centred), "b_enc": b_enc}
        if threshold is not None:
            grads["threshold"] = threshold
        return {name: grad.to(self.weights[name].dtype) for name, grad in grads.items()}

    def dead(self) -> Tensor:
        """Numbers of the latents that have not fired for a long time."""
        return (self.silent_tokens > self.config.dead_after_tokens).nonzero().flatten()

    def _add_losses_of_dead(
        self, centred: Tensor, error: Tensor, own: dict[str, Tensor], grads: dict[str, Tensor], n_tokens: int
    ) -> Tensor:
        """Add the gradients of the dead latents' losses and return their weighted sum []. b_dec is treated as a constant."""
        config, dead, total = self.config, self.dead(), error.new_zeros(())
        if len(dead) == 0:
            return total
        weights = OfDead(*(own[name][dead] for name in OfDead._fields))
        if weight := config.aux_coefficient:
            k = config.aux_k or max(1, centred.shape[1] // 2)
            loss, added = auxiliary_loss(centred, error, weights, k, weight, self._own)
            _add_rows(grads, dead, added._asdict())
            total += weight * loss
        if (weight := config.pre_act_coefficient) and "threshold" in self.weights:
            loss, lifted = pre_activation_loss(centred, weights, self.weights["threshold"][dead], weight, n_tokens)
            _add_rows(grads, dead, lifted._asdict())
            total += weight * loss
        return total

    def _update(self, grads: dict[str, Tensor]) -> None:
        W_dec, unit = self.weights["W_dec"], self.config.decoder_norm == "unit" and "W_dec" in grads
        if unit:
            take_out_along(grads["W_dec"], W_dec)
        for name in self.trained:
            self.weights[name].grad = grads[name]
        if self.config.max_gradient_norm > 0:
            trained = [self.weights[name] for name in self.trained]
            torch.nn.utils.clip_grad_norm_(trained, self.config.max_gradient_norm, foreach=True)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._scheduler.step()
        self.steps_done += 1
        if unit:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        if self._start is not None:
            keep_near(W_dec, self._start)
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_(min=0)  # below 0 the gate would let negative pre-activations through

    # ---- what evaluation and checkpoints need

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseActs]:
        """Sae(x) [N, d] and the acts, as the saved SAE would give them."""
        own = self._step_weights()
        centred = (x.to(self.weights["b_dec"].dtype) - self.weights["b_dec"]).to(own["W_enc"].dtype)
        acts = self.selection.outside_training(centred, EncoderRows(own["W_enc"], own["b_enc"]))
        return sparse_decode(acts, own["W_dec"], own["b_dec"]), acts

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self.optimiser.param_groups[0]["lr"]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps besides `steps_done`: the tensors in use, not copies."""
        found = {**self.weights, **self.selection.state, "silent_tokens": self.silent_tokens}
        if self._start is not None:
            found["start"] = self._start
        for name in self.trained:
            for key, value in self.optimiser.state[self.weights[name]].items():
                found[f"adam.{name}.{key}"] = value
        return {name: tensor.detach() for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Resume from a state after `steps_done` steps, bit for bit."""
        for name in self.trained:  # Adam creates its state at the first step
            prefix = f"adam.{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            device = self.weights[name].device
            self.optimiser.state[self.weights[name]] = {key: value.to(device) for key, value in own.items()}
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimiser should step first
            for _ in range(steps_done):
                self._scheduler.step()
        self.steps_done = steps_done


def _add_rows(grads: dict[str, Tensor], rows: Tensor, added: Mapping[str, Tensor]) -> None:
    """Add to rows of the gradients of those weights that are trained."""
    for name, grad in added.items():
        if name in grads:
            grads[name][rows] += grad.to(grads[name].dtype)


def start_weights(config: TrainingConfig, mean: Tensor) -> dict[str, Tensor]:
    """Unit decoder rows, drawn from seed and d_sae; the encoder is their transpose, with W_enc as rows [F, d]."""
    dtype = torch.float64 if config.weights_dtype == "float64" else torch.float32
    W_dec = torch.randn(config.d_sae, len(mean), generator=generator("weights", config.seed, config.d_sae))
    W_dec = (W_dec / W_dec.norm(dim=1, keepdim=True)).to(mean.device, dtype)
    found = {
        "W_enc": W_dec.clone(),
        "b_enc": W_dec.new_zeros(config.d_sae),
        "W_dec": W_dec,
        "b_dec": mean.to(dtype).clone(),
    }
    if config.architecture == "jumprelu":
        found["threshold"] = W_dec.new_zeros(config.d_sae)
    return found


def take_out_along(grad: Tensor, rows: Tensor) -> None:
    """Subtract from each gradient [F, d] its part along its (unit) row, in place: renormalising the row would undo it."""
    for own, row in zip(grad.split(ROWS_AT_A_TIME), rows.split(ROWS_AT_A_TIME), strict=True):
        own.addcmul_(torch.linalg.vecdot(own, row)[:, None], row, value=-1)


def keep_near(rows: Tensor, start: Tensor) -> None:
    """Move rows [F, d] with a cosine to their (unit) start below LEAST_COSINE up to it, in place, keeping norms."""
    norms = rows.norm(dim=1, keepdim=True)
    cosine = torch.linalg.vecdot(rows, start)[:, None] / norms
    across = rows / norms - cosine * start
    across /= across.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    nearest = LEAST_COSINE * start + math.sqrt(1 - LEAST_COSINE**2) * across
    rows.copy_(torch.where(cosine < LEAST_COSINE, nearest * norms, rows))
