"""Answers of the ops as one hash an op: the same on every machine, instruction set and version that keeps its promises.

Inputs are made of integers, by torch's own generator of integers: no rounding of another machine's mathematics is in them.
"""

import hashlib
import sys

import torch

import darkmatter_ext as dm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((131, 83, 403, 17), (5, 40, 1200, 32), (2, 33, 300, 3), (1, 200, 700, 8))  # N, d, F, k


def _random(shape, g, bits=12):
    """Multiples of 2^(1 - bits) in [-2, 2)."""
    return torch.randint(-(1 << bits), 1 << bits, shape, generator=g).float() / (1 << (bits - 1))


def problems():
    """(dtype, x, W_enc, b_enc, b_dec, W_dec, k): plain weights, weights of all sizes, ties, tokens with NaN and infinity."""
    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for n, d, f, k in SHAPES:
            x, W_enc, W_dec = _random((n, d), g), _random((d, f), g), _random((f, d), g)
            b_enc, b_dec = _random((f,), g), _random((d,), g)
            yield [tensor.to(dtype) for tensor in (x, W_enc, b_enc, b_dec, W_dec)], k
            sizes = torch.exp2(torch.randint(-9, 4, (f,), generator=g).float())
            yield [tensor.to(dtype) for tensor in (x, W_enc * sizes, b_enc * sizes, b_dec, W_dec * sizes[:, None])], k
            ties = torch.randint(-2, 3, (d, f), generator=g).float()
            yield [tensor.to(dtype) for tensor in (x.round(), ties, b_enc.round(), b_dec.round(), W_dec)], k
            x[0, 0], x[-1, 1], b_enc[-1] = float("inf"), float("nan"), float("-inf")
            yield [tensor.to(dtype) for tensor in (x, W_enc, b_enc, b_dec, W_dec)], k


def _add(sums, *tensors):
    for tensor in tensors:
        same = (
            torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
            if tensor.is_floating_point()
            else tensor
        )
        sums.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        sums.update(same.detach().contiguous().view(torch.uint8).numpy().tobytes())


def digests() -> dict[str, str]:
    """Of every op, sixteen hex digits."""
    names = (
        "topk_encode",
        "threshold_encode",
        "gradients of the encoders",
        "find_support",
        "to_dense",
        "sparse_decode",
        "gradients of sparse_decode",
    )
    sums = {name: hashlib.sha256() for name in names}
    for (x, W_enc, b_enc, b_dec, W_dec), k in problems():
        top = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
        above = dm.threshold_encode(x, W_enc, b_enc, 1.5, b_dec=b_dec)
        _add(sums["topk_encode"], top.values, top.indices)
        _add(sums["threshold_encode"], above.crow_indices, above.col_indices, above.values)
        weights = [tensor.clone().requires_grad_() for tensor in (x, W_enc)]
        for own in (
            dm.topk_encode(*weights, b_enc, k, b_dec=b_dec), dm.threshold_encode(*weights, b_enc, 1.5, b_dec=b_dec),
        ):  # fmt: skip
            gradient = torch.arange(own.values.numel()).reshape(own.values.shape).remainder(7).sub(3).to(x.dtype)
            _add(sums["gradients of the encoders"], *torch.autograd.grad(own.values, weights, gradient))
        support = dm.find_support(top.to_dense())
        _add(sums["find_support"], support.crow_indices, support.col_indices, support.values)
        _add(sums["to_dense"], top.to_dense(), above.to_dense())
        rows = W_dec.clone().requires_grad_()
        x_hat = dm.sparse_decode(top, rows, b_dec)
        _add(sums["sparse_decode"], x_hat, dm.sparse_decode(above, W_dec))
        gradient = torch.arange(x.numel()).reshape(x.shape).remainder(7).sub(3).to(x.dtype)
        _add(sums["gradients of sparse_decode"], *torch.autograd.grad(x_hat, rows, gradient))
    return {name: own.hexdigest()[:16] for name, own in sums.items()}


if __name__ == "__main__":
    sys.stdout.write(f"{digests()}\n")
