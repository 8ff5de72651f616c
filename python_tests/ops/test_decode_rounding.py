"""bfloat16 x_hat is the float64 sum in stored order, rounded once, though most of it is summed in float32."""

import pytest
import torch
from cases.children import run_python
from cases.digests import WEIGHTS, F, decode_case, digest_of_decode

import darkmatter_ext as dm


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
    values, indices, W_dec, bias = decode_case(kind, d)
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


@pytest.mark.slow
def test_the_same_on_plain_cpp():
    code = "from cases.digests import digest_of_decode; print(digest_of_decode())"
    assert run_python(code, DARKMATTER_CPU_ISA="scalar").stdout.split()[-1] == digest_of_decode()
