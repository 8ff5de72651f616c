"""Streaming linear least squares from sufficient statistics.

No tokens are kept, only counts, means and *centred* second moments (Gram and cross-Gram matrices)
in float64, updated batch by batch and merged across parts by the pairwise formula of Chan, Golub and LeVeque (1983).
Centring costs one rank-1 correction per batch and avoids the cancellation that raw sums of squares suffer when a mean is
large compared with its spread, as in some residual-stream dimensions. Any number of processes can each hold a part.

Shapes: n tokens, p predictors, q targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError

# Directions with less than this share of the largest variance (predictors scaled to unit variance) carry no
# information in float64 statistics: p * eps with p up to ~4500.
RELATIVE_RANK_TOLERANCE = 1e-12


@dataclass(frozen=True)
class LinearMap:
    """y = x @ weight + bias, the least-squares solution, all float64."""

    weight: Tensor  # [p, q]
    bias: Tensor  # [q]
    rank: int  # directions of x used by the solution; rank < p means x was rank deficient
    n_tokens: int  # tokens it was fitted on

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [..., q] for x [..., p], computed in float64."""
        return x.double() @ self.weight + self.bias

    def targets(self, part: slice) -> LinearMap:
        """The map restricted to some of the targets."""
        return LinearMap(self.weight[:, part], self.bias[part], self.rank, self.n_tokens)


@dataclass(frozen=True)
class LinearScore:
    """How well a LinearMap predicts the tokens of given statistics, per target."""

    sse: Tensor  # [q] sum of squared residuals
    sst: Tensor  # [q] sum of squares about the mean of these tokens
    n_tokens: int

    def targets(self, part: slice) -> LinearScore:
        """The score on some of the targets."""
        return LinearScore(self.sse[part], self.sst[part], self.n_tokens)

    @property
    def r2(self) -> Tensor:
        """[q] 1 - SSE / SST; NaN for a target that does not vary."""
        return torch.where(self.sst > 0, 1 - self.sse / self.sst, torch.nan)

    @property
    def mean_r2(self) -> float:
        """Mean of R2 over the targets that vary (the paper's R2 of a vector)."""
        return self.r2[self.sst > 0].mean().item()  # the mean of an empty tensor is NaN


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise InputError(f"{name}: must have shape [n, features], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: must be a floating-point tensor, got {tensor.dtype}")
    if len(x) != len(y):
        raise InputError(f"y: must have as many rows as x ({len(x)}), got {len(y)}")


@dataclass
class LinearStatistics:
    """Sufficient statistics for the regression of y on x: `update` with batches, `merge` parts, then `solve`.

    Memory: 8 (p^2 + p q) bytes, whatever the number of tokens. Cost: p (p + q) multiply-adds per token.
    """

    n_predictors: int
    n_targets: int
    device: torch.device | str = "cpu"
    count: int = 0
    mean_x: Tensor = field(init=False)  # [p]
    mean_y: Tensor = field(init=False)  # [q]
    moment_xx: Tensor = field(init=False)  # [p, p] sum of (x - mean)(x - mean)^T
    moment_xy: Tensor = field(init=False)  # [p, q]
    moment_yy: Tensor = field(init=False)  # [q] sum of (y - mean)^2

    def __post_init__(self) -> None:
        p, q = self.n_predictors, self.n_targets
        shapes = {"mean_x": (p,), "mean_y": (q,), "moment_xx": (p, p), "moment_xy": (p, q), "moment_yy": (q,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=self.device))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: x [n, p], y [n, q], any floating dtype, n may be 0.

        Raises TypeError / ValueError on wrong types or shapes, ValueError if a value is NaN or infinite (one such
        token would silently turn every later result into NaN). The statistics are then unchanged.
        """
        _check_pair(x, y)
        for name, tensor, width in (("x", x, self.n_predictors), ("y", y, self.n_targets)):
            if tensor.shape[1] != width:
                raise InputError(f"{name}: must have {width} columns, got {tensor.shape[1]}")
        if len(x) == 0:
            return
        batch = LinearStatistics(self.n_predictors, self.n_targets, self.device)
        x, y = x.to(self.device, torch.float64), y.to(self.device, torch.float64)
        batch.count, batch.mean_x, batch.mean_y = len(x), x.mean(0), y.mean(0)
        x, y = x - batch.mean_x, y - batch.mean_y
        batch.moment_xx, batch.moment_xy, batch.moment_yy = x.mT @ x, x.mT @ y, y.square().sum(0)
        for name, moment in (("x", batch.moment_xx.diagonal()), ("y", batch.moment_yy)):
            if not bool(moment.isfinite().all()):
                raise InputError(f"{name}: must be finite, got NaN or infinity in a batch of {batch.count} tokens")
        self.merge(batch)

    @torch.no_grad()
    def merge(self, other: LinearStatistics) -> None:
        """Add the tokens of another part (Chan, Golub, LeVeque 1983): the result equals one pass over both.

        Raises ValueError if the shapes differ.
        """
        mine, theirs = (self.n_predictors, self.n_targets), (other.n_predictors, other.n_targets)
        if mine != theirs:
            raise InputError(f"other: must have (predictors, targets) {mine}, got {theirs}")
        total = self.count + other.count
        if other.count == 0:
            return
        share = other.count / total
        delta_x, delta_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        scale = self.count * share  # n_a n_b / (n_a + n_b)
        self.moment_xx += other.moment_xx + scale * torch.outer(delta_x, delta_x)
        self.moment_xy += other.moment_xy + scale * torch.outer(delta_x, delta_y)
        self.moment_yy += other.moment_yy + scale * delta_y.square()
        self.mean_x += share * delta_x
        self.mean_y += share * delta_y
        self.count = total

    @torch.no_grad()
    def solve(self) -> LinearMap:
        """The least-squares map with bias. Cost: one Cholesky factorisation of [p, p], or one eigendecomposition
        if x is rank deficient (then the minimum-norm solution in predictors scaled to unit variance).

        Raises ValueError with fewer than two tokens.
        """
        if self.count < 2:
            raise InputError(f"x: a linear fit needs at least 2 tokens, got {self.count}")
        scale = self.moment_xx.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        correlation = self.moment_xx / torch.outer(
            scale, scale
        )  # unit diagonal: best conditioned of the diagonal scalings
        target = self.moment_xy / scale[:, None]
        weight, rank = _solve_symmetric(correlation, target)
        weight = weight / scale[:, None]
        return LinearMap(weight, self.mean_y - self.mean_x @ weight, rank, self.count)

    def about_zero(self) -> LinearStatistics:
        """The same tokens with moments about zero instead of the mean: `solve` then fits without a bias."""
        n, x, y = self.count, self.mean_x, self.mean_y
        found = LinearStatistics(self.n_predictors, self.n_targets, self.device, count=n)
        found.moment_xx = self.moment_xx + n * torch.outer(x, x)
        found.moment_xy = self.moment_xy + n * torch.outer(x, y)
        found.moment_yy = self.moment_yy + n * y.square()
        return found

    @torch.no_grad()
    def score(self, linear_map: LinearMap) -> LinearScore:
        """Residual and total sums of squares of *these* tokens under a map fitted on any tokens.

        SSE = Myy - 2 W.Mxy + W.Mxx W + n (mean residual)^2, from the statistics alone. The absolute error is about
        1e-15 of SST, so an R2 closer to 1 than that is rounding.
        """
        weight = linear_map.weight
        offset = self.mean_y - self.mean_x @ weight - linear_map.bias  # [q] mean residual
        quadratic = (weight * (self.moment_xx @ weight)).sum(0)
        cross = (weight * self.moment_xy).sum(0)
        sse = self.moment_yy - 2 * cross + quadratic + self.count * offset.square()
        return LinearScore(sse.clamp(min=0), self.moment_yy.clone(), self.count)


def lstsq(matrix: Tensor, target: Tensor) -> Tensor:
    """The least squares solution [p, q] of matrix [n, p] @ solution = target [n, q], on the CPU the one of least norm.

    torch's default there, gelsy, starts from uninitialised pivots (pytorch issues 71222 and 187411): its bits differ from
    call to call, and of a matrix without full rank it may find a wrong rank. On CUDA torch has gels alone, for full rank.
    """
    return torch.linalg.lstsq(matrix, target, driver="gelsd" if matrix.is_cpu else None).solution


def _solve_symmetric(matrix: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Solve matrix @ w = target for a positive semi-definite matrix with unit diagonal; returns w and the rank."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # The squared smallest pivot bounds the smallest eigenvalue from above: a cheap test for rank deficiency.
    if not bool(failed) and bool(factor.diagonal().square().min() > 1e3 * RELATIVE_RANK_TOLERANCE):
        return torch.cholesky_solve(target, factor), len(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > RELATIVE_RANK_TOLERANCE * values.max().clamp(min=0)
    values, vectors = values[keep], vectors[:, keep]
    return vectors @ ((vectors.mT @ target) / values[:, None]), int(keep.sum())


@dataclass(frozen=True)
class LinearFit:
    """A linear map fitted on the train tokens, with its scores on both sides of the split."""

    map: LinearMap
    train: LinearScore
    test: LinearScore

    def targets(self, part: slice) -> LinearFit:
        """The fit for some of the targets: regressions that share x are solved together and separated here."""
        return LinearFit(self.map.targets(part), self.train.targets(part), self.test.targets(part))

    @property
    def r2(self) -> float:
        """Held-out R2, mean over the targets."""
        return self.test.mean_r2


@dataclass
class SplitStatistics:
    """Train and test statistics side by side."""

    train: LinearStatistics
    test: LinearStatistics

    @classmethod
    def empty(cls, n_predictors: int, n_targets: int, device: torch.device | str = "cpu") -> SplitStatistics:
        return cls(*(LinearStatistics(n_predictors, n_targets, device) for _ in range(2)))

    def update(self, x: Tensor, y: Tensor, train: Tensor) -> None:
        """Add a batch: x [n, p], y [n, q], train [n] bool."""
        if train.dtype != torch.bool or train.shape != x.shape[:1]:
            raise InputError(f"train: must be bool of shape [{len(x)}], got {train.dtype} {list(train.shape)}")
        self.train.update(x[train], y[train])
        self.test.update(x[~train], y[~train])

    def fit(self, *, bias: bool = True) -> LinearFit:
        """Solve on the train tokens, score on both sides. Raises ValueError if either side has fewer than 2 tokens."""
        if self.test.count < 2:
            raise InputError(f"train: must leave at least 2 tokens held out, got {self.test.count}")
        solution = (self.train if bias else self.train.about_zero()).solve()
        return LinearFit(solution, self.train.score(solution), self.test.score(solution))


def train_mask(groups: Tensor, *, fraction: float, seed: int) -> Tensor:
    """A seeded split that keeps groups whole: bool [n], True for train, given the group number of each token [n].

    With `groups = arange(n)` this is the paper's random token split; with the context or document number of each
    token, no context or document is on both sides. `fraction` is the share of *groups* assigned to train.

    Raises ValueError if a side would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction: must be between 0 and 1, got {fraction}")
    names, inverse = groups.unique(return_inverse=True)
    n_train = round(fraction * len(names))
    if not 0 < n_train < len(names):
        raise InputError(f"fraction: must leave groups on both sides, got {fraction} of {len(names)} groups")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(names), dtype=torch.bool)
    chosen[order[:n_train]] = True
    return chosen[inverse]


def fit_linear(
    x: Tensor | Iterable[tuple[Tensor, Tensor, Tensor]],
    y: Tensor | None = None,
    *,
    train: Tensor | None = None,
    train_fraction: float = 0.6,
    groups: Tensor | None = None,
    seed: int = 0,
) -> LinearFit:
    """Least squares from x to y with bias, fitted on train tokens and scored on held-out ones.

    Args:
        x: predictors [n, p]; or an iterable of batches (x, y, train) for data that does not fit in memory.
        y: targets [n, q] (only with the tensor form).
        train: bool [n], which tokens to fit on. Default: a seeded random split.
        train_fraction: share of tokens (or groups) to fit on if `train` is not given; the paper uses 0.61.
        groups: int [n], e.g. the context of each token; a group is never split.
        seed: for the random split.

    Returns:
        LinearFit: `.map` (weight [p, q], bias [q]), `.r2` (held-out, mean over targets), `.test.r2` [q], `.train`.

    Raises:
        TypeError, ValueError: one line naming the argument, the rule and the value given.

    Cost: n p (p + q) multiply-adds in float64 and 16 (p^2 + p q) bytes. Equals `torch.linalg.lstsq` on the centred
    matrix up to rounding. This is the method of the error vector test in Engels et al., 2410.14670, section 4.
    """
    if not isinstance(x, Tensor):
        return _fit_batches(x)
    if y is None:
        raise TypeError("y: must be given when x is a tensor, got None")
    _check_pair(x, y)
    if train is None:
        groups = torch.arange(len(x)) if groups is None else groups
        train = train_mask(groups, fraction=train_fraction, seed=seed)
    statistics = SplitStatistics.empty(x.shape[1], y.shape[1], x.device)
    statistics.update(x, y, train.to(x.device))
    return statistics.fit()


def _fit_batches(batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> LinearFit:
    statistics: SplitStatistics | None = None
    for x, y, train in batches:
        _check_pair(x, y)
        if statistics is None:
            statistics = SplitStatistics.empty(x.shape[1], y.shape[1], x.device)
        statistics.update(x, y, train)
    if statistics is None:
        raise InputError("x: must yield at least one batch, got none")
    return statistics.fit()
