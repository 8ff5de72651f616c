"""What an accelerated SAE carries besides its SAELens attributes: packed weights, the last pass, counts.

Also the small types that its look, pass and decode exchange.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.batch_topk import Guess
from darkmatter_ext.saes.packed_weights import Packed
from darkmatter_ext.saes.soundness import why_not_weights
from darkmatter_ext.saes.stepping_aside import TOO_MANY, BackOff, does_not_pay, ragged_share


@dataclass(frozen=True)
class Stats:
    """How the calls of an accelerated SAE were answered, by method."""

    fast: dict[str, int]
    fallback: dict[str, dict[str, int]]  # method -> reason -> calls
    tokens_handed_over: int = 0  # tokens of fast calls with too many candidates: left to dense arithmetic
    library: str = "SAELens"

    def __str__(self) -> str:
        lines = [f"{method}: {count} fast" for method, count in self.fast.items()]
        for method, reasons in self.fallback.items():
            lines += [f"{method}: {count} by {self.library}: {reason}" for reason, count in reasons.items()]
        if self.tokens_handed_over:
            lines.append(f"{self.tokens_handed_over} tokens with many candidates by the arithmetic of {self.library}")
        return "\n".join(lines) or "no calls"


class Ready(NamedTuple):
    """What a call needs from its look at the weights."""

    prepared: Any  # PreparedEncoder or PreparedDictionary
    vectors: tuple[Tensor, ...]


class Decoder(NamedTuple):
    """What a decode needs from its look at the weights."""

    rows: Tensor  # contiguous [F, d]
    inverse_norms: Tensor | None  # [F] with rescale_acts_by_decoder_norm


class Pass(NamedTuple):
    """The latents of a call: the active ones, and dense acts [u, F] for the tokens that were handed back."""

    acts: SparseActs
    undecided: Tensor  # [u] int64
    dense: Tensor | None  # None if u is 0

    def detach(self) -> Pass:
        return Pass(self.acts.detach(), self.undecided, None if self.dense is None else self.dense.detach())


class Packing(Protocol):
    """What an architecture states about its weights."""

    decoder_is_columns: bool  # the decoder's weight is [d, F]

    def prepare(self, *weights: Tensor) -> Any: ...

    def read(self, *vectors: Tensor) -> Any: ...


class State:
    """The state of one object; copies create their own."""

    def __init__(self, sae: Any, architecture: Packing, library: str) -> None:
        self.library = library
        self.owner = weakref.ref(sae)
        self.encoder = Packed(architecture.prepare, why_not=why_not_weights)
        self.vectors = Packed(architecture.read, why_not=why_not_weights)
        decoder = functools.partial(_decoder, is_columns=architecture.decoder_is_columns)
        self.decoder = Packed(decoder, why_not=why_not_weights)
        self.rescaled_decoder = Packed(_rescaled_decoder, why_not=why_not_weights)
        self.decoder_of: tuple[Any, Decoder] | None = None  # an encoder packed with the norms of W_dec, and that W_dec
        self.back_off = BackOff()
        self.reads = BackOff()  # for pre-activations that are computed only when read (sparsify)
        self.guess = Guess()  # for BatchTopK in training
        self.refused: int | None = None  # address of a W_enc with shared storage: its layout stays
        self.has_second_passes = False  # SAELens has asked for an error term: keep the last pass for it
        self.last_pass: tuple[Tensor, Ready, tuple, Pass] | None = None  # input, everything else that decided, result
        self.calls: Counter[tuple[str, str]] = Counter()  # (method, reason or "")
        self.handed_over = 0
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _no_state, ()  # copies of an object's attributes leave it out

    def count(self, method: str, reason: str = "", handed_over: int = 0) -> None:
        with self.lock:
            self.calls[method, reason] += 1
            self.handed_over += handed_over

    def count_tried(self, method: str, acts: SparseActs, d_in: int, dense: Tensor | None) -> None:
        """Count a call that the ops answered but for the tokens of dense [u, ...], and decide who answers the next ones."""
        tokens, weights, handed_over = acts.n_tokens, acts.d_sae * d_in, 0 if dense is None else len(dense)
        self.back_off.after_trying(tokens, dense, ragged_share(acts), weights)
        mostly = does_not_pay(tokens, handed_over, weights)
        self.count(method, TOO_MANY if mostly else "", 0 if mostly else handed_over)

    def forget(self) -> None:
        for packed in (self.encoder, self.vectors, self.decoder, self.rescaled_decoder):
            packed.forget()
        self.back_off, self.reads, self.guess = BackOff(), BackOff(), Guess()
        self.last_pass = self.decoder_of = None

    def stats(self) -> Stats:
        with self.lock:
            calls, handed_over = dict(self.calls), self.handed_over
        fast = {method: count for (method, reason), count in calls.items() if not reason}
        fallback: dict[str, dict[str, int]] = {}
        for (method, reason), count in calls.items():
            if reason:
                fallback.setdefault(method, {})[reason] = count
        return Stats(fast, fallback, handed_over, self.library)


def _no_state() -> None:
    return None


def _decoder(W_dec: Tensor, *, is_columns: bool = False) -> Decoder | str:
    """Contiguous rows of W_dec, without a copy if possible; a reason if not finite, as 0 times Inf is NaN only if dense."""
    W_dec = W_dec.detach().mT if is_columns else W_dec.detach()
    return Decoder(W_dec.contiguous(), None) if bool(W_dec.isfinite().all()) else "W_dec is not finite"


def _rescaled_decoder(W_dec: Tensor) -> Decoder | str:
    """The decoder with 1 / norm of its rows, as SAELens computes it."""
    decoder, inverses = _decoder(W_dec), 1 / W_dec.detach().norm(dim=-1)
    if isinstance(decoder, str):
        return decoder
    return decoder._replace(inverse_norms=inverses) if bool(inverses.isfinite().all()) else "a decoder row is 0"


def same_pass(last: tuple[Tensor, Ready, tuple, Pass], sae_in: Tensor, ready: Ready, settings: tuple) -> bool:
    """Whether the last pass had this input (bit for bit), these weights and these settings."""
    same_weights = last[1].prepared is ready.prepared and last[1].vectors is ready.vectors
    return same_weights and last[2] == settings and torch.equal(last[0], sae_in)
