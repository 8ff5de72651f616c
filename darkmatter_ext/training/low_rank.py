"""Low-rank adapters of a language model (Hu et al., 2106.09685: LoRA).

An adapter adds (alpha / r) B A z to a linear layer's output for z, with A [r, in] drawn at random and B [out, r] initially
zero. It is a forward hook while on and nothing while off, so without it the model is bit-identical, whatever kind of
linear layers it has. It can be merged into their weights. On disk it has peft's names and layout.

Shapes: r rank.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.activations.hook_points import transformer_blocks
from darkmatter_ext.runtime.inputs import StateError, reason, require
from darkmatter_ext.runtime.storage import atomic_folder

_WEIGHTS, _CONFIG, _PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer: torch stores [out, in], transformers' Conv1D (GPT-2) [in, out]."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def linear_layers(network: Any, after: int = -1, *, up_to: int | None = None) -> dict[str, nn.Module]:
    """The linear layers of the blocks after block `after`, up to block `up_to`, by their names in the network.

    Raises InputError if there is no such block.
    """
    blocks = list(transformer_blocks(network))[after + 1 : None if up_to is None else up_to + 1]
    require(bool(blocks), "hook", "must have a block after it to adapt", f"block {after}, the last")
    own = {id(module) for block in blocks for module in block.modules()}
    return {
        name: module
        for name, module in network.named_modules()
        if id(module) in own and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def check_rank(layers: Mapping[str, nn.Module], rank: int, *, argument: str = "rank") -> None:
    """Raise InputError for a rank that a layer cannot have, including 0."""
    narrowest = min(layers, key=lambda name: min(_sides(layers[name])))
    most = min(_sides(layers[narrowest]))
    require(1 <= rank <= most, argument, f"must be from 1 to {most}, the width of {narrowest}", rank)


class Adapter:
    """What is added to some linear layers of a model. Rank 0 adds only a bias to each: a control that reads nothing.

    Memory: r (in + out) float32 numbers per layer.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rank: int,
        *,
        alpha: float = 32.0,
        dropout: float = 0.0,
        seed: int | torch.Generator = 0,
    ) -> None:
        self.layers, self.rank, self.alpha, self.dropout = dict(layers), rank, alpha, dropout
        self.tensors: dict[str, Tensor] = {}
        random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        for name, layer in self.layers.items():
            (n_in, n_out), weight = _sides(layer), cast("Tensor", layer.weight)
            if rank:  # Kaiming's uniform for a = sqrt(5), as torch draws a linear layer and peft draws A
                drawn = (2 * torch.rand(rank, n_in, generator=random) - 1) / math.sqrt(n_in)
                own = {"lora_A.weight": drawn, "lora_B.weight": torch.zeros(n_out, rank)}
            else:
                own = {"bias": torch.zeros(n_out)}
            for part, tensor in own.items():
                self.tensors[f"{name}.{part}"] = tensor.to(weight.device).requires_grad_()

    @contextmanager
    def on(self, *, training: bool = False) -> Iterator[None]:
        """Use the adapter inside this block; `training`: with dropout on the input of A."""
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

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weights of its layers, in place: the model then acts as it did with the adapter on.

        Raises InputError for rank 0, which has only biases.
        """
        require(self.rank > 0, "rank", "must be at least 1 to be merged", self.rank)
        for name, layer in self.layers.items():
            own: Any = layer.weight
            up, down = (self.tensors[f"{name}.lora_{part}.weight"] for part in "BA")
            change = self.alpha / self.rank * up @ down
            own += (change if isinstance(layer, nn.Linear) else change.mT).to(own.dtype)

    def copied(self) -> Adapter:
        """A copy of the current state, not to be trained further."""
        twin = copy.copy(self)
        twin.tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return twin

    def save(self, folder: Path, *, model: str = "") -> Path:
        """Write the adapter as peft does (`PeftModel.from_pretrained` reads it); biases alone have no peft configuration.

        The folder appears only when complete; an existing one is left unchanged.
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
        """Load the tensors of an adapter of this form, see `save`. Raises StateError for a damaged folder or another form."""
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
