"""Inputs of the compiled ops, one list for opcheck, fakes and gradients; an op without a case fails a test.

Shapes: N tokens, d model dimension, F latents, k active latents a token, z active latents in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter_ext.ops import _registrations  # noqa: F401  (defines torch.ops.darkmatter)

N, D, F, K = 5, 7, 11, 3
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Half a unit in the last place of one rounding, doubled: what two correct ways of summing in float64 may differ by.
# float64 itself is not rounded once but at every addition, hence more room (measured: 4e-15 at d 576).
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1.2e-7, torch.float64: 1e-13}
if_torch_tells_why = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="before torch 2.13 its stable ABI does not say why a call of it failed",
)


@dataclass(frozen=True)
class Case:
    """Positional arguments of torch.ops.darkmatter.<op>, and which of them have a gradient."""

    op: str
    name: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    differentiable: tuple[int, ...] = field(default=())

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def call(self) -> Callable[..., Any]:
        return getattr(torch.ops.darkmatter, self.op)


# What prepare_encoder returns is what the encoders take as their last arguments, however many tensors that is.
N_PACKED = len(torch.ops.darkmatter.prepare_encoder.default._schema.returns)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def encoder(dtype: torch.dtype, d: int = D, n_latents: int = F) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc [d, F], b_enc [F], b_dec [d]."""
    weights = (gaussian(d, n_latents, seed=1), gaussian(n_latents, seed=2), gaussian(d, seed=3))
    return weights[0].to(dtype), weights[1].to(dtype), weights[2].to(dtype)


def _x(dtype: torch.dtype, n: int = N) -> Tensor:
    return gaussian(n, D, seed=4, dtype=dtype)


def _encode(*extra: Any, centred: bool = False, packed: bool = False, n: int = N, strided: bool = False) -> Callable:
    """x, W_enc, b_enc, b_dec, *extra, *packed of the two encoders; a float in `extra` becomes a tensor."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        W_enc, b_enc, b_dec = encoder(dtype)
        x = _x(dtype, 2 * n)[::2] if strided else _x(dtype, n)
        W_enc = W_enc.mT.contiguous().mT if strided else W_enc
        b = b_dec if centred else None
        middle = [torch.tensor(value, dtype=dtype) if isinstance(value, float) else value for value in extra]
        middle = [value.to(dtype) if isinstance(value, Tensor) else value for value in middle]
        pack = torch.ops.darkmatter.prepare_encoder
        parts = pack(W_enc, b_enc, b) if packed else (None,) * len(pack.default._schema.returns)
        return (x, W_enc, b_enc, b, *middle, *parts)

    return make


def _active(form: str) -> tuple[Tensor, Tensor | None]:
    """indices [N, k] without crow, or [z] with crow [N + 1] (a token without active latents among them)."""
    generator = torch.Generator().manual_seed(5)
    indices = torch.rand(N, F, generator=generator).argsort(1)[:, :K]
    if form == "fixed":
        return indices, None
    if form == "none":
        return torch.empty(0, dtype=torch.int64), torch.zeros(N + 1, dtype=torch.int64)
    crow = torch.tensor([0, 2, 2, 5, 6, 9])
    rows = indices.sort(1).values
    return torch.cat([rows[0, :2], rows[2], rows[3, :1], rows[4]]), crow


def _decode(form: str, bias: bool) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        indices, crow = _active(form)
        values = gaussian(*indices.shape, seed=6, dtype=dtype).abs()
        return (
            values,
            indices,
            crow,
            gaussian(F, D, seed=7, dtype=dtype),
            gaussian(D, seed=8, dtype=dtype) if bias else None,
        )

    return make


def _dot(form: str) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return _x(dtype), *_active(form), gaussian(F, D, seed=7, dtype=dtype)

    return make


def _outer(form: str) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        indices, crow = _active(form)
        return gaussian(*indices.shape, seed=6, dtype=dtype), indices, crow, _x(dtype), F

    return make


def _wide_decode(dtype: torch.dtype) -> tuple[Any, ...]:
    indices, _ = _active("fixed")
    values = gaussian(*indices.shape, seed=6, dtype=torch.float64)
    values[1] = 0  # atoms that have left
    return values, indices, gaussian(F, D, seed=7, dtype=dtype)


def _wide_dot(dtype: torch.dtype) -> tuple[Any, ...]:
    return _x(torch.float64), _active("fixed")[0], gaussian(F, D, seed=7, dtype=dtype)


def _pack(centred: bool, transposed: bool) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        W_enc, b_enc, b_dec = encoder(dtype)
        return W_enc.mT.contiguous().mT if transposed else W_enc, b_enc, b_dec if centred else None

    return make


def _sparse_acts(form: str) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        indices, crow = _active(form)
        return gaussian(*indices.shape, seed=6, dtype=dtype), indices, crow, F

    return make


def _dense_acts(n: int, *capacity: int) -> Callable:
    return lambda dtype: (_x(dtype, n).relu(), *capacity)


def _screened(*extra: Any, gain: bool = False) -> Callable:
    """x, W_enc, b_enc, b_dec, *extra and packed weights of a size that is screened."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        W_enc, b_enc, b_dec = encoder(dtype, d=40, n_latents=300)
        middle = [torch.tensor(value, dtype=dtype) if isinstance(value, float) else value for value in extra]
        gains = (gaussian(300, seed=10).abs().to(dtype),) if gain else ()
        packed = torch.ops.darkmatter.prepare_encoder(W_enc, b_enc, b_dec, *gains)
        return (gaussian(N, 40, seed=4, dtype=dtype), W_enc, b_enc, b_dec, *middle, *packed, *gains)

    return make


def _prepare_rows(dtype: torch.dtype) -> tuple[Any, ...]:
    W_enc, b_enc, b_dec = encoder(dtype, d=40, n_latents=300)
    return W_enc.mT.contiguous(), b_enc, b_dec, gaussian(300, seed=10).abs().to(dtype)


_X_W_B = (0, 1, 2)
CASES = [
    Case("prepare_encoder", "plain", _pack(centred=False, transposed=False)),
    Case("prepare_encoder", "centred", _pack(centred=True, transposed=False)),
    Case("prepare_encoder", "already-packed", _pack(centred=True, transposed=True)),
    Case("topk_encode", "plain", _encode(K), _X_W_B),
    Case("topk_encode", "centred", _encode(K, centred=True), (*_X_W_B, 3)),
    Case("topk_encode", "packed", _encode(K, centred=True, packed=True), (0,)),  # the packed copy stays as it is
    Case("topk_encode", "strided", _encode(K, strided=True), _X_W_B),
    Case("topk_encode", "all", _encode(F), _X_W_B),
    Case("topk_encode", "gains", _screened(K, gain=True), (0,)),
    Case("topk_encode", "none", _encode(0), _X_W_B),
    Case("topk_encode", "no-tokens", _encode(K, n=0), _X_W_B),
    Case("threshold_encode", "scalar", _encode(0.5), _X_W_B),
    Case("threshold_encode", "vector", _encode(gaussian(F, seed=9).abs(), centred=True), (*_X_W_B, 3)),
    Case("threshold_encode", "packed", _encode(0.5, centred=True, packed=True), (0,)),
    Case("threshold_encode", "gains", _screened(9.0, gain=True), (0,)),
    Case("threshold_encode", "nothing-kept", _encode(1e4), _X_W_B),
    Case("threshold_encode", "no-tokens", _encode(0.5, n=0), _X_W_B),
    Case("threshold_encode_fixed", "scalar", _encode(0.5, K), _X_W_B),
    Case("threshold_encode_fixed", "vector", _encode(gaussian(F, seed=9).abs(), 2, centred=True), (*_X_W_B, 3)),
    Case("threshold_encode_fixed", "packed", _encode(0.5, F, centred=True, packed=True), (0,)),
    Case("threshold_encode_fixed", "gains", _screened(9.0, 40, gain=True), (0,)),
    Case("threshold_encode_fixed", "nothing-kept", _encode(1e4, K), _X_W_B),
    Case("threshold_encode_fixed", "no-room", _encode(0.5, 0), _X_W_B),
    Case("threshold_encode_fixed", "no-tokens", _encode(0.5, K, n=0), _X_W_B),
    Case("prepare_rows", "gains", _prepare_rows),
    Case("try_topk_encode", "packed", _screened(K), (0,)),
    Case("try_threshold_encode", "packed", _screened(9.0), (0,)),
    Case("sparse_decode", "fixed", _decode("fixed", bias=True), (0, 3, 4)),
    Case("sparse_decode", "ragged", _decode("ragged", bias=False), (0, 3)),
    Case("sparse_decode", "nothing-active", _decode("none", bias=True), (0, 3, 4)),
    Case("decoder_dot", "fixed", _dot("fixed"), (0, 3)),
    Case("decoder_dot", "ragged", _dot("ragged"), (0, 3)),
    Case("decoder_outer", "fixed", _outer("fixed"), (0, 3)),
    Case("decoder_outer", "ragged", _outer("ragged"), (0, 3)),
    Case("wide_decode", "fixed", _wide_decode),
    Case("wide_dot", "fixed", _wide_dot),
    Case("to_dense", "fixed", _sparse_acts("fixed"), (0,)),
    Case("to_dense", "ragged", _sparse_acts("ragged"), (0,)),
    Case("to_dense", "nothing-active", _sparse_acts("none"), (0,)),
    Case("find_support", "some", _dense_acts(N)),
    Case("find_support", "no-tokens", _dense_acts(0)),
    Case("find_support_fixed", "some", _dense_acts(N, K)),
    Case("find_support_fixed", "all", _dense_acts(N, D)),
    Case("find_support_fixed", "no-tokens", _dense_acts(0, K)),
    Case("screen_intervals", "centred", _screened()),
]

# What CUDA has no kernel for: the host never looks there at what screening left undecided; gains have no kernel yet.
CPU_ONLY = {"prepare_rows", "try_topk_encode", "try_threshold_encode"}
ON_CUDA = [case for case in CASES if case.op not in CPU_ONLY and case.name != "gains"]


def registered_ops() -> set[str]:
    """Every op in the table of csrc/ops.cpp that runs on the CPU, as torch knows them."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("darkmatter::")]
    on_cpu = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return {name.removeprefix("darkmatter::") for name in on_cpu}
