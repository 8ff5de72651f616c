"""The decode of the Triton kernels (flex-sae, jumprelu-sae-kernels), written anew: a program a token and block of columns.

Needs triton, which comes with torch on a GPU machine; import this where it is used.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]  (installed with a CUDA torch only)
import triton.language as tl  # pyright: ignore[reportMissingImports]  (the same)
from torch import Tensor

BLOCK = 256  # columns


@triton.jit
def _decode(values, indices, weight, out, k, d, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < d
    total = tl.zeros((block,), tl.float32)
    for a in range(k):
        latent = tl.load(indices + token * k + a)
        value = tl.load(values + token * k + a).to(tl.float32)
        row = tl.load(weight + latent * d + column, mask=inside, other=0.0)
        total += value * row.to(tl.float32)
    tl.store(out + token * d + column, total.to(out.dtype.element_ty), mask=inside)


def triton_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """x_hat [N, d] from acts [N, k] and W_dec [F, d], summed in float32."""
    n, k = values.shape
    d = W_dec.shape[1]
    out = torch.empty(n, d, dtype=W_dec.dtype, device=W_dec.device)
    _decode[(n, triton.cdiv(d, BLOCK))](values, indices, W_dec, out, k, d, BLOCK)  # pyright: ignore[reportIndexIssue]  (triton's decorator is unknown)
    return out
