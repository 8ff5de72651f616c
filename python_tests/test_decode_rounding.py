"""bfloat16 x_hat is the float64 sum in stored order, rounded once, though most of it is summed in float32."""

import hashlib

import pytest
import torch
from children import run_python

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


def _case(kind, d, seed=0):
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


def _defined(values, indices, W_dec, b_dec):
    """The float64 sum in stored order."""
    total = (
        torch.zeros(len(values), W_dec.shape[1], dtype=torch.float64)
        if b_dec is None
        else b_dec.double().repeat(len(values), 1)
    )
    for value, index in zip(values.T, indices.T, strict=True):
        total = torch.where(value[:, None] == 0, total, total + value[:, None].double() * W_dec[index].double())
    return total.float().bfloat16()


def _bits(x):
    return torch.where(x.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), x.view(torch.int16))


@pytest.mark.parametrize(("d", "with_bias"), [(7, True), (200, True), (768, False)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_same_bits_as_the_float64_sum(kind, d, with_bias):
    values, indices, W_dec, bias = _case(kind, d)
    b_dec = bias if with_bias else None
    defined = _bits(_defined(values, indices, W_dec, b_dec))
    assert torch.equal(_bits(dm.sparse_decode(dm.SparseActs.fixed(values, indices, F), W_dec, b_dec)), defined)
    one = dm.SparseActs.fixed(values[:1], indices[:1], F)  # cut by columns
    assert torch.equal(_bits(dm.sparse_decode(one, W_dec, b_dec)), defined[:1])


def test_tokens_of_any_number_of_latents():
    """Ragged, from none to more than are listed at a time, and with factors that are not finite."""
    g = torch.Generator().manual_seed(1)
    counts = torch.tensor([0, 1, 3, 4, 5, 15, 16, 17, 33, 300, 0, 5000, 2])
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    W_dec = torch.randn(F, 256, generator=g).bfloat16()
    indices = torch.randint(F, (int(crow[-1]),), generator=g)
    values = torch.randn(len(indices), generator=g).bfloat16()
    values[400] = float("inf")
    x_hat = dm.sparse_decode(dm.SparseActs.ragged(crow, indices, values, F, (len(counts),)), W_dec)
    for token, (start, end) in enumerate(zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True)):
        defined = _defined(values[None, start:end], indices[None, start:end], W_dec, None)
        assert torch.equal(_bits(x_hat[token : token + 1]), _bits(defined)), f"token {token} of {end - start} latents"


def _digest():
    sums = hashlib.sha256()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind in WEIGHTS:
            values, indices, W_dec, b_dec = _case(kind, 200, seed=5)
            acts = dm.SparseActs.fixed(values.to(dtype), indices, F)
            x_hat = dm.sparse_decode(acts, W_dec.to(dtype), b_dec.to(dtype))
            x_hat = torch.where(x_hat.isnan(), torch.tensor(float("nan"), dtype=dtype), x_hat)  # one NaN for all
            sums.update(x_hat.view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def test_the_same_on_plain_cpp():
    code = "import test_decode_rounding as t; print(t._digest())"
    assert run_python(code, DARKMATTER_CPU_ISA="scalar").stdout.split()[-1] == _digest()
