"""Training of low-rank adapters around a frozen SAE (2501.19406).

The teacher is the model on its own activations x. The student has Sae(x) in place of x and the adapter on; training
minimises KL(teacher || student). Adapters are trained side by side, so each step runs the teacher once.

Shapes: c contexts per step, L tokens per context, d width of the site, m tokens in the loss, V vocabulary, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.activations.splicing import PlacesToSplice, Splice, SplicedModel
from darkmatter_ext.runtime.inputs import InputError, require
from darkmatter_ext.training.low_rank import Adapter

CLIP = 1.0  # norm of an adapter's gradient


@dataclass(frozen=True)
class Recipe:
    """How adapters are trained."""

    loss_share: float = 1.0  # share of a step's tokens in the loss: the unembedding costs as much as nine blocks
    summed: bool = False  # sum the loss over tokens instead of averaging (the released code's batchmean with batch 1)
    loss_of_text: bool = False  # next-token cross-entropy instead of KL to the model: plain fine-tuning


@dataclass(frozen=True)
class Arm:
    """One adapter being trained."""

    adapter: Adapter
    learning_rate: float
    splice: Splice | None = None  # what replaces x; None: x stays
    recipe: Recipe = field(default_factory=Recipe)


def train_adapters(
    model: SplicedModel,
    contexts: PlacesToSplice,
    arms: Mapping[str, Arm],
    *,
    seed: int,
    checkpoints: Mapping[str, Sequence[float]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[float, Adapter]]:
    """Train adapters side by side, one context per step, each context once, in a seeded order.

    Args:
        model: the language model from the site on; left unchanged.
        contexts: tokens and activations in memory, and which places are replaced.
        arms: name -> adapter with its start, learning rate and what is spliced in. Trained in place.
        seed: for the order and for the choice of tokens in the loss.
        checkpoints: name of an arm -> shares of the contexts after which copies of its adapter are kept.

    Returns:
        The copies: name -> {share: adapter}.

    Optimiser: AdamW with weight decay 0.01, gradient norms clipped at CLIP. Raises InputError if no place is replaced, or
    the loss is no longer finite.
    Cost per context: the teacher once, and for each arm one forward and one backward pass through the blocks after the
    site, with m V d multiply-adds for each. Memory: activations of those blocks for one arm, and about 6 m V numbers.
    """
    require(bool(contexts.replaced[:, :-1].any()), "contexts", "must have places to replace", "none")
    device = model.network.device
    optimisers = {
        name: torch.optim.AdamW(arm.adapter.tensors.values(), lr=arm.learning_rate) for name, arm in arms.items()
    }
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(contexts.tokens), generator=generator).tolist()
    kept: dict[str, dict[float, Adapter]] = {name: {} for name in checkpoints or {}}
    for step, number in enumerate(order, start=1):
        one = PlacesToSplice(*(column[number : number + 1].to(device) for column in contexts))
        _step(model, one, arms, optimisers, generator)
        for name, shares in (checkpoints or {}).items():
            due = [share for share in shares if math.ceil(share * len(order)) == step]
            kept[name] |= {share: arms[name].adapter.copied() for share in due}
        if progress is not None:
            progress(1)
    return kept


def _step(
    model: SplicedModel,
    one: PlacesToSplice,
    arms: Mapping[str, Arm],
    optimisers: Mapping[str, torch.optim.Optimizer],
    generator: torch.Generator,
) -> None:
    """One step of every arm on one context."""
    measured = one.replaced.clone()
    measured[:, -1] = False
    drawn = torch.rand(measured.shape, generator=generator).to(measured.device)  # the same tokens for every arm
    following = one.tokens.roll(-1, dims=1)
    with torch.no_grad():
        own = model.hidden(one.tokens, one.x)
    teacher: dict[float, Tensor] = {}
    for name, arm in arms.items():
        share = arm.recipe.loss_share
        chosen = measured & (drawn <= drawn[measured].quantile(share)) if share < 1 else measured
        if not bool(chosen.any()):
            continue
        if arm.recipe.loss_of_text:
            target = following[chosen]
        else:
            if share not in teacher:
                with torch.no_grad():
                    teacher[share] = model.logits(own[chosen]).float().softmax(-1)
            target = teacher[share]
        x = one.x
        if arm.splice is not None:
            x = one.x.clone()
            with torch.no_grad():
                x[one.replaced] = arm.splice(one.x[one.replaced]).to(x.dtype)
        with arm.adapter.on(training=True):
            logits = model.logits(model.hidden(one.tokens, x)[chosen]).float()
        # In KL(p || q), only -p log q depends on the adapter.
        loss = functional.cross_entropy(logits, target, reduction="sum" if arm.recipe.summed else "mean")
        if not bool(loss.isfinite()):
            raise InputError(
                f"learning_rates: must keep the loss finite, got {arm.learning_rate:g}, {loss.item()} ({name})"
            )
        optimisers[name].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(arm.adapter.tensors.values(), CLIP)
        optimisers[name].step()
