"""Calls of the ops with random shapes, strides, dtypes and values at every limit: equal to the float64 definition.

All numbers of a case are small integers times one power of two, so that float64 sums are exact in any order: what the twin
says is the only right answer, but for the sign of a zero. The powers reach from the smallest denormal of a dtype to where
sums overflow it; infinities and NaN are put among the numbers. `DARKMATTER_FUZZ_OPS=1000000` (`make fuzz`) is how many calls;
without it some hundred.
"""

import os

import pytest
import torch

import darkmatter_ext as dm
from darkmatter_ext.ops import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Exponents of x and of W: their product is about 1, a denormal, or near the largest number, of each dtype.
EXPONENTS = {
    torch.float16: [(0, 0), (-24, 0), (-12, -12), (7, 4), (-8, 3)],
    torch.bfloat16: [(0, 0), (-133, 0), (-70, -63), (64, 58), (-20, 9)],
    torch.float32: [(0, 0), (-149, 0), (-75, -74), (64, 60), (-30, 30)],
    torch.float64: [(0, 0), (-540, -530), (500, 510), (-100, 60)],
}
INFINITE = (torch.inf, -torch.inf, -0.0)
CALLS = 5  # of a case
BLOCKS = 8  # tests that the calls are divided into


class Chance:
    """Random pieces of one case."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n):
        return int(torch.randint(n, (1,), generator=self.generator))

    def one(self, choices):
        return choices[self.below(len(choices))]

    def numbers(self, shape, exponent, dtype, *, specials=()):
        """Integers from -8 to 8 times 2^exponent, some shapes with few different ones; and one of `specials` here and there."""
        largest = self.one((1, 2, 8))
        whole = torch.randint(-largest, largest + 1, shape, generator=self.generator).double()
        own = (whole * 2.0**exponent).to(dtype)
        if specials and self.below(4) == 0:
            own[torch.rand(shape, generator=self.generator) < 0.02] = self.one(specials)
        return own

    def strided(self, x):
        """The same numbers with other strides: transposed, every other element of more, behind an offset."""
        kind = self.below(5)
        if kind == 0 or x.ndim == 0:
            return x
        if kind == 1:
            return x.mT.contiguous().mT if x.ndim > 1 else x
        if kind == 2:
            return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
        if kind == 3:
            return torch.cat([torch.full_like(x[:1], torch.nan), x])[1:] if len(x) else x
        return torch.stack([torch.full_like(x, torch.nan), x], dim=0)[1]


def _same(ours, twin, about):
    assert ours.shape == twin.shape, about
    assert ours.dtype == twin.dtype, about
    assert ((ours == twin) | (ours.isnan() & twin.isnan())).all(), (about, ours, twin)


def _case(seed):
    chance = Chance(seed)
    dtype = chance.one(DTYPES)
    of_x, of_w = chance.one(EXPONENTS[dtype])
    d, n_latents = 1 + chance.below(40), 1 + chance.one((3, 40, 400))
    n_latents = 1 + chance.below(n_latents)
    leading = chance.one(((), (0,), (1,), (3,), (9,), (2, 3), (1, 2, 2)))
    x = chance.strided(chance.numbers((*leading, d), of_x, dtype, specials=(*INFINITE, torch.nan)))
    W_enc = chance.strided(chance.numbers((d, n_latents), of_w, dtype, specials=INFINITE))  # NaN is refused there
    b_enc = chance.strided(chance.numbers((n_latents,), of_x + of_w, dtype, specials=INFINITE))
    b_dec = chance.numbers((d,), of_x, dtype) if chance.below(2) else None
    about = f"seed {seed}, {dtype}, x {list(x.shape)}, F {n_latents}"
    k = chance.one((0, 1, n_latents, chance.below(n_latents + 1)))
    prepared = None
    if chance.below(2) and W_enc.isfinite().all() and b_enc.isfinite().all():
        prepared = dm.prepare_encoder(W_enc, b_enc, b_dec=b_dec)
    ours = dm.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec, prepared=prepared)
    twin = reference.topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
    _same(ours.indices, twin.indices, f"topk indices, k {k}, {about}")
    _same(ours.values, twin.values, f"topk values, k {k}, {about}")
    threshold = chance.numbers(chance.one(((), (n_latents,))), of_x + of_w, dtype)
    ours = dm.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec, prepared=prepared)
    twin = reference.threshold_encode(x, W_enc, b_enc, threshold, b_dec=b_dec)
    for name in ("crow_indices", "col_indices", "values"):
        _same(getattr(ours, name), getattr(twin, name), f"threshold {name}, {about}")
    dense = ours.to_dense()
    _same(dense, twin.to_dense(), f"to_dense, {about}")
    found = dm.find_support(dense)
    _same(found.to_dense(), dense + 0.0, f"find_support, {about}")
    codes = dm.SparseActs.ragged(
        ours.crow_indices, ours.col_indices, chance.numbers(ours.values.shape, 0, dtype), n_latents, ours.shape[:-1]
    )
    W_dec = chance.strided(chance.numbers((n_latents, d), of_w, dtype))
    bias = chance.numbers((d,), of_w, dtype) if chance.below(2) else None
    _same(dm.sparse_decode(codes, W_dec, bias), reference.sparse_decode(codes, W_dec, bias), f"decode, {about}")


@pytest.mark.parametrize("block", range(BLOCKS))
def test_calls_at_every_limit_are_the_definition(block):
    cases = max(25, int(os.environ.get("DARKMATTER_FUZZ_OPS", "0")) // CALLS // BLOCKS)
    for case in range(cases):
        _case(block * 10_000_000 + case)
