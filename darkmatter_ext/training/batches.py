"""Batches of activations in an order that depends only on the seed, so that a run can be resumed anywhere.

An epoch reads every piece of the training text once, in an order drawn for that epoch; the tokens of a piece are shuffled.
A tensor is one piece. A source (a model reading text, a store) is cut into pieces of `buffer_tokens`, each made of contexts
drawn from the whole text: a shuffling buffer whose number determines its content. A batch never spans pieces.

Shapes: n tokens in a piece, d width; C contexts of L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.runtime.inputs import InputError, require
from darkmatter_ext.training.config import StreamConfig
from darkmatter_ext.training.seeds import generator


class Tokens(Protocol):
    """Activations to train on, in pieces, and some held out."""

    @property
    def d_in(self) -> int: ...

    @property
    def n_tokens(self) -> int:
        """Number of tokens to train on, before any are left out."""
        ...

    @property
    def identity(self) -> dict[str, object]:
        """What distinguishes these tokens from others, for a checkpoint."""
        ...

    def pieces(self, epoch: int, seed: int) -> int:
        """Number of pieces in an epoch."""
        ...

    def piece(self, epoch: int, number: int, seed: int) -> Tensor:
        """One of the pieces, [n, d]; the same at every call."""
        ...

    def held_out(self) -> Iterator[Tensor]:
        """Activations [n, d] that are in no piece, from contexts drawn from all that are held out."""
        ...


def _split(n: int, share: float) -> int:
    """How many of n to train on."""
    return n - round(n * share)


class TensorTokens:
    """Activations [n, d] in memory; the last rows are held out."""

    def __init__(self, x: Tensor, stream: StreamConfig) -> None:
        if not x.is_floating_point():
            raise TypeError(f"source: must be a floating-point tensor, got {x.dtype}")
        if x.ndim != 2 or x.numel() == 0:
            raise InputError(f"source: must hold activations [n, d], got shape {list(x.shape)}")
        require(bool(x.isfinite().all()), "source", "must be finite", "NaN or infinity in it")
        n_trained = _split(len(x), stream.held_out_share)
        self._trained, self._held_out = x[:n_trained], x[n_trained:]

    @property
    def d_in(self) -> int:
        return self._trained.shape[1]

    @property
    def n_tokens(self) -> int:
        return len(self._trained)

    @property
    def identity(self) -> dict[str, object]:
        return {"tokens": len(self._trained), "sum": self._trained.sum(dtype=torch.float64).item()}

    def pieces(self, epoch: int, seed: int) -> int:
        return 1

    def piece(self, epoch: int, number: int, seed: int) -> Tensor:
        return self._trained

    def held_out(self) -> Iterator[Tensor]:
        if len(self._held_out):
            yield self._held_out[torch.randperm(len(self._held_out), generator=generator("held out"))]


class SourceTokens:
    """A hook point of a source; its last documents are held out."""

    def __init__(self, source: Source, hook: str, stream: StreamConfig, excluded: Collection[int] = ()) -> None:
        """`excluded`: ids of tokens to leave out everywhere."""
        hooks = list(source.widths)
        if not hook and len(hooks) > 1:
            raise InputError(f"hook: must be one of {', '.join(hooks)} where there are several, got none")
        self._hook = hook or hooks[0]
        require(self._hook in hooks, "hook", f"must be one of {', '.join(hooks)}", repr(hook))
        length = source.context_length
        require(
            stream.drop_positions < length, "drop_positions", f"must be from 0 to {length - 1}", stream.drop_positions
        )
        self._source, self._stream = source, stream
        self._excluded = torch.tensor(sorted(excluded), dtype=torch.int64)
        self._n_trained = _whole_documents(source.documents, _split(source.n_contexts, stream.held_out_share))
        self._largest_norm: float | None = None

    @property
    def d_in(self) -> int:
        return self._source.widths[self._hook]

    @property
    def n_tokens(self) -> int:
        return self._n_trained * (self._source.context_length - self._stream.drop_positions)

    @property
    def identity(self) -> dict[str, object]:
        return {"tokens": self._source.identity, "contexts": self._n_trained, "hook": self._hook}

    @property
    def _contexts_a_piece(self) -> int:
        kept = self._source.context_length - self._stream.drop_positions
        return min(self._n_trained, max(1, self._stream.buffer_tokens // kept))

    def pieces(self, epoch: int, seed: int) -> int:
        return self._n_trained // self._contexts_a_piece

    def piece(self, epoch: int, number: int, seed: int) -> Tensor:
        order = torch.randperm(self._n_trained, generator=generator("contexts", seed, epoch))
        size = self._contexts_a_piece
        last = (number + 1) * size if number + 1 < self.pieces(epoch, seed) else self._n_trained
        return self._kept(order[number * size : last].sort().values.tolist())

    def held_out(self) -> Iterator[Tensor]:
        n = self._source.n_contexts - self._n_trained
        drawn = self._n_trained + torch.randperm(n, generator=generator("held out"))
        for numbers in drawn.split(self._contexts_a_piece) if n else ():
            yield self._kept(numbers.tolist())

    def _kept(self, numbers: list[int]) -> Tensor:
        """[n, d]: the activations of the given contexts at the tokens that count."""
        batch = self._source.read(numbers)
        first = self._stream.drop_positions
        x = batch.activations[self._hook][:, first:].flatten(0, 1)
        tokens = batch.tokens[:, first:].flatten().to(x.device)
        keep = ~torch.isin(tokens, self._excluded.to(x.device))
        if self._stream.max_norm_ratio > 0:
            norms = x.float().norm(dim=-1)
            keep &= norms <= self.largest_norm(norms)
        return x[keep]

    def largest_norm(self, norms: Tensor) -> float:
        """The norm above which a token is left out, decided by the first contexts read."""
        if self._largest_norm is None:
            self._largest_norm = self._stream.max_norm_ratio * norms.median().item()
        return self._largest_norm


def _whole_documents(documents: Tensor, wanted: int) -> int:
    """The number of first contexts nearest to `wanted` that ends with a document, if there are several; at least one."""
    ends = (documents.diff() != 0).nonzero().flatten() + 1
    if wanted >= len(documents) or len(ends) == 0:
        return max(1, wanted)
    return int(ends[(ends - wanted).abs().argmin()])


def no_batch(batch_size: int, n_tokens: int) -> InputError:
    """The error for a source, or a piece of it, with too few tokens."""
    return InputError(f"source: must hold at least one batch of {batch_size} tokens to train on, got {n_tokens}")


class Batches:
    """The batches [N, d] of a run in order, from any position."""

    def __init__(self, tokens: Tokens, batch_size: int, seed: int) -> None:
        """Raises InputError if the first piece holds no full batch."""
        self._tokens, self._batch_size, self._seed = tokens, batch_size, seed
        self.position = [0, 0, 0]  # epoch, piece, batches taken from it: all that a checkpoint keeps
        self._piece = self._read(0, 0)

    @property
    def piece(self) -> Tensor:
        """The piece being read, [n, d]."""
        return self._piece[1]

    def next(self) -> Tensor:
        """The next batch. Raises InputError if a piece holds no full batch."""
        x, order = self._current()
        if (self.position[2] + 1) * self._batch_size > len(x):
            self._advance()
            x, order = self._current()
        start = self.position[2] * self._batch_size
        self.position[2] += 1
        return x[order[start : start + self._batch_size].to(x.device)]

    def _advance(self) -> None:
        epoch, piece, _ = self.position
        last = piece + 1 == self._tokens.pieces(epoch, self._seed)
        self.position = [epoch + 1, 0, 0] if last else [epoch, piece + 1, 0]

    def _current(self) -> tuple[Tensor, Tensor]:
        epoch, number, _ = self.position
        if self._piece[0] != (epoch, number):
            self._piece = self._read(epoch, number)
        return self._piece[1], self._piece[2]

    def _read(self, epoch: int, number: int) -> tuple[tuple[int, int], Tensor, Tensor]:
        """A piece: its numbers, activations, order."""
        x = self._tokens.piece(epoch, number, self._seed)
        if len(x) < self._batch_size:
            raise no_batch(self._batch_size, len(x))
        return (epoch, number), x, torch.randperm(len(x), generator=generator("order", self._seed, epoch, number))
