"""When SAELens' own dense code is faster: small calls, dense latents, and tokens that screening does not help.

Attention sinks and ties leave so many candidates that a dense product is faster; the ops hand such tokens back.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.facts import fact

DENSE_SHARE = 0.06  # a dense encode is faster above this active share of the latents
DECODE_DENSITY = 0.10  # and a dense decode above this one
# Multiply-adds of a dense product that takes no longer than the overhead of the ops (looks at weights, calls). Measured
# on two Zen 3 cores: benchmarks/README.md.
SMALL_DECODE, SMALL_ENCODE, SMALL_FORWARD = 1 << 21, 1 << 22, 1 << 20

HALVES = (torch.float16, torch.bfloat16)


class DenseCost(NamedTuple):
    """What a library's dense encode costs where its product is fast."""

    on_gpu: float = 1.0  # in units of a product and a comparison
    on_amx: float = 2.0**33  # multiply-adds in 16 bits, below which it is as fast as the ops on a processor with AMX


RELU_COST, THRESHOLD_COST = DenseCost(), DenseCost(on_amx=2.0**31)
TOPK_COST, GATED_COST = DenseCost(1.5, 2.0**29), DenseCost(on_amx=2.0**27)  # torch.topk; two products
TRAINING_COST = DenseCost(on_amx=0.0)  # with gradients the ops save more than the encode
FORWARD_ON_AMX = 0.25  # of that limit; a forward also decodes
DECODE_ON_AMX = 2.0**28
# Only for so many weights, which stay in a cache, and from so many tokens on, which share what is read of them.
AMX_WEIGHTS, AMX_TOKENS = 1 << 23, 16


class OnGpu(NamedTuple):
    """The same on a GPU, by its precision: there the overhead is launches and one wait for the look at the weights."""

    full: float  # float32 and float64
    tf32: float
    half: float  # 16-bit types

    def limit(self, tensor: Tensor) -> float:
        if tensor.dtype in HALVES:
            return self.half
        # (Reading the older allow_tf32 raises if only the newer settings were used; setting it also sets those.)
        tf32 = tensor.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return self.tf32 if tf32 else self.full


# Measured on an H200 at 768 -> 24576, 8 to 4096 tokens: benchmarks/README.md.
SMALL_DECODE_ON_GPU, SMALL_ENCODE_ON_GPU = OnGpu(8.5e9, 8e10, 2e11), OnGpu(8e9, 2.5e10, 5e10)
SMALL_FORWARD_ON_GPU = OnGpu(5e9, 2.5e10, 4e10)
# Below this, a dense encode is as fast for any number of tokens, and the rest up to so many multiply-adds.
FEW_LATENTS = 2048
FEW_LATENTS_DECODE, FEW_LATENTS_FORWARD = 1 << 27, 1 << 28
FIRST_WAIT, LONGEST_WAIT = 8, 256  # calls
LOOK_EVERY = 4  # calls while waiting: whether dense tokens have become sparse

SMALL = "small: the library's dense product is as fast"
TOO_MANY = "too many latents are active, or close to it, in most tokens (tried again after some calls)"
TOO_DENSE = f"more than {DECODE_DENSITY:.0%} of the latents are active"


def is_small_encode(x: Any, d_sae: int, cost: DenseCost) -> bool:
    """Whether SAELens' dense encode of x [..., d_in] finishes before the looks at the weights would."""
    if not isinstance(x, Tensor):
        return False
    limit = SMALL_ENCODE_ON_GPU.limit(x) / cost.on_gpu if x.is_cuda else SMALL_ENCODE
    return x.numel() * d_sae < limit or d_sae < FEW_LATENTS or _is_small_in_tiles(x, d_sae, cost.on_amx)


def is_small_forward(x: Any, d_sae: int, cost: DenseCost) -> bool:
    """As `is_small_encode`, for a forward. Its encode is small too, however often it is made."""
    if not isinstance(x, Tensor):
        return False
    on_cpu = FEW_LATENTS_FORWARD if d_sae < FEW_LATENTS else SMALL_FORWARD
    if x.numel() * d_sae < (SMALL_FORWARD_ON_GPU.limit(x) / cost.on_gpu if x.is_cuda else on_cpu):
        return True
    if d_sae < FEW_LATENTS:
        return _is_small_in_tiles(x, d_sae, math.inf, tokens=1)
    return _is_small_in_tiles(x, d_sae, FORWARD_ON_AMX * cost.on_amx)


def is_small_decode(acts: Any, d_sae: int, d_in: int) -> bool:
    """As `is_small_encode`, for acts [..., d_sae]."""
    if not isinstance(acts, Tensor):
        return False
    if _is_small_in_tiles(acts, d_in, math.inf if d_sae < FEW_LATENTS else DECODE_ON_AMX):
        return True
    on_cpu = FEW_LATENTS_DECODE if d_sae < FEW_LATENTS else SMALL_DECODE
    return acts.numel() * d_in < (SMALL_DECODE_ON_GPU.limit(acts) if acts.is_cuda else on_cpu)


@functools.cache
def _has_tiles() -> bool:
    return fact("cpu_isa") == "amx_int8"


def _is_small_in_tiles(rows: Tensor, width: int, limit: float, tokens: int = AMX_TOKENS) -> bool:
    """Whether torch's 16-bit product of rows [..., d] and weights [d, width] is fast: AMX does 8 times float32's rate."""
    if rows.dtype not in HALVES or rows.dim() == 0 or not rows.is_cpu or not _has_tiles():
        return False
    d = rows.shape[-1]
    return tokens * d <= rows.numel() < limit / max(width, 1) and d * width < AMX_WEIGHTS


def looks_dense(acts: Tensor, share: float) -> bool:
    """Whether a few tokens of acts [..., F] are denser than `share` on average; cheaper than listing latents."""
    shares = active_shares(acts)
    return shares.numel() > 0 and shares.mean().item() > share


def ragged_share(acts: SparseActs) -> float:
    """Share of the latents that are active, 0 where each token has a fixed number of them."""
    return acts.values.numel() / max(1, acts.n_tokens * acts.d_sae) if acts.crow is not None else 0.0


# A dense product of few tokens takes as long as one of so many, where it is the weights that are read: beyond some megabytes
# of them. Found from calls with one dense token of 8 and of 64 (never_slower, "sink"): with the screen of 16 bits, encode ran
# at 0.63 to 0.82 of SAELens' speed.
READ_WEIGHTS = 1 << 21
_TOKENS_OF_A_READ = {"amx_int8": 1, "avx512_vnni": 8, "avx_vnni": 8}
_TOKENS_OF_A_READ_OF_16_BITS = 24


@functools.cache
def _tokens_of_a_read() -> int:
    return _TOKENS_OF_A_READ.get(fact("cpu_isa"), _TOKENS_OF_A_READ_OF_16_BITS)


def does_not_pay(tokens: int, undecided: int, weights: int = 0) -> bool:
    """Whether a call hands back so many tokens that SAELens' own code is as fast for all of them. weights: d_in d_sae."""
    if undecided in (0, tokens):
        return undecided > 0
    least = _tokens_of_a_read() if weights >= READ_WEIGHTS else 1
    return max(undecided, least) > max(1, tokens // 4)


class BackOff:
    """How many calls to leave to SAELens after one that handed back many tokens: 8, then 16, at most 256."""

    def __init__(self) -> None:
        self.left = 0
        self._wait = 0
        self._dense = False  # tokens were handed back because they were dense, not because they were hard to decide
        self._ends_early = True  # once dense tokens have become sparse; not if that has been misleading
        self._ended_early = False
        self._call = threading.local()  # what this thread's `one_call` has decided

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Treat this thread's encodes inside as one call: all are fast or all left to SAELens, and only the first counts.

        Otherwise the error term, a difference of two encodes, would include the difference between two arithmetics.
        """
        decided = vars(self._call)
        before = dict(decided)
        decided.update(steps_aside=self.left > 0, counted=False)
        try:
            yield
        finally:
            decided.clear()
            decided.update(before)

    def steps_aside(self) -> bool:
        """Whether SAELens answers this call."""
        return getattr(self._call, "steps_aside", self.left > 0)

    def expects_dense(self) -> bool:
        """Whether the latents of this SAE were dense at the last look, which need not be repeated yet."""
        return self._dense and self.left % LOOK_EVERY != 0

    def after_trying(self, tokens: int, dense: Tensor | None, share: float = 0.0, weights: int = 0) -> None:
        """Record how a call went.

        dense: acts [u, F] of the tokens that were handed back, or None.
        share: of the latents, how many were active where their number is not fixed: listing many costs more than they save.
        weights: d_in d_sae.
        """
        if tokens == 0 or not self._counts():
            return
        undecided = 0 if dense is None else len(dense)
        if share > DECODE_DENSITY:
            self._dense, undecided = True, tokens
        elif dense is not None:
            self._dense = median_share(dense) > DENSE_SHARE
        if does_not_pay(tokens, undecided, weights):
            self._ends_early = not self._ended_early
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), LONGEST_WAIT)
            self.left = self._wait
        elif self._wait:
            self._wait = 0
            self._ends_early = True
        self._ended_early = False

    def after_dense(self, acts: Tensor) -> None:
        """Wait one call less; stop waiting if tokens that were dense have become sparse in these dense acts [..., F]."""
        if not self.left or not self._counts():
            return
        self.left -= 1
        looks = self.left % LOOK_EVERY == 0 and self.left
        if looks and self._ends_early and self._dense and median_share(acts) <= DENSE_SHARE:
            self.left = 0
            self._ended_early = True

    def _counts(self) -> bool:
        """Whether an encode is the first of its call."""
        counted = getattr(self._call, "counted", None)  # None outside of `one_call`
        if counted is False:
            self._call.counted = True
        return not counted


def median_share(acts: Tensor) -> float:
    """Share of active latents at the median of a few tokens, so that outliers decide nothing."""
    shares = active_shares(acts)
    return shares.median().item() if shares.numel() else 0.0


def active_shares(acts: Tensor) -> Tensor:
    """[m <= 15]: share of active latents in evenly spaced tokens of acts [..., F], estimated from a thousand of each.

    Counting all of them would take a tenth of a dense encode of few tokens. The steps are odd: users mask every second token.
    """
    acts = acts.detach().reshape(math.prod(acts.shape[:-1]), acts.shape[-1])  # -1 is ambiguous where F is 0
    some = acts[:: len(acts) // 8 | 1, :: acts.shape[-1] // 1024 | 1] != 0
    return some.sum(-1) / max(1, some.shape[-1])
