"""Derived copies of an SAE's weights that notice when the weights change.

Optimisers, `copy_`, assignment and `.to` are seen by the identity and version of a tensor. Edits through `.data` (SAELens'
own fold_* among them) and numpy change neither, so one element of every row and every column is compared as well: an edit
of a whole latent, a whole dimension or the whole matrix is noticed, an edit of single elements through `.data` may not be.
Vectors are compared whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _identity(tensor: Tensor) -> tuple:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _places(rows: int, columns: int) -> Tensor:
    """Positions in a [rows, columns] matrix that touch every row and every column once or more, a long diagonal."""
    steps = torch.arange(max(rows, columns))
    return torch.stack([steps % rows, steps % columns]) if rows and columns else torch.zeros(2, 0, dtype=torch.int64)


class _Watched:
    """What is remembered of one tensor."""

    def __init__(self, tensor: Tensor, *, look_inside: bool) -> None:
        self.tensor = tensor  # held, so that its id and address are not given to another
        self.identity = _identity(tensor)
        self.look_inside = look_inside
        if not look_inside:
            return
        self.places = tuple(_places(*tensor.shape).to(tensor.device)) if tensor.ndim == 2 else None
        self.sample = self._read(tensor).clone()

    def _read(self, tensor: Tensor) -> Tensor:
        read = tensor.detach() if self.places is None else tensor.detach()[self.places]
        return read.contiguous().view(_BITS[read.element_size()])  # NaN equals itself

    def unchanged(self, tensor: Tensor) -> bool:
        same = _identity(tensor) == self.identity
        return same and (not self.look_inside or torch.equal(self._read(tensor), self.sample))


class Packed(Generic[Derived]):
    """A value computed from weights, computed anew when they are seen to have changed.

    Cost of a look: one random read for each row or column of every matrix, one pass over every vector; on CUDA the host
    waits for the answer.
    """

    def __init__(self, derive: Callable[..., Derived], *, is_view: Callable[[Tensor], bool] = lambda _: False) -> None:
        """`is_view` tells of which weights `derive` keeps no copy: of these only the identity is looked at."""
        self._derive = derive
        self._is_view = is_view
        self._state: tuple[list[_Watched], Derived] | None = None  # replaced as one: threads see the old or the new

    def get(self, *weights: Tensor) -> Derived:
        """The derived value of these weights; raises what deriving raises, and remembers nothing then."""
        state = self._state
        if state is not None and all(w.unchanged(weight) for w, weight in zip(state[0], weights, strict=True)):
            return state[1]
        with torch.inference_mode(False), torch.no_grad():
            watched = [
                _Watched(weight, look_inside=not self._is_view(weight)) for weight in weights
            ]  # before deriving: an edit meanwhile is then seen
            value = self._derive(*weights)
        self._state = (watched, value)
        return value

    def latest(self, *weights: Tensor) -> Derived:
        """What `get` gave last, without another look: for the rest of a call that has looked."""
        state = self._state
        return self.get(*weights) if state is None else state[1]

    def forget(self) -> None:
        """Derive anew at the next look, whatever the weights look like."""
        self._state = None
