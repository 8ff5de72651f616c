"""Argument checks, run before a kernel starts and reported in one line each, and the only place where ops are called.

dtypes: float16, bfloat16, float32 or float64, the same for all floating-point arguments.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  (no stub)

from darkmatter_ext.ops._library import has_kernels
from darkmatter_ext.runtime.inputs import InputError, StateError, out_of_memory

INTEGERS = (Integral, torch.SymInt)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: object, shape: tuple[int | None, ...], like: Tensor | None) -> None:
    """Raise a one-line error for a wrong type, shape, dtype or device; None in `shape` stands for any size.

    `like` has already been checked.
    """
    if isinstance(tensor, Tensor) and like is not None and _is_like(tensor, like) and _has_shape(tensor, shape):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not _has_shape(tensor, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name}: must have shape [{wanted}], got {list(tensor.shape)}")
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{name}: must have dtype {like.dtype} as the other arguments, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise InputError(f"{name}: must be on {like.device} as the other arguments, got {tensor.device}")


def _is_like(tensor: Tensor, like: Tensor) -> bool:
    return tensor.dtype == like.dtype and tensor.device == like.device and tensor.layout == torch.strided


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    have = tensor.shape
    if have == shape:  # the usual case, at a fifth of the cost
        return True
    return len(have) == len(shape) and all(want is None or n == want for n, want in zip(have, shape, strict=True))


def check_device(op: str, name: str, tensor: Tensor) -> None:
    if not has_kernels(tensor.device):
        raise StateError(
            f"{name}: {op} has no kernel for {tensor.device} in this build; move the tensors to the CPU, "
            f"or use darkmatter_ext.reference.{op}"
        )


def check_capacity(capacity: object, n_latents: int) -> None:
    if isinstance(capacity, bool) or not isinstance(capacity, INTEGERS):
        raise TypeError(f"capacity: must be an int or None, got {type(capacity).__name__}")
    if not 0 <= capacity <= n_latents:  # pyright: ignore[reportOperatorIssue]  (Integral has no order)
        raise InputError(f"capacity: must be from 0 to {n_latents} (latents), got {capacity}")


def check_weights(op: str, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    check_tensor("W_enc", W_enc, (None, None), None)
    check_device(op, "W_enc", W_enc)
    d, n_latents = W_enc.shape
    check_tensor("b_enc", b_enc, (n_latents,), W_enc)
    if b_dec is not None:
        check_tensor("b_dec", b_dec, (d,), W_enc)


# Errors that kernels find in tensor contents while reading them; to the user they are value errors.
_CONTENT_RULES = ("must not contain NaN", "indices: must be from", "crow: must")


def attempt(op: Any, *arguments: Any) -> Any:
    """op(*arguments). What a kernel says in one line is raised as the type that Python and torch have for it.

    Raises ValueError for the contents of an argument, torch.OutOfMemoryError where memory ends, on the CPU too.
    """
    try:
        return op(*arguments)
    except (RuntimeError, MemoryError) as error:  # all that kernels can raise
        line = str(error).split("\n", maxsplit=1)[0]
        if any(rule in line for rule in _CONTENT_RULES):
            raise InputError(line) from None
        if out_of_memory(error):
            raise torch.OutOfMemoryError(line if "memory" in line else f"out of memory ({line})") from None
        raise


def _below(op: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Attempt the kernel itself: torch.library's registered gradients cost at least some ten microseconds per call."""
    return attempt(_below, op, *arguments)


def _wants_gradient(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)


def call(op: Any, *arguments: Any) -> Any:
    """Attempt an op below autograd if no argument requires a gradient.

    Not so while torch traces or transforms it: the tensors then do not show what they stand for.
    """
    direct = (
        torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None or _wants_gradient(arguments)
    )
    return attempt(op, *arguments) if direct else below_autograd(op, *arguments)


def flat_rows(x: Tensor) -> Tensor:
    """[..., d] -> [N, d], even if N or d is 0; x itself if it already has that shape."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
