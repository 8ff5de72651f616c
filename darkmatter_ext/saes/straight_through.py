"""JumpReLU's straight-through estimators (2407.14435) on stored entries, with SAELens' options.

With h a pre-activation, t its threshold, w the bandwidth and r = 1 where |h - t| < w / 2:
    value h 1[h > t]: by t -(t / w) r, by h 1[h > t];  gate 1[h > t]: by t -(1 / w) r, by h nothing.
`to_input` adds what t gets, with the other sign, to what h gets (SAELens' jumprelu_ste_to_input).

Shapes: everything [z].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Estimator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float, to_input: bool, is_value: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.settings = width, to_input, is_value
        passes = pre > threshold
        return pre * passes if is_value else passes.to(pre)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        (pre, threshold), (width, to_input, is_value) = ctx.saved_tensors, ctx.settings
        near = ((pre - threshold) / width).abs() < 0.5
        jumped = grad * near * (threshold / width if is_value else 1 / width)
        of_pre = grad * (pre > threshold) if is_value else torch.zeros_like(grad)
        return of_pre + jumped if to_input else of_pre, -jumped, None, None, None


def jump(pre: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
    """h if it is above its threshold, else 0."""
    return _Estimator.apply(pre, threshold, width, to_input, True)


def gate(pre: Tensor, threshold: Tensor, width: float, to_input: bool) -> Tensor:
    """1 if h is above its threshold, else 0."""
    return _Estimator.apply(pre, threshold, width, to_input, False)
