"""What prevents using the ops, whatever the SAE: transforms, hooks, tensors they cannot read.

Every `why_not_...` returns the reason in words, or "" if there is none.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from darkmatter_ext.ops._library import has_kernels
from darkmatter_ext.saes.packed_weights import PLAIN, version_of

UNCOUNTED = "weights made in inference mode: torch counts no edits of them (load or clone them outside it)"


GRADIENTS = "a gradient may be wanted: left to the library (torch.no_grad() makes it fast)"


def transforms_active() -> bool:
    """Whether functorch (vmap, grad, jvp), forward-mode AD or a dispatch mode is active: each needs to see torch's own ops."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]  (no stub)
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


@functools.cache
def _hook_points() -> tuple[type, ...]:
    from transformer_lens.hook_points import HookPoint

    return HookPoint, nn.Identity  # SAELens swaps in an nn.Identity to disable hooks


def has_hooks(module: Any) -> bool:
    """Whether a module has torch hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_hooked(point: Any) -> bool:
    """Whether anything listens at a hook point."""
    return type(point) not in _hook_points() or is_listened_to(point)


def has_hooks_everywhere() -> bool:
    """Whether torch has global hooks on all modules."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def is_listened_to(module: Any) -> bool:
    """Whether torch hooks are set on a module or on all modules."""
    return has_hooks_everywhere() or has_hooks(module)


def why_not_input(x: object) -> str:
    """Why the ops cannot run on this input, or not now."""
    if type(x) not in PLAIN:
        return "an input is not a plain tensor"
    assert isinstance(x, Tensor)
    if x.layout is not torch.strided:
        return "an input is a sparse tensor"
    if transforms_active():
        return "functorch transform, forward-mode gradient, tracing or dispatch mode"
    device_type = x.device.type
    return "autocast" if device_type != "meta" and torch.is_autocast_enabled(device_type) else ""


def why_not_weights(*weights: object) -> str:
    """Why the ops cannot read these weights."""
    tensors = [weight for weight in weights if type(weight) in PLAIN]
    if len(tensors) < len(weights):
        return "a weight is not a plain tensor"
    first = tensors[0]
    assert isinstance(first, Tensor)
    for tensor in tensors:
        assert isinstance(tensor, Tensor)
        if tensor.layout is not torch.strided:
            return "a weight is a sparse tensor"
        if tensor.device != first.device:
            return "tensors on more than one device"
        if tensor.dtype != first.dtype or not tensor.is_floating_point():
            return "mixed dtypes"
    return "no kernel for this device in this build" if first.is_meta or not has_kernels(first.device) else ""


def why_not_together(sae: Any, x: Tensor, weights: tuple[Any, ...]) -> str:
    """Why x and the encoder's weights do not match."""
    if not x.is_floating_point() or x.ndim < 1 or not (sae.hook_z_reshaping_mode or x.shape[-1] == sae.cfg.d_in):
        return "x is not floating point of shape [..., d_in]"
    return _why_not_these(sae, x.device, weights)


def why_not_decoder(sae: Any, W_dec: Any, b_dec: Any, acts: Tensor | None = None, *, dense: bool = False) -> str:
    """Why the decoder's weights do not match each other or acts (dense, or values)."""
    reason = _why_not_these(sae, (W_dec if acts is None else acts).device, (W_dec, b_dec))
    if reason:
        return reason
    if b_dec.layout is not torch.strided:
        return "a weight is a sparse tensor"
    if acts is None:
        return ""
    if acts.dtype is not W_dec.dtype:
        return "mixed dtypes"
    fits = not dense or (acts.ndim >= 1 and acts.shape[-1] == W_dec.shape[0])
    return "" if fits else "shape of the latents"


def _why_not_these(sae: Any, device: torch.device, weights: tuple[Any, ...]) -> str:
    """Why these weights differ from what the SAE states or from the other tensors. Reads few attributes, as every call asks."""
    reason = why_not_alike(weights, sae.dtype, device)
    return reason or ("a weight is parametrised" if "parametrizations" in sae._modules else "")


def why_not_alike(weights: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Why these weights are not plain tensors of this dtype, on this device, with edits that torch counts."""
    for each in weights:
        if type(each) not in PLAIN:
            return "a weight is not a plain tensor"
        if each.dtype is not dtype:
            return "mixed dtypes"
        if each.device != device:
            return "tensors on more than one device"
        if version_of(each) is None:
            return UNCOUNTED
    return ""


def why_not_without_gradients(*tensors: Tensor | None) -> str:
    """Why the answer must be differentiable, for libraries that compute their own gradients."""
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return GRADIENTS if wants else ""
