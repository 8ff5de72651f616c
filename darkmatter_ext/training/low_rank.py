"""Low-rank adapters (LoRA, 2106.09685) around the linear maps of a language model, trained on rows of tokens, then merged.

A map W z becomes W z + (alpha / r) B A z with A drawn and B zero, so that training starts at the model itself. The model's
own weights stay as they are.

Shapes: n rows of L tokens, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.runtime.inputs import InputError, require, require_at_least
from darkmatter_ext.training.seeds import generator


@dataclass(frozen=True)
class TuningConfig:
    """How adapters are trained on next tokens."""

    rank: int = 16
    """of every adapter"""
    alpha: float = 32.0
    """the adapters' output is multiplied by alpha / rank"""
    steps: int = 50
    """optimiser steps"""
    batch_rows: int = 6
    """rows of tokens a step"""
    learning_rate: float = 2e-3
    """of AdamW, falling to 0 linearly"""
    seed: int = 0
    """of the adapters' start and of the order of rows"""

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_rows"):
            require_at_least(name, 1, getattr(self, name))
        for name in ("alpha", "learning_rate"):
            require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))


class LowRank(nn.Module):
    """A linear map with an adapter beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, random: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        down = (2 * torch.rand(rank, linear.in_features, generator=random) - 1) / math.sqrt(linear.in_features)
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))

    def forward(self, z: Tensor) -> Tensor:
        """W z + bias + (alpha / r) B A z."""
        return self.linear(z) + self.scale * functional.linear(functional.linear(z, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear map with the adapter added to its weight, in place."""
        self.linear.weight += self.scale * self.up @ self.down
        return self.linear


def adapted(parts: Iterable[nn.Module], config: TuningConfig) -> list[LowRank]:
    """Put an adapter around every nn.Linear inside some modules, and let nothing else of them be trained.

    Raises InputError when there is none (GPT-2's maps are no nn.Linear).
    """
    random, found = generator("adapters", config.seed), []
    for part in parts:
        part.requires_grad_(False)
        linears = [(name, module) for name, module in part.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            path, _, last = name.rpartition(".")
            found.append(LowRank(linear, config.rank, config.alpha, random))
            setattr(part.get_submodule(path), last, found[-1])
    if not found:
        raise InputError("model: must have nn.Linear maps to adapt in its blocks, got none")
    return found


def merge(parts: Iterable[nn.Module]) -> None:
    """Put back the linear maps, each with its adapter added to its weight."""
    for part in parts:
        for name, module in list(part.named_modules()):
            if isinstance(module, LowRank):
                path, _, last = name.rpartition(".")
                setattr(part.get_submodule(path), last, module.merged())


def tune(
    network: nn.Module,
    parts: list[nn.Module],
    rows: Tensor,
    config: TuningConfig,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train adapters in `parts` of a causal language model on the next tokens of rows [n, L] int64, and merge them.

    Returns the loss of every step, nats. Raises InputError for fewer rows than a batch, nothing to adapt, or a loss that is
    not finite. Cost: a step is a forward and a backward pass through the whole model without gradients of its weights.
    """
    require_at_least("rows", config.batch_rows, len(rows))
    network.requires_grad_(False)
    trained = [weight for own in adapted(parts, config) for weight in (own.down, own.up)]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=config.steps)
    random, losses = generator("rows", config.seed), []
    order = torch.randperm(len(rows), generator=random)
    for _ in range(config.steps):
        if len(order) < config.batch_rows:
            order = torch.randperm(len(rows), generator=random)
        batch, order = rows[order[: config.batch_rows]], order[config.batch_rows :]
        with torch.inference_mode(False), torch.enable_grad():
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
    merge(parts)
    return losses
