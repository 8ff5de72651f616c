"""Rows and scales chosen against the bounds of a screen, and what they must hold, in rational numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import torch

import darkmatter_ext as dm
from cases.screening import DTYPES, without_codes
from darkmatter_ext.ops.encode import ScreenIntervals, screen_intervals

ROWS = (
    "gaussian", "one_huge", "one_hot", "equal_signs", "constant", "two_equal", "half_codes", "subnormals", "wide_range",
)  # fmt: skip


@dataclasses.dataclass
class Problem:
    """Inputs of an encoder of a size that is screened."""

    x: torch.Tensor  # [N, d]
    W_enc: torch.Tensor  # [d, F]
    b_enc: torch.Tensor  # [F]
    b_dec: torch.Tensor | None  # [d]
    gain: torch.Tensor | None  # [F]

    def prepared(self) -> dm.PreparedEncoder:
        return dm.prepare_encoder(self.W_enc, self.b_enc, b_dec=self.b_dec, gain=self.gain)

    def intervals(self) -> ScreenIntervals:
        return screen_intervals(self.x, self.W_enc, self.b_enc, b_dec=self.b_dec, prepared=self.prepared())


def rows_of(kind: str, n: int, d: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Rows [n, d] in float64 with a largest element of about 1."""
    rows = torch.randn(n, d, generator=g, dtype=torch.float64)
    number = torch.arange(n)
    if kind == "one_huge":
        rows[number, number % d] = 1e4
    elif kind == "one_hot":
        rows.zero_()[number, number % d] = torch.rand(n, generator=g).double() + 0.1
    elif kind == "equal_signs":
        rows = rows.abs()
    elif kind == "constant":
        rows = torch.rand(n, 1, generator=g).double().expand(n, d).clone()
    elif kind == "two_equal":  # the largest code of all
        rows.zero_()[number, number % d] = 1
        rows[number, (number + 1) % d] = -1
    elif kind == "half_codes":  # as much is lost in each dimension as can be
        rows = (torch.randint(1, 90, (n, d), generator=g).double() + 0.5) * rows.sign()
    elif kind == "subnormals":
        rows[:, 1:] *= torch.finfo(dtype).tiny / 4
    elif kind == "wide_range":
        rows *= torch.exp(12 * torch.randn(rows.shape, generator=g))
    return rows / rows.abs().amax(1, keepdim=True)


def scaled(rows: torch.Tensor, exponent: float, dtype: torch.dtype) -> torch.Tensor:
    """rows * 10^exponent, as large as the dtype goes at the most."""
    most = torch.finfo(dtype).max
    return (rows * 10.0**exponent).clamp(-most, most).to(dtype)


def _any_scale(chance: random.Random) -> float:
    return chance.choice((chance.uniform(-46, 38), chance.uniform(-3, 3), -46, 38, 0))


def random_problem(chance: random.Random, n: int, d: int, n_latents: int) -> Problem:
    """Any kind of rows and any scale of every input."""
    dtype = chance.choice(DTYPES)
    g = torch.Generator().manual_seed(chance.randrange(1 << 30))
    x = scaled(rows_of(chance.choice(ROWS), n, d, dtype, g), _any_scale(chance), dtype)
    weights = scaled(rows_of(chance.choice(ROWS), n_latents, d, dtype, g), _any_scale(chance), dtype)
    if chance.random() < 0.5:  # aligned: the largest sums there are
        weights[:n] = x.clamp(-(most := torch.finfo(dtype).max / 2), most)[:n_latents]
    b_enc = scaled(torch.randn(n_latents, generator=g).double(), _any_scale(chance), dtype)
    b_dec = scaled(torch.randn(d, generator=g).double(), _any_scale(chance), dtype) if chance.random() < 0.5 else None
    gain = None
    if chance.random() < 0.5:
        exponents = _any_scale(chance) + chance.uniform(0, 10) * torch.randn(n_latents, generator=g).double()
        gain = scaled(10.0**exponents, 0, dtype)
        gain[::17], gain[1::17] = 0, -gain[1::17]
    return Problem(x, weights.mT.contiguous(), b_enc, b_dec, gain)


def _fractions(vector: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in vector.tolist()]


def _rounded(value: Fraction, dtype: torch.dtype) -> float:
    try:
        wide = float(value)
    except OverflowError:
        wide = math.copysign(math.inf, value)
    single = torch.tensor(wide, dtype=torch.float64)
    return (single if dtype == torch.float64 else single.float().to(dtype)).item()


def pre_activation(problem: Problem, sum_: Fraction, latent: int) -> Fraction | float:
    """What is rounded last: the sum, or its rounding times the gain."""
    if problem.gain is None:
        return sum_
    h, gain = _rounded(sum_, problem.x.dtype), problem.gain[latent].item()
    return Fraction(h) * Fraction(gain) if math.isfinite(h) else h * gain


def _certainly_inside(problem: Problem, found: ScreenIntervals) -> torch.Tensor:
    """[N, F] by float64 sums and what they may be off by: all but a few, for which it takes rational numbers."""
    x, W, dtype = problem.x.double(), problem.W_enc.double(), problem.x.dtype
    x = x if problem.b_dec is None else x - problem.b_dec.double()
    sums = x @ W + problem.b_enc.double()
    off = 1e-15 * len(W) * (x.norm(dim=1)[:, None] * W.norm(dim=0) + problem.b_enc.double().abs()) + 1e-300
    ends = torch.stack([sums - off, sums + off])
    if problem.gain is not None:
        rounded = ends if dtype == torch.float64 else ends.float().to(dtype).double()
        ends = rounded * problem.gain.double()
    low, high = ends.amin(0) * (1 - 1e-15 * ends.amin(0).sign()), ends.amax(0) * (1 + 1e-15 * ends.amax(0).sign())
    return (found.lower.double() <= low) & (high <= found.upper.double())


def count_outside(problem: Problem) -> tuple[int, int]:
    """Pre-activations outside their interval, and those looked at (of latents and tokens that are screened)."""
    found = problem.intervals()
    unknown = (found.lower == -math.inf) & (found.upper == math.inf)
    looked_at = found.screened[:, None] & ~unknown
    x, W, b_enc = problem.x, problem.W_enc.mT, problem.b_enc
    centre = _fractions(problem.b_dec if problem.b_dec is not None else torch.zeros(x.shape[1]))
    outside = 0
    for token, latent in (looked_at & ~_certainly_inside(problem, found)).nonzero().tolist():
        products = zip(_fractions(x[token]), centre, _fractions(W[latent]), strict=True)
        sum_ = sum(((a - c) * w for a, c, w in products), Fraction(b_enc[latent].item()))
        value = pre_activation(problem, sum_, latent)
        outside += not found.lower[token, latent].item() <= value <= found.upper[token, latent].item()
    return outside, int(looked_at.sum())


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(mine.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0))


def screened_is_exact(problem: Problem, k: int) -> bool:
    """Whether both encoders give with codes what they give without."""
    prepared = problem.prepared()
    exact = without_codes(prepared)
    arguments = problem.x, problem.W_enc, problem.b_enc
    ours, theirs = (dm.topk_encode(*arguments, k, b_dec=problem.b_dec, prepared=p) for p in (prepared, exact))
    same = torch.equal(ours.indices, theirs.indices) and _same(ours.values, theirs.values)
    threshold = theirs.values.nan_to_num().median()
    ours, theirs = (
        dm.threshold_encode(*arguments, threshold, b_dec=problem.b_dec, prepared=p) for p in (prepared, exact)
    )
    same &= torch.equal(ours.crow_indices, theirs.crow_indices) and torch.equal(ours.col_indices, theirs.col_indices)
    return same and _same(ours.values, theirs.values)
