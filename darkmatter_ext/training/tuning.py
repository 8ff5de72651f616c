"""Tune a language model on rows of tokens: train a low-rank adapter to predict the next token, then merge it.

The model's own weights are not trained. Shapes: n rows of L tokens, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.runtime.inputs import require, require_at_least
from darkmatter_ext.training.low_rank import Adapter
from darkmatter_ext.training.seeds import generator


@dataclass(frozen=True)
class TuningConfig:
    """How adapters are trained to predict next tokens."""

    rank: int = 16
    """of every adapter"""
    alpha: float = 32.0
    """the adapters' output is multiplied by alpha / rank"""
    steps: int = 50
    """optimiser steps"""
    batch_rows: int = 6
    """rows of tokens per step"""
    learning_rate: float = 2e-3
    """of AdamW, falling to 0 linearly"""
    seed: int = 0
    """for the adapters' start and the order of rows"""

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_rows"):
            require_at_least(name, 1, getattr(self, name))
        for name in ("alpha", "learning_rate"):
            require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))


def tune(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    rows: Tensor,
    config: TuningConfig,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train an adapter for some layers of a causal language model on the next tokens of rows [n, L] int64, then merge it.

    Returns the loss of every step in nats. Raises InputError for fewer rows than a batch, or a loss that is not finite.
    Cost: a step is one forward and one backward pass through the whole model, without gradients of its weights.
    """
    require_at_least("rows", config.batch_rows, len(rows))
    network.requires_grad_(False)
    adapter = Adapter(layers, config.rank, alpha=config.alpha, seed=generator("adapters", config.seed))
    trained = list(adapter.tensors.values())
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=config.steps)
    random, losses = generator("rows", config.seed), []
    order = torch.randperm(len(rows), generator=random)
    for _ in range(config.steps):
        if len(order) < config.batch_rows:
            order = torch.randperm(len(rows), generator=random)
        batch, order = rows[order[: config.batch_rows]], order[config.batch_rows :]
        with torch.inference_mode(False), torch.enable_grad(), adapter.on():
            logits = network(batch.to(trained[0].device), use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device))
            optimiser.zero_grad()
            loss.backward()
        losses.append(loss.item())
        require(math.isfinite(losses[-1]), "learning_rate", "must be lower, tuning diverged", config.learning_rate)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        decay.step()
        if progress is not None:
            progress(1)
    adapter.merge()
    return losses
