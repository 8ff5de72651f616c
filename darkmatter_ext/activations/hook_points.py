"""Where activations are read in a language model: TransformerLens' names, located on Hugging Face's own modules.

A name such as `blocks.20.hook_resid_post` means the same tensor here as in TransformerLens without weight processing, and
SAEs carry these names in their metadata. The residual stream before and after a block is found in every model with a list
of blocks. Places inside a block depend on the model's family, and an unknown family is rejected.

Transcoders read the MLP's input, with the gain of the preceding norm (`mlp.hook_in`) or without it (`ln2.hook_normalized`).

Shapes: c contexts, L tokens per context, d width of the hook point (hook_z: heads times head width, heads flattened).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darkmatter_ext.runtime.inputs import InputError

KINDS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
    "ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out",
)  # fmt: skip
_NAME = re.compile(rf"blocks\.(\d+)\.({'|'.join(re.escape(kind) for kind in KINDS)})")

_BLOCK = re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)")

# kind -> (module inside the block, its input, a norm's output before its gain, or its output). Gemma 2
# and 3 norm a sublayer's output before adding it, and TransformerLens reads attn_out and mlp_out after that norm.
_MLP = {"mlp.hook_in": ("mlp", "input"), "mlp.hook_out": ("mlp", "output")}
_LLAMA = _MLP | {
    "ln2.hook_normalized": ("post_attention_layernorm", "normalised"),
    "hook_resid_mid": ("post_attention_layernorm", "input"),
    "hook_attn_out": ("self_attn", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
}
_GEMMA_2 = _MLP | {
    "ln2.hook_normalized": ("pre_feedforward_layernorm", "normalised"),
    "hook_resid_mid": ("pre_feedforward_layernorm", "input"),
    "hook_attn_out": ("post_attention_layernorm", "output"),
    "hook_mlp_out": ("post_feedforward_layernorm", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
}
_GPT2 = _MLP | {
    "ln2.hook_normalized": ("ln_2", "normalised"),
    "hook_resid_mid": ("ln_2", "input"),
    "hook_attn_out": ("attn", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "attn.hook_z": ("attn.c_proj", "input"),
}
FAMILIES: dict[str, dict[str, tuple[str, str]]] = {  # config.model_type of Hugging Face -> places inside a block
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
}


@dataclass(frozen=True)
class HookPoint:
    """One place in a model."""

    name: str
    layer: int
    kind: str  # one of KINDS


def block_that_ends_at(name: str) -> int | None:
    """The block whose output is this hook point: the residual stream after it, or before the next block.

    None for hook points inside a block or before the first. Raises ValueError as `parse_hook_point`.
    """
    point = parse_hook_point(name)
    if point.kind == "hook_resid_post":
        return point.layer
    return point.layer - 1 if point.kind == "hook_resid_pre" and point.layer > 0 else None


def translated_hook(name: str) -> str:
    """The `blocks.20...` name for a block's output; SAEs trained on Hugging Face's modules name it `model.layers.20`.

    Any other name is returned unchanged.
    """
    match = _BLOCK.fullmatch(name)
    return f"blocks.{match.group(1)}.hook_resid_post" if match else name


def parse_hook_point(name: str) -> HookPoint:
    """The hook point `blocks.N.KIND`. Raises ValueError for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"hook: must be like blocks.10.hook_resid_post, got {name!r} (kinds: {', '.join(KINDS)})")
    return HookPoint(name, int(match.group(1)), match.group(2))


def transformer_blocks(network: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks, found by its length (names differ: `model.layers`, `transformer.h`, ...).

    Raises ValueError if no module list has `config.num_hidden_layers` entries.
    """
    n_layers: Any = network.config.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue]  (nn.Module)
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise InputError(f"model: must have a list of {n_layers} blocks, got {type(network).__name__} without one")


def _place(network: nn.Module, point: HookPoint) -> tuple[nn.Module, str]:
    """The module whose input (as it is or normalised) or output is the hook point."""
    block = transformer_blocks(network)[point.layer]
    if point.kind == "hook_resid_pre":
        return block, "input"
    if point.kind == "hook_resid_post":
        return block, "output"
    family: Any = network.config.model_type  # pyright: ignore[reportAttributeAccessIssue]  (nn.Module)
    if family not in FAMILIES:
        raise InputError(
            f"hook: {point.kind} must be read from a model of {', '.join(FAMILIES)}, got {point.name} of a {family} "
            "model (the residual stream before and after a block works for every model)"
        )
    path, side = FAMILIES[family][point.kind]
    return block.get_submodule(path), side


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The output of a LayerNorm or RMSNorm for x, before its gain and bias, in the dtype of x."""
    eps = next(
        (value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None)) is not None), None
    )
    if eps is None:
        raise InputError(f"hook: ln2.hook_normalized must be of a norm with an eps, got {type(norm).__name__}")
    wide = x.float()
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class _Captured(Exception):
    """Raised by the last hook to leave the forward pass: nothing after it is needed."""


def capture(
    network: nn.Module, names: Sequence[str], run: Callable[[], Any], *, stop: bool = True
) -> Mapping[str, Tensor]:
    """The activations [c, L, d] at the given hook points during one forward pass.

    Args:
        network: a Hugging Face causal model.
        names: hook points, see `parse_hook_point`.
        run: the forward pass; stopped once every hook point has been reached, unless `stop` is False.

    Raises ValueError for a hook point this model does not have.
    """
    found: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, value: Any) -> None:
        found[name] = value[0] if isinstance(value, tuple) else value
        if stop and len(found) == len(set(names)):
            raise _Captured

    def on_input(name: str, side: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            keep(name, _normalised(module, x) if side == "normalised" else x)

        return hook

    def on_output(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: keep(name, output)

    try:
        for name in names:
            module, side = _place(network, parse_hook_point(name))
            if side == "output":
                handles.append(module.register_forward_hook(on_output(name)))
            else:
                handles.append(module.register_forward_pre_hook(on_input(name, side), with_kwargs=True))
        run()
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
