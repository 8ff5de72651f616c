"""Low-rank adapters of a language model, and their training around an SAE that stays as it is.

An adapter adds (alpha / r) B A z to what a linear layer makes of z (Hu et al., 2106.09685: LoRA), A [r, in] drawn, B
[out, r] zero at first. It is a forward hook while it is on and nothing while it is off, so the model without it is the
model to the bit, whichever kind its linear layers are. On disk it has peft's names and layout.

Training (2501.19406): what the model says of its own activations x is the teacher; with Sae(x) in the place of x and the
adapter on, KL(teacher || student) is minimised. Adapters are trained side by side: a step asks the teacher once.

Shapes: c contexts of a step, L tokens a context, d width of the site, m tokens the loss is of, V vocabulary, r rank.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.activations.hook_points import transformer_blocks
from darkmatter_ext.activations.splicing import PlacesToSplice, Splice, SplicedModel
from darkmatter_ext.runtime.inputs import InputError, StateError, reason, require
from darkmatter_ext.runtime.storage import atomic_folder

CLIP = 1.0  # norm of an adapter's gradient
_WEIGHTS, _CONFIG, _PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def _sides(layer: nn.Module) -> tuple[int, int]:
    """What a linear layer reads and writes: torch's holds [out, in], transformers' Conv1D (GPT-2) [in, out]."""
    rows, columns = layer.weight.shape  # type: ignore[union-attr]
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def linear_layers(network: Any, after: int) -> dict[str, nn.Module]:
    """The linear layers of the blocks after block `after`, by their names in the network.

    Raises InputError when there is no block after it.
    """
    blocks = list(transformer_blocks(network))[after + 1 :]
    require(bool(blocks), "hook", "must have a block after it to adapt", f"block {after}, the last")
    own = {id(module) for block in blocks for module in block.modules()}
    return {
        name: module
        for name, module in network.named_modules()
        if id(module) in own and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def check_rank(layers: Mapping[str, nn.Module], rank: int, *, argument: str = "rank") -> None:
    """Raise InputError for a rank that a layer cannot have, 0 being none."""
    narrowest = min(layers, key=lambda name: min(_sides(layers[name])))
    most = min(_sides(layers[narrowest]))
    require(1 <= rank <= most, argument, f"must be from 1 to {most}, the width of {narrowest}", rank)


class Adapter:
    """What is added to some linear layers of a model; rank 0: a bias each, the control that reads nothing.

    Memory: r (in + out) float32 numbers a layer.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rank: int,
        *,
        alpha: float = 32.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.layers, self.rank, self.alpha, self.dropout = dict(layers), rank, alpha, dropout
        self.tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.layers.items():
            n_in, n_out = _sides(layer)
            device = layer.weight.device  # type: ignore[union-attr]
            if rank:  # Kaiming's uniform for a = sqrt(5), as torch draws a linear layer and peft draws A
                drawn = (2 * torch.rand(rank, n_in, generator=generator) - 1) / math.sqrt(n_in)
                own = {"lora_A.weight": drawn, "lora_B.weight": torch.zeros(n_out, rank)}
            else:
                own = {"bias": torch.zeros(n_out)}
            for part, tensor in own.items():
                self.tensors[f"{name}.{part}"] = tensor.to(device).requires_grad_()

    @contextmanager
    def on(self, *, training: bool = False) -> Iterator[None]:
        """Inside this block the model has the adapter; `training`: with dropout of what A reads."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name, training)).remove)
            yield

    def _hook(self, name: str, training: bool) -> Callable[..., Tensor]:
        if not self.rank:
            bias = self.tensors[f"{name}.bias"]
            return lambda _layer, _inputs, output: output + bias.to(output.dtype)
        down, up = self.tensors[f"{name}.lora_A.weight"], self.tensors[f"{name}.lora_B.weight"]
        scale, dropout = self.alpha / self.rank, self.dropout if training else 0.0

        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = functional.dropout(inputs[0].to(down.dtype), dropout) if dropout else inputs[0].to(down.dtype)
            return output + (scale * functional.linear(functional.linear(z, down), up)).to(output.dtype)

        return hook

    def copied(self) -> Adapter:
        """As it is now, not to be trained further."""
        twin = copy.copy(self)
        twin.tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return twin

    def save(self, folder: Path, *, model: str = "") -> Path:
        """Write it as peft does (`PeftModel.from_pretrained` reads it); biases alone have no configuration of peft's.

        The folder appears only when complete, and is left as it is where it exists.
        """
        from safetensors.torch import save_file

        with atomic_folder(folder) as part:
            tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, part / _WEIGHTS)
            if self.rank:
                (part / _CONFIG).write_text(json.dumps(self._peft_config(model), indent=1))
        return folder

    def _peft_config(self, model: str) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": any(not isinstance(layer, nn.Linear) for layer in self.layers.values()),
            "target_modules": sorted(self.layers),
            "inference_mode": True,
        }

    def load(self, folder: Path) -> Adapter:
        """The tensors of an adapter of this form, see `save`. Raises StateError for a damaged folder, or another form."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(folder / _WEIGHTS)
            stored = {name: found[_PREFIX + name] for name in self.tensors}
        except (OSError, KeyError, SafetensorError) as error:
            raise StateError(f"adapter: {folder} is damaged ({reason(error)}); delete it") from None
        if any(stored[name].shape != tensor.shape for name, tensor in self.tensors.items()):
            raise StateError(f"adapter: {folder} must be of rank {self.rank}, got another; delete it")
        for name, tensor in self.tensors.items():
            tensor.data.copy_(stored[name])
        return self


@dataclass(frozen=True)
class Recipe:
    """How adapters are trained."""

    loss_share: float = 1.0  # of the tokens of a step that have a loss: the unembedding costs as much as nine blocks
    summed: bool = False  # the loss is a sum over tokens, not their mean (the released code's batchmean with batch 1)
    loss_of_text: bool = False  # cross-entropy of the next token instead of KL to the model: plain fine-tuning


@dataclass(frozen=True)
class Arm:
    """One adapter in training."""

    adapter: Adapter
    learning_rate: float
    splice: Splice | None = None  # what takes the place of x; None: x stays
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
    """Train adapters side by side, one context a step, every context once, in a seeded order.

    Args:
        model: the language model from the site on; it stays as it is.
        contexts: tokens and activations in memory, and which places are replaced.
        arms: name -> adapter with its start, learning rate and what is spliced in. Trained in place.
        seed: of the order and of the tokens that have a loss.
        checkpoints: name of an arm -> shares of the contexts after which copies of its adapter are kept.

    Returns:
        The copies: name -> {share: adapter}.

    Optimiser: AdamW, its weight decay 0.01, gradient norms clipped at CLIP. Raises InputError when no place is replaced, or
    the loss is no longer finite.
    Cost a context: the teacher once, and for each arm a pass forward and one backward through the blocks after the site;
    m V multiply-adds with d for each. Memory: activations of those blocks of one arm, and about 6 m V numbers.
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
        # Of KL(p || q) only -p log q depends on the adapter.
        loss = functional.cross_entropy(logits, target, reduction="sum" if arm.recipe.summed else "mean")
        if not bool(loss.isfinite()):
            raise InputError(
                f"learning_rates: must keep the loss finite, got {arm.learning_rate:g}, {loss.item()} ({name})"
            )
        optimisers[name].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(arm.adapter.tensors.values(), CLIP)
        optimisers[name].step()
