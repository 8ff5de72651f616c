"""SparseActs: the one container of active latents.

It has two forms. *Fixed*: every token has k entries; `values` and `indices` are [..., k]. *Ragged*, in torch's CSR terms:
`crow_indices` [N + 1], `col_indices` [z] and `values` [z], where N is the number of tokens in `batch_shape`.
Calls with a capacity give the fixed form to tokens that have any number of latents: the entries left over hold value 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.runtime.html import html_table
from darkmatter_ext.runtime.inputs import InputError

_SHOWN_TOKENS, _SHOWN_LATENTS = 5, 6  # in a notebook


@dataclass(frozen=True, eq=False)
class SparseActs:
    """Latent activations [..., F] that store only the active entries."""

    values: Tensor  # [..., k] or [z], floating point
    stored_indices: Tensor  # int64, same shape as values
    d_sae: int  # F
    crow: Tensor | None = None  # int64 [N + 1], ragged form only
    ragged_batch_shape: tuple[int, ...] | None = None
    found: Tensor | None = None  # int64 [...]: of a call with a capacity, how many latents each token has

    @classmethod
    def fixed(cls, values: Tensor, indices: Tensor, d_sae: int) -> SparseActs:
        """Build the fixed form from values and indices [..., k].

        Raises TypeError / ValueError if their types, shapes, dtypes or devices do not fit.
        """
        _check_parts(values, indices=indices)
        if values.shape != indices.shape or values.ndim < 1:
            raise InputError(f"indices: must have the shape of values {list(values.shape)}, got {list(indices.shape)}")
        return cls(values, indices, d_sae)

    @classmethod
    def ragged(
        cls, crow_indices: Tensor, col_indices: Tensor, values: Tensor, d_sae: int, batch_shape: tuple[int, ...]
    ) -> SparseActs:
        """Build the ragged form from CSR parts: crow_indices [N + 1], col_indices [z], values [z]; N = prod(`batch_shape`).

        Raises TypeError / ValueError if their types, shapes, dtypes or devices do not fit.
        """
        _check_parts(values, col_indices=col_indices, crow_indices=crow_indices)
        if values.shape != col_indices.shape or values.ndim != 1:
            raise InputError(
                f"col_indices: must have the shape of values {list(values.shape)}, got {list(col_indices.shape)}"
            )
        if crow_indices.shape != (math.prod(batch_shape) + 1,):
            raise InputError(
                f"crow_indices: must have shape [{math.prod(batch_shape) + 1}] for batch {list(batch_shape)}, "
                f"got {list(crow_indices.shape)}"
            )
        return cls(values, col_indices, d_sae, crow_indices, tuple(batch_shape))

    @classmethod
    def from_dense(cls, acts: Tensor) -> SparseActs:
        """The nonzero entries of dense acts [..., F] in ragged form, latents ascending; differentiable in the values.

        Raises TypeError / ValueError unless acts is a floating-point tensor with at least one dimension.
        """
        if not isinstance(acts, Tensor) or not acts.is_floating_point():
            given = acts.dtype if isinstance(acts, Tensor) else type(acts).__name__
            raise TypeError(f"acts: must be a floating-point tensor, got {given}")
        if acts.ndim < 1:
            raise InputError("acts: must have shape [..., F], got a scalar")
        flat = acts.reshape(math.prod(acts.shape[:-1]), acts.shape[-1])
        token, latent = flat.detach().nonzero(as_tuple=True)
        crow = torch.zeros(len(flat) + 1, dtype=torch.int64, device=acts.device)
        crow[1:] = torch.bincount(token, minlength=len(flat)).cumsum(0)
        return cls.ragged(crow, latent, flat[token, latent], acts.shape[-1], tuple(acts.shape[:-1]))

    @property
    def is_ragged(self) -> bool:
        return self.crow is not None

    @property
    def overflowed(self) -> Tensor:
        """[...] bool: the tokens with more latents than the capacity of the call, of which only the first are stored.

        On the device of the acts; reading it there waits, so look at it when the host has time. All False without a capacity.
        """
        if self.found is None:
            return torch.zeros(self.batch_shape, dtype=torch.bool, device=self.values.device)
        return self.found > self.values.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions: the shape of the tokens."""
        return tuple(self.values.shape[:-1]) if self.ragged_batch_shape is None else self.ragged_batch_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense acts: [..., F]."""
        return (*self.batch_shape, self.d_sae)

    @property
    def n_tokens(self) -> int:
        return math.prod(self.batch_shape)

    @property
    def indices(self) -> Tensor:
        """[..., k] int64. Raises ValueError for the ragged form, whose tokens have no common k."""
        if self.is_ragged:
            raise InputError("indices: ragged acts have col_indices and crow_indices, got a ragged SparseActs")
        return self.stored_indices

    @property
    def col_indices(self) -> Tensor:
        """[z] int64: the latent of every stored entry, token by token."""
        return self.stored_indices.reshape(-1)

    @property
    def crow_indices(self) -> Tensor:
        """[N + 1] int64: the entries of token i are crow_indices[i] to crow_indices[i + 1]."""
        if self.crow is not None:
            return self.crow
        k = self.values.shape[-1]
        return torch.arange(self.n_tokens + 1, device=self.values.device) * k

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, indices and crow as the ops take them: [N, k], [N, k], None; if ragged, [z], [z], [N + 1]."""
        if self.crow is not None or self.values.ndim == 2:
            return self.values, self.stored_indices, self.crow
        shape = (self.n_tokens, self.values.shape[-1])
        return self.values.reshape(shape), self.stored_indices.reshape(shape), None

    def token_numbers(self) -> Tensor:
        """[z] int64: the token of every stored entry."""
        lengths = self.crow_indices.diff()
        return torch.repeat_interleave(lengths, output_size=self.values.numel())

    def to_dense(self) -> Tensor:
        """Dense acts [..., F]; differentiable in the values. Memory: N F elements.

        If a latent is stored twice for a token, its values are summed, as in sparse_decode (encoders store none twice).
        """
        place = self.token_numbers() * self.d_sae + self.col_indices
        dense = self.values.new_zeros(self.n_tokens * self.d_sae)
        return dense.scatter_add_(0, place, self.values.reshape(-1)).reshape(self.shape)

    def dense_columns(self, latents: Tensor) -> Tensor:
        """to_dense()[..., latents] without building the other latents; latents int64 [m] in any order, repeats allowed."""
        wanted, place = latents.unique(return_inverse=True)
        column = torch.full((self.d_sae,), -1, device=latents.device)
        column[wanted] = torch.arange(len(wanted), device=latents.device)
        column = column[self.col_indices]
        kept = column >= 0
        dense = self.values.new_zeros(self.n_tokens, len(wanted))
        at = (self.token_numbers()[kept], column[kept])
        dense = dense.index_put(at, self.values.reshape(-1)[kept], accumulate=True)
        return dense[:, place].reshape(*self.batch_shape, len(latents))

    def l0(self) -> Tensor:
        """[...] int64: number of latents with a nonzero value for each token (NaN counts, a stored zero does not)."""
        nonzero = self.values.detach() != 0
        if self.crow is None:
            return nonzero.sum(-1)
        counts = torch.zeros(self.n_tokens, dtype=torch.int64, device=self.values.device)
        return counts.index_add_(0, self.token_numbers(), nonzero.long()).reshape(self.batch_shape)

    def scaled(self, scale: Tensor) -> SparseActs:
        """Multiply each latent by its entry of scale [F]. Differentiable."""
        return dataclasses.replace(self, values=self.values * scale[self.stored_indices])

    def detach(self) -> SparseActs:
        return dataclasses.replace(self, values=self.values.detach())

    def to(self, device: torch.device | str) -> SparseActs:
        """The same acts on another device."""
        crow, found = (None if each is None else each.to(device) for each in (self.crow, self.found))
        return dataclasses.replace(
            self, values=self.values.to(device), stored_indices=self.stored_indices.to(device), crow=crow, found=found
        )

    def __repr__(self) -> str:
        form = f"nnz={self.values.numel()}" if self.is_ragged else f"k={self.values.shape[-1]}"
        return f"SparseActs(shape={list(self.shape)}, {form}, dtype={self.values.dtype}, device={self.values.device})"

    def _repr_html_(self) -> str:
        """Table of the first tokens and their strongest latents, for notebooks; reads only those tokens."""
        rows = []
        for number, (values, indices) in enumerate(self._first_tokens(_SHOWN_TOKENS)):
            best = values.sort(descending=True, stable=True).indices[:_SHOWN_LATENTS]
            found = zip(indices[best].tolist(), values[best].tolist(), strict=True)
            rows.append([number, len(values), ", ".join(f"{latent}: {value:.3g}" for latent, value in found)])
        return html_table(repr(self), ["token", "L0", "strongest latents: values"], rows)

    def _first_tokens(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Values and indices of the active latents of the first tokens, on the CPU."""
        values, indices = self.values.detach(), self.stored_indices
        if self.crow is None:
            pairs = zip(
                values.reshape(-1, values.shape[-1])[:count], indices.reshape(-1, values.shape[-1]), strict=False
            )
        else:
            ends = self.crow[: count + 1].tolist()
            pairs = ((values[start:end], indices[start:end]) for start, end in itertools.pairwise(ends))
        return [(own[own != 0].float().cpu(), of[own != 0].cpu()) for own, of in pairs]


def _check_parts(values: Tensor, **indices: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values: must be a floating-point tensor, got {given}")
    for name, tensor in indices.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: must be int64, got {tensor.dtype}")
        if tensor.device != values.device:
            raise InputError(f"{name}: must be on {values.device} as values, got {tensor.device}")
