"""All bits of what decode answers, as one hash: to compare instruction sets. Those of every op: cases/golden.py."""

import hashlib

import torch

import darkmatter_ext as dm

N, F, K = 40, 300, 24


def _pow2(low, high, shape, g):
    return torch.exp2(torch.randint(low, high, shape, generator=g).float())


def _cancelling(shape, g):
    """Rows 2 j and 2 j + 1 almost cancel."""
    rows = torch.randn(shape, generator=g)
    rows[1::2] = -rows[::2] * (1 + 2.0**-7 * (torch.rand(rows[::2].shape, generator=g) > 0.9))
    return rows


def _with(rows, value, g):
    return torch.where(torch.rand(rows.shape, generator=g) < 0.01, torch.tensor(value), rows)


WEIGHTS = {
    "gaussian": lambda shape, g: torch.randn(shape, generator=g) / shape[1] ** 0.5,
    "cancelling": _cancelling,
    "ties": lambda shape, g: torch.randint(-200, 201, shape, generator=g).float(),  # sums of integers: half are ties
    "wide": lambda shape, g: torch.randn(shape, generator=g) * _pow2(-60, 60, shape, g),
    "subnormal": lambda shape, g: torch.randn(shape, generator=g) * _pow2(-140, -110, shape, g),
    "overflow": lambda shape, g: torch.randn(shape, generator=g) * 1e38,
    "infinite": lambda shape, g: _with(torch.randn(shape, generator=g), float("inf"), g),
    "not a number": lambda shape, g: _with(torch.randn(shape, generator=g), float("nan"), g),
    "zero columns": lambda shape, g: torch.randn(shape, generator=g) * (torch.arange(shape[1]) % 3 == 0),
    "minus zeros": lambda shape, g: -torch.zeros(shape),
}


def decode_case(kind, d, seed=0):
    """values [N, K], indices [N, K], W_dec [F, d], b_dec [d] of bfloat16."""
    g = torch.Generator().manual_seed(seed)
    W_dec = WEIGHTS[kind]((F, d), g).bfloat16()
    values = (
        torch.randint(1, 3, (N, K), generator=g) if kind == "ties" else torch.rand(N, K, generator=g) * 3
    ).bfloat16()
    if kind == "cancelling":
        values[:, 1::2] = values[:, ::2]
        pairs = torch.randint(F // 2, (N, K // 2), generator=g)
        indices = torch.stack([2 * pairs, 2 * pairs + 1], dim=2).flatten(1)
    else:
        indices = torch.randint(F, (N, K), generator=g)
    return values, indices, W_dec, torch.randn(d, generator=g).bfloat16()


def digest_of_decode() -> str:
    """Decode of every kind of weights in three types."""
    sums = hashlib.sha256()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind in WEIGHTS:
            values, indices, W_dec, b_dec = decode_case(kind, 200, seed=5)
            acts = dm.SparseActs.fixed(values.to(dtype), indices, F)
            x_hat = dm.sparse_decode(acts, W_dec.to(dtype), b_dec.to(dtype))
            x_hat = torch.where(x_hat.isnan(), torch.tensor(float("nan"), dtype=dtype), x_hat)  # one NaN for all
            sums.update(x_hat.view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()
