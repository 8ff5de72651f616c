"""When the fast path of an accelerated SAE is sound: what SAELens objects compute, and what stands in the way of the ops.

Every `why_not_...` gives the reason in words, "" where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darkmatter_ext._library import has_kernels

ENCODE_DENSITY = 0.06  # active share of the latents above which SAELens' dense encode is the faster one
DECODE_DENSITY = 0.10


@dataclass(frozen=True)
class Kind:
    """What an SAELens encode computes: the weights that are packed for it, and the parameters that are read as they are."""

    name: str
    packed: tuple[str, ...] = ("W_enc", "b_enc")
    others: tuple[str, ...] = ()


TOPK, RELU = Kind("topk"), Kind("relu")
JUMPRELU = Kind("jumprelu", others=("threshold",))
GATED = Kind("gated", ("W_enc", "b_gate"), ("b_mag", "r_mag"))
PURSUIT = Kind("matching_pursuit", ("W_dec",))


@functools.cache
def known_methods() -> tuple[dict[Any, Kind], set[Any], set[Any]]:
    """The encode, decode and forward functions of SAELens this module knows the meaning of."""
    from sae_lens.saes import gated_sae, jumprelu_sae, matching_pursuit_sae, sae, standard_sae, topk_sae, transcoder

    encoders = {
        topk_sae.TopKSAE.encode: TOPK,
        standard_sae.StandardSAE.encode: RELU,
        transcoder.Transcoder.encode: RELU,
        jumprelu_sae.JumpReLUSAE.encode: JUMPRELU,
        transcoder.JumpReLUTranscoder.encode: JUMPRELU,
        gated_sae.GatedSAE.encode: GATED,
        matching_pursuit_sae.MatchingPursuitSAE.encode: PURSUIT,
    }
    decoders = {
        topk_sae.TopKSAE.decode,
        standard_sae.StandardSAE.decode,
        transcoder.Transcoder.decode,
        jumprelu_sae.JumpReLUSAE.decode,
        gated_sae.GatedSAE.decode,
        matching_pursuit_sae.MatchingPursuitSAE.decode,
    }
    forwards = {sae.SAE.forward, transcoder.Transcoder.forward, transcoder.SkipTranscoder.forward}
    return encoders, decoders, forwards


def transforms_active() -> bool:
    """functorch (vmap, grad, jvp), forward-mode AD or a dispatch mode: each wants torch's own ops to see."""
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


def is_hooked(point: nn.Module) -> bool:
    """Whether anything listens at a hook point. SAELens swaps in an nn.Identity where it disables hooks."""
    from transformer_lens.hook_points import HookPoint

    if type(point) not in (HookPoint, nn.Identity):
        return True
    return any(
        (point._forward_hooks, point._forward_pre_hooks, point._backward_hooks, point._backward_pre_hooks)
    ) or bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def is_plain(tensor: object) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _first(*rules: tuple[bool, str]) -> str:
    return next((reason for holds, reason in rules if holds), "")


def why_not_tensors(sae: Any, tensor: object, weights: Sequence[object]) -> str:
    """Why the ops may not run on this input and these weights."""
    given = [tensor, *weights]
    tensors = [each for each in given if isinstance(each, Tensor) and is_plain(each)]
    if len(tensors) < len(given):
        return "an input or a weight is not a plain tensor"
    device = tensors[0].device
    return _first(
        (any(t.layout != torch.strided for t in tensors), "an input or a weight is a sparse tensor"),
        (len({t.device for t in tensors}) > 1, "tensors on more than one device"),
        (not has_kernels(device) or device.type == "meta", "no kernel for this device in this build"),
        (device.type != "meta" and torch.is_autocast_enabled(device.type), "autocast"),
        (transforms_active(), "functorch transform, forward-mode gradient, tracing or dispatch mode"),
        (len({weight.dtype for weight in tensors[1:]} | {sae.dtype}) > 1, "mixed dtypes"),
    )


def why_not_activation(sae: Any, kind: Kind, x: Tensor) -> str:
    """Why what comes before and after the pre-activations is not what the ops compute."""
    from sae_lens.saes.topk_sae import TopK

    activation, d_sae = sae.activation_fn, sae.W_enc.shape[1]
    shape_fits = x.ndim >= 1 and (sae.hook_z_reshaping_mode or x.shape[-1] == sae.W_enc.shape[0])
    plain = type(activation) is nn.ReLU
    k_fits = True
    if kind is TOPK:
        plain = type(activation) is TopK and not activation.use_sparse_activations
        k_fits = plain and type(activation.k) is int and 0 <= activation.k <= max(1, ENCODE_DENSITY * d_sae)
    return _first(
        (not x.is_floating_point() or not shape_fits, "x is not floating point of shape [..., d_in]"),
        (not plain, f"activation function {type(activation).__name__}"),
        (getattr(sae.cfg, "rescale_acts_by_decoder_norm", False), "rescale_acts_by_decoder_norm"),
        (not k_fits, f"k is not from 0 to {ENCODE_DENSITY:.0%} of the latents"),
        (not all(bool(getattr(sae, name).isfinite().all()) for name in kind.others), "threshold or gate is not finite"),
        (is_hooked(sae.hook_sae_acts_pre), "dense pre-activations are hooked (hook_sae_acts_pre)"),
    )


def why_not_pursuit(sae: Any, x: Tensor) -> str:
    """Why a matching pursuit is SAELens' own to run."""
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, sae.W_dec, sae.b_dec))
    steps = sae.cfg.max_iterations or sae.cfg.d_in
    return _first(
        (wants_grad, "matching pursuit has no fast gradient (torch.no_grad() makes it fast)"),
        (sae.dtype not in (torch.float32, torch.float64), "a 16-bit matching pursuit depends on the order of its sums"),
        (x.ndim < 2, "x of one dimension"),
        (steps > sae.cfg.d_sae, "more iterations than latents"),
        (is_hooked(sae.hook_sae_input) or not bool(x.isfinite().all()), "x is hooked or not finite"),
    )
