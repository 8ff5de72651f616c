"""Rows of benchmarks/gpu.py at the shapes that peers publish, and at those where a GPU is not busy: few tokens, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peers
import torch
from gpu_timing import Row, with_tf32
from torch import Tensor

import darkmatter_ext as dm

SMALL = (768, 24576, 32)  # d, F, k of `small` and `training`
SMALL_TOKENS = (1, 8, 64)
TRAINING_TOKENS = 4096


@dataclass
class Weights:
    """Gaussian weights and tokens on the GPU, as `Problem` of gpu.py, of any dtype."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @classmethod
    def make(cls, n: int, d: int, n_latents: int, dtype: torch.dtype = torch.float32) -> Weights:
        g = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(n, d, generator=g, device="cuda").to(dtype)
        W_dec = torch.randn(n_latents, d, generator=g, device="cuda").div_(d**0.5).to(dtype)
        return cls(x, W_dec.mT.contiguous(), torch.zeros(n_latents, device="cuda", dtype=dtype), W_dec)

    def encode_row(self, name: str, k: int) -> Row:
        """Top-k with prepared weights against a dense product and torch's topk."""
        x, W_enc, b_enc = self.x, self.W_enc, self.b_enc
        prepared = dm.prepare_encoder(W_enc, b_enc)

        def dense() -> Any:
            return peers.matmul_topk(x, W_enc, b_enc, k)

        others = {"matmul + topk": dense, "sae_lens": lambda: peers.sae_lens_topk(x, W_enc, b_enc, k)}
        if x.dtype == torch.float32:
            others["matmul + topk tf32"] = with_tf32(dense)
        return Row(
            f"encode topk {name}",
            lambda: dm.topk_encode(x, W_enc, b_enc, k, prepared=prepared),
            others,
            {"matmul": lambda: x @ W_enc},
            flops=2.0 * x.numel() * W_enc.shape[1],
        )

    def decode_row(self, name: str, k: int) -> Row:
        """k active latents a token, drawn at random, against the ways others decode."""
        n, n_latents = len(self.x), len(self.W_dec)
        g = torch.Generator("cuda").manual_seed(1)
        indices = torch.randint(n_latents, (n, k), generator=g, device="cuda")
        values = torch.rand(n, k, generator=g, device="cuda").to(self.x.dtype)
        acts, W_dec = dm.SparseActs.fixed(values, indices, n_latents), self.W_dec
        others: dict[str, Callable[[], Any]] = {
            "embedding_bag": lambda: peers.embedding_bag_decode(values, indices, W_dec),
            "gathered rows": lambda: peers.gathered_decode(values, indices, W_dec),
            "triton": lambda: _triton_decode(values, indices, W_dec),
        }
        if n * n_latents < 1 << 30:
            dense = acts.to_dense()
            others["dense matmul"] = lambda: dense @ W_dec

        def check() -> None:
            oracle = (values.double()[:, :, None] * W_dec[indices].double()).sum(1)[:16]
            bits = torch.finfo(W_dec.dtype).eps
            torch.testing.assert_close(dm.sparse_decode(acts, W_dec)[:16].double(), oracle, rtol=bits, atol=1e-9)

        gathered = float(W_dec.element_size() * n * W_dec.shape[1] * (k + 1))
        return Row(f"decode {name}", lambda: dm.sparse_decode(acts, W_dec), others, check=check, bytes=gathered)


def _triton_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    from triton_decode import triton_decode  # a machine without triton records that it is not run

    return triton_decode(values, indices, W_dec)


def flash_sae() -> Iterator[Row]:
    """The shape of flash-sae."""
    n, d, n_latents, k = 1024, 4096, 65536, 64
    weights, name = Weights.make(n, d, n_latents, torch.bfloat16), f"flash-sae {n}x{d}x{n_latents} k {k} bfloat16"
    yield weights.encode_row(name, k)
    yield weights.decode_row(name, k)


def jumprelu_sae_kernels() -> Iterator[Row]:
    """The shapes of jumprelu-sae-kernels: Gemma Scope, few tokens."""
    n, d, k = 32, 2304, 64
    for n_latents in (65536, 262144):
        weights = Weights.make(n, d, n_latents)
        yield weights.decode_row(f"jumprelu-sae-kernels {n}x{d}x{n_latents} k {k} float32", k)


def small() -> Iterator[Row]:
    """Few tokens: what a call costs before there is anything to compute."""
    d, n_latents, k = SMALL
    weights = Weights.make(max(SMALL_TOKENS), d, n_latents)
    for n in SMALL_TOKENS:
        few = Weights(weights.x[:n], weights.W_enc, weights.b_enc, weights.W_dec)
        yield few.encode_row(f"small {n}x{d}x{n_latents} k {k} float32", k)
        yield few.decode_row(f"small {n}x{d}x{n_latents} k {k} float32", k)


def bf16_decode() -> Iterator[Row]:
    """Decodes of 16-bit weights: half the bytes."""
    for n, d, n_latents, k in ((4096, 768, 16384, 32), (4096, 2304, 65536, 64)):
        weights = Weights.make(n, d, n_latents, torch.bfloat16)
        yield weights.decode_row(f"{n}x{d}x{n_latents} k {k} bfloat16", k)


def training() -> Iterator[Row]:
    """Encode, decode, loss and all gradients of one batch; weights change every step, so ours packs them each time."""
    d, n_latents, k = SMALL
    weights = Weights.make(TRAINING_TOKENS, d, n_latents)
    b_dec = torch.zeros(d, device="cuda", requires_grad=True)
    learned = [each.requires_grad_() for each in (weights.W_enc, weights.b_enc, weights.W_dec)] + [b_dec]
    x, (W_enc, b_enc, W_dec, _) = weights.x, learned

    def gradients(reconstruct: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = (reconstruct() - x).square().sum(-1).mean()
            return torch.autograd.grad(loss, learned)

    def ours() -> Tensor:
        return dm.sparse_decode(dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec), W_dec, b_dec)

    def sae_lens() -> Tensor:
        return peers.sae_lens_topk(x - b_dec, W_enc, b_enc, k) @ W_dec + b_dec

    def check() -> None:
        for mine, theirs in zip(gradients(ours), gradients(sae_lens), strict=True):
            assert (mine - theirs).norm() <= 1e-3 * theirs.norm(), "training: gradients differ from the dense ones"

    yield Row(
        f"training step {TRAINING_TOKENS}x{d}x{n_latents} k {k} float32",
        lambda: gradients(ours),
        {"sae_lens": lambda: gradients(sae_lens), "sae_lens tf32": with_tf32(lambda: gradients(sae_lens))},
        check=check,
    )


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "flash-sae": flash_sae,
    "jumprelu-sae-kernels": jumprelu_sae_kernels,
    "small": small,
    "training": training,
    "bf16": bf16_decode,
}
