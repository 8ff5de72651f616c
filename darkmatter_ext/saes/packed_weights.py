"""Derived copies of an SAE's weights that notice when the weights change.

Optimisers, `copy_`, assignment and `.to` show in the identity and version of a tensor. Edits through `.data` (including
SAELens' own fold_*) and numpy change neither, so one element of every row and every column is compared as well, a nonzero
one if there is one. Edits of a whole latent, a whole dimension or the whole matrix are detected. Edits of single elements
through `.data` may go undetected, as may edits through another tensor in the same storage, except the SAE's other
matrix (tied weights). Vectors are compared in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
CHANGING = "the weights change at every call (they are packed again once they stay)"
NO_KERNEL = "no fast kernel for this processor or this size"  # whatever the weights hold: not checked again
_RENEWALS_IN_A_ROW = 4  # after these, packing pays only for many tokens
_TOKENS_TO_PAY = 256
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LINE = 64  # bytes in a cache line
_ELEMENTS_AT_ONCE = 1 << 22  # copied while looking for places beside zeros


def version_of(tensor: Tensor) -> int | None:
    """The number of edits torch has seen; None if it does not count them. That is the case for tensors created in inference
    mode, whatever they report now, and for those whose `.data` was: their count never changes.
    """
    try:
        return None if tensor.is_inference() else tensor._version
    except RuntimeError:
        return None


def _by_gather(tensor: Tensor) -> bool:
    """Whether to gather the elements of all tensors and compare them at once: on CUDA every comparison waits."""
    return tensor.is_cuda


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals itself."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def _looked_at(tensor: Tensor) -> Iterator[Tensor]:
    """Views of the bits: all of a vector; for a matrix, stairs through all rows and columns.

    A step is one cache line wide if the longer side is contiguous in memory, as a line costs one read; else one element.
    """
    bits = _bits(tensor)
    if bits.ndim != 2 or bits.numel() == 0:
        yield bits
        return
    wide = bits if bits.shape[0] <= bits.shape[1] else bits.mT
    rows, columns = wide.shape
    down, along = wide.stride()
    width = _LINE // bits.element_size() if along == 1 and not _by_gather(tensor) else 1
    while columns < rows * width:  # otherwise the stairs would end before the last row
        width //= 2
    flight = rows * width  # columns of one staircase from the first row to the last
    whole, rest = divmod(columns, flight)
    start = wide.storage_offset()
    yield wide.as_strided((whole, rows, width), (flight * along, down + width * along, along), start)
    if rest:  # the last columns, as the end of one more staircase
        start += (columns - flight) * along
        yield wide.as_strided((rows, width), (down + width * along, along), start)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _beside_zeros(tensor: Tensor, stairs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """Rows and columns, in `_wide(tensor)`, of one more element for each row and column where the stairs touch only zeros.

    It is the largest element there. An all-zero row or column uses its crossing with the busiest column or row instead,
    where new values are least likely to be 0.
    """
    if tensor.ndim != 2 or tensor.numel() == 0:
        return None
    wide = _wide(tensor.detach())
    columns = wide.shape[1]
    found = [(step << 1) != 0 for step in stairs]  # without the sign
    # The stairs take the columns in order (the rest takes the last ones) and pass through the rows at every step.
    touched = torch.cat([f.reshape(-1) for f in found])
    numbers = torch.cat(
        [torch.arange(found[0].numel()), torch.arange(columns)[columns - sum(f.numel() for f in found[1:]) :]]
    )
    in_row = torch.stack([f.movedim(-2, 0).flatten(1).any(1) for f in found]).any(0)
    by_column = _largest_of(wide, numbers.to(wide.device)[~touched].unique())
    by_row = _largest_of(wide.mT, (~in_row).nonzero()[:, 0])
    rows, crossed = torch.cat((by_column[0], by_row[1])), torch.cat((by_column[1], by_row[0]))
    return (rows, crossed) if len(rows) else None


def _largest_of(matrix: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the largest elements of the given columns, and the columns."""
    rows, nothing = [columns[:0]], [columns[:0].bool()]
    for some in columns.split(max(1, _ELEMENTS_AT_ONCE // max(1, matrix.shape[0]))):
        largest, row = matrix[:, some].abs().max(0)
        rows.append(row)
        nothing.append(largest == 0)
    found, empty = torch.cat(rows), torch.cat(nothing)
    if bool(empty.any()):
        found[empty] = matrix.count_nonzero(1).argmax()
    return found, columns


def _positions(view: Tensor) -> Tensor:
    """Positions of a view's elements in its storage."""
    found = torch.zeros(1, dtype=torch.int64, device=view.device) + int(view.storage_offset())
    for size, stride in zip(view.shape, view.stride(), strict=True):
        found = (found[:, None] + stride * torch.arange(size, device=view.device)).reshape(-1)
    return found


def is_tied(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share storage: torch may then count an edit of both for only one of them."""
    if one is other or not all(type(t) in PLAIN and t.layout is torch.strided for t in (one, other)):
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Watched:
    """What is remembered of one tensor."""

    def __init__(self, tensor: Tensor, *, look_inside: bool) -> None:
        self.tensor = tensor  # kept alive, so that its id and address are not reused
        self.address = tensor.data_ptr()
        self.version = version_of(tensor)
        self.form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.views = tuple((view, view.clone()) for view in _looked_at(tensor)) if look_inside else ()
        self.places = _beside_zeros(tensor, tuple(view for view, _ in self.views)) if look_inside else None
        self.sample = self._read_places() if self.places is not None else None
        self.flat = self.index = None
        if self.views and _by_gather(tensor):
            self._look_by_gather(tensor)

    def _look_by_gather(self, tensor: Tensor) -> None:
        """Store the same elements as positions in the storage, so that one gather (`gathered`) reads them."""
        bits = _bits(tensor)
        index = [_positions(view) for view, _ in self.views]
        if self.places is not None:
            down, along = _wide(bits).stride()
            index.append(self.places[0] * down + self.places[1] * along + int(bits.storage_offset()))
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.flat, self.index = bits.as_strided((elements,), (1,), 0), torch.cat(index)
        self.views, self.places, self.sample = (), None, None

    def _read_places(self) -> Tensor:
        return _wide(_bits(self.tensor))[self.places]

    def gathered(self) -> Tensor | None:
        """The examined elements of a tensor, if `unchanged` has not already compared them."""
        return None if self.flat is None or self.index is None else self.flat.index_select(0, self.index)

    def unchanged(self, tensor: Tensor) -> bool:
        if tensor is not self.tensor or tensor.data_ptr() != self.address:
            return False
        if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != self.form:
            return False
        return self.keeps_values()

    def keeps_values(self) -> bool:
        """Whether the examined storage has not been edited; the tensor may have a different storage by now."""
        if self.version is not None and self.tensor._version != self.version:
            return False
        for view, sample in self.views:
            if not torch.equal(view, sample):
                return False
        return self.sample is None or torch.equal(self._read_places(), self.sample)


def _all_gathered(watched: list[_Watched]) -> Tensor | None:
    """The examined elements of all tensors that use gather."""
    found = [values for each in watched if (values := each.gathered()) is not None]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


class Packed:
    """A value computed from weights, and recomputed when they are seen to have changed.

    Cost of a look: one random read per row or column of every matrix, and one pass over every vector. On CUDA the host
    waits once for the answer.
    """

    def __init__(
        self,
        derive: Callable[..., Any],
        *,
        why_not: Callable[..., str] = lambda *_: "",
    ) -> None:
        """`derive` returns the value, or a str saying why there is none; `why_not` is asked first, before anything is read."""
        self._derive, self._why_not = derive, why_not
        # The watched tensors, the value, what was gathered then. Replaced as a whole, so threads see the old or the new one.
        self._state: tuple[list[_Watched], Any, Tensor | None] | None = None
        self._renewals = 0  # without a look in between that found everything unchanged
        self._pair: tuple[Tensor, int, Tensor, int, bool] | None = None  # two tensors, their addresses, whether tied

    def get(self, *weights: Tensor, tokens: int = 1, other: Tensor | None = None) -> Any:
        """The derived value of these weights, or why there is none (a str).

        `other` may be tied to the first weight; then its edits count too.
        """
        seen = (*weights, other) if other is not None and self._is_tied(weights[0], other) else weights
        state = self._state
        if state is not None and len(state[0]) == len(seen):
            watched, value, sample = state
            same = all(each.unchanged(weight) for each, weight in zip(watched, seen, strict=True))
            if same and (sample is None or torch.equal(sample, _all_gathered(watched))):  # pyright: ignore[reportArgumentType]  (as the sample was)
                if value is CHANGING:
                    return self._renew(seen, len(weights), derive=True)
                self._renewals = 0
                return value
        self._renewals += 1
        derive = self._renewals <= _RENEWALS_IN_A_ROW or tokens >= _TOKENS_TO_PAY
        return self._renew(seen, len(weights), derive=derive)

    def _is_tied(self, one: Tensor, other: Tensor) -> bool:
        """As `is_tied`, but cached, as that costs more than the rest of a small look; rechecked when an address changes."""
        pair = self._pair
        same = pair is not None and pair[0] is one and pair[2] is other
        if pair is not None and same and pair[1] == one.data_ptr() and pair[3] == other.data_ptr():
            return pair[4]
        tied = is_tied(one, other)
        plain = all(type(each) in PLAIN and each.layout is torch.strided for each in (one, other))
        self._pair = (one, one.data_ptr(), other, other.data_ptr(), tied) if plain else None
        return tied

    def _renew(self, seen: tuple[Tensor, ...], n_weights: int, *, derive: bool) -> Any:
        weights = seen[:n_weights]
        reason = self._why_not(*weights)
        if reason:
            self._state = None
            return reason
        with torch.inference_mode(False), torch.no_grad():
            # before deriving, so that an edit in the meantime is seen
            watched = [_Watched(weight, look_inside=derive) for weight in weights]
            watched += [_Watched(other, look_inside=False) for other in seen[n_weights:]]
            sample = _all_gathered(watched)
            value = self._derive(*weights) if derive else CHANGING
        if value is NO_KERNEL:
            sample = None
            for each in watched:
                each.views, each.sample = (), None
        self._state = (watched, value, sample)
        return value

    def seen(self) -> Callable[[], bool]:
        """A function that later says whether the weights of the last look still have the same values."""
        watched, _, sample = self._state or ([], None, None)

        def keeps_values() -> bool:
            gathered = None if sample is None else _all_gathered(watched)
            same = sample is None or (gathered is not None and torch.equal(sample, gathered))
            return same and all(each.keeps_values() for each in watched)

        return keeps_values

    def forget(self) -> None:
        """Recompute at the next look, whatever the weights look like."""
        self._state = self._pair = None
        self._renewals = 0
