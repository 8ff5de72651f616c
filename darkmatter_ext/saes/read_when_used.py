"""A tensor that is computed when first read, for dense pre-activations that are rarely looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What is known without computing. Everything else (values, storage, views, copies, files) triggers the computation.
_KNOWN = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_sparse", "is_leaf", "grad_fn", "grad")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex")),
}


class ReadWhenUsed(Tensor):
    """A tensor of known shape, dtype and device whose values `compute` gives, once. Without a gradient."""

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> ReadWhenUsed:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self._compute, self._value = compute, None
        return self

    def value(self) -> Tensor:
        """The plain tensor; editing it edits this one."""
        if self._value is None:
            assert self._compute is not None
            self._value = self._compute()
            self._compute = None  # and what it holds
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN and all(own._value is None for own in args if isinstance(own, ReadWhenUsed)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = _values((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _values((args, kwargs or {}))  # for callers that go past Python's functions
        return func(*args, **kwargs)


def _values(tree: Any) -> Any:
    return tree_map_only(ReadWhenUsed, ReadWhenUsed.value, tree)
