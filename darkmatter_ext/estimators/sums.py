"""The sums behind every regression of a measurement: they add up over batches, restarts and processes.

`LinearSums` holds, for predictors v (named blocks side by side, each token's v shifted by a fixed vector) and any number of
named targets y, the sums of v, v v^T, y, v y^T and y^2. From them `statistics` computes the centred statistics of
`least_squares.py` for any choice of blocks as predictors, and any targets, blocks, or affine functions of them, so no token
is read again for another regression. Targets share the Gram matrix of v, so a token costs p (p + q) multiply-adds.

Error. Sums are float64. Products of a batch are float64, or float32 (`products="float32"`, half the time or less; on GPUs
without fast float64 a small fraction of it) over at most PRODUCT_ROWS rows before they are added in float64. An entry of
a float32 product sum is then off by at most PRODUCT_ROWS 2^-24 |v_i| |y_j| in the worst case and by about
sqrt(PRODUCT_ROWS) 2^-24 / sqrt(batches) of it in practice, which leaves every R2 and FVU within 1e-5 of the float64 one
(stated; its tests measure below 5e-6 on ill-conditioned data). The shift ensures this: v stays near zero mean,
so nothing large cancels when the statistics are centred.

Shapes: n tokens, p predictors in total, q columns of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darkmatter_ext.estimators.least_squares import LinearMap, LinearStatistics
from darkmatter_ext.runtime.inputs import InputError

PRODUCTS = ("float64", "float32")
PRODUCT_ROWS = 4096  # rows of one float32 product: large enough for the matrix unit, small enough for the error above
Reduce = Callable[[Tensor], Tensor]  # in place over all processes, returns its argument


def as_columns(x: Tensor, products: str) -> Tensor:
    """x in the dtype used for products."""
    return x.double() if products == "float64" else x.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [p, q] += left^T right for left [n, p], right [n, q] in the dtype of products, added in float64."""
    if left.dtype == torch.float64:
        total += left.mT @ right
        return
    for a, b in zip(left.split(PRODUCT_ROWS), right.split(PRODUCT_ROWS), strict=True):
        total += a.mT @ b


def column_sums(x: Tensor) -> Tensor:
    """Sums over tokens [q] in float64."""
    return x.sum(0, dtype=torch.float64)


@dataclass
class LinearSums:
    """Sums over tokens of one role; see the module's docstring. Memory: 8 (p^2 + sum of p q) bytes."""

    blocks: dict[str, slice]  # name -> columns of v
    targets: dict[str, int]  # name -> q
    shift: Tensor  # [p] float64, subtracted from every token's v
    products: str = "float64"
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, blocks: Mapping[str, int], targets: Mapping[str, int], shift: Tensor, products: str = "float64"
    ) -> LinearSums:
        """Sums of no tokens yet. `blocks` and `targets` give the width of each.

        Raises ValueError for an unknown `products` or a shift of another width.
        """
        if products not in PRODUCTS:
            raise InputError(f"products: must be one of {', '.join(PRODUCTS)}, got {products!r}")
        columns, p = {}, 0
        for name, width in blocks.items():
            columns[name] = slice(p, p + width)
            p += width
        if list(shift.shape) != [p]:
            raise InputError(f"shift: must have shape [{p}], got {list(shift.shape)}")
        # float32 products need a shift that float32 holds exactly, because the same one is added back.
        shift = as_columns(shift, products).double()
        tensors: dict[str, tuple[int, ...]] = {"count": (1,), "v": (p,), "vv": (p, p)}
        for name, q in targets.items():
            tensors |= {f"y/{name}": (q,), f"vy/{name}": (p, q), f"yy/{name}": (q,)}
        zeros = {name: torch.zeros(shape, dtype=torch.float64, device=shift.device) for name, shape in tensors.items()}
        return cls(columns, dict(targets), shift, products, zeros)

    @property
    def count(self) -> int:
        return int(self.tensors["count"].item())

    def centred(self, x: Tensor, *others: Tensor) -> Tensor:
        """[n, p]: blocks side by side, shifted, in the dtype of products; the `v` of the methods below."""
        v = torch.cat([x, *others], dim=1) if others else x
        return as_columns(v, self.products) - as_columns(self.shift, self.products)

    def add_predictors(self, v: Tensor) -> None:
        """Add the tokens v [n, p] (see `centred`): each token once, before or after its targets.

        Raises ValueError if a value is NaN or infinite (one would silently make all results NaN).
        """
        sums = column_sums(v)
        _check_finite("x", sums, len(v))
        self.tensors["count"] += len(v)
        self.tensors["v"] += sums
        add_product(self.tensors["vv"], v, v)

    def add_target(self, name: str, v: Tensor, y: Tensor) -> None:
        """Add a target y [n, q] of the tokens v. Every target must be given the same tokens as `add_predictors`.

        Raises ValueError if a value is NaN or infinite.
        """
        y = as_columns(y, self.products)
        squares = column_sums(y.square())
        _check_finite(name, squares, len(y))
        self.tensors[f"y/{name}"] += column_sums(y)
        self.tensors[f"yy/{name}"] += squares
        add_product(self.tensors[f"vy/{name}"], v, y)

    @classmethod
    def merged(cls, parts: Sequence[LinearSums]) -> LinearSums:
        """The tokens of several sums with the same blocks and shift; a target's sums come from the parts that have it."""
        tensors: dict[str, Tensor] = {}
        targets: dict[str, int] = {}
        for part in parts:
            targets |= part.targets
            for name, tensor in part.tensors.items():
                tensors[name] = tensors[name] + tensor if name in tensors else tensor
        return cls(parts[0].blocks, targets, parts[0].shift, parts[0].products, tensors)

    def reduced(self, reduce: Reduce, *, targets: Sequence[str] | None = None) -> LinearSums:
        """The sums over all processes, for some of the targets (default: all); this process's sums are left unchanged."""
        wanted = list(self.targets) if targets is None else list(targets)
        names = ["count", "v", "vv", *(f"{part}/{name}" for name in wanted for part in ("y", "vy", "yy"))]
        tensors = {name: reduce(self.tensors[name].clone()) for name in names}
        kept = {name: self.targets[name] for name in wanted}
        return LinearSums(self.blocks, kept, self.shift, self.products, tensors)

    def _mean_and_columns(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean of v - shift [p], and the columns [k] of the named blocks."""
        parts = [torch.arange(self.blocks[name].start, self.blocks[name].stop) for name in names]
        return self.tensors["v"] / max(1, self.count), torch.cat(parts).to(self.shift.device)

    def statistics(self, predictors: Sequence[str], targets: Sequence[str]) -> LinearStatistics:
        """The centred statistics for a regression of targets (or blocks) on blocks, targets side by side.

        Raises KeyError for a name that is neither.
        """
        offset, p = self._mean_and_columns(predictors)
        mean, n = self.shift + offset, self.count
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # mean [q], moment with predictors [k, q], moment [q]
        for name in targets:
            if name in self.blocks:
                part = self.blocks[name]
                cross = self.tensors["vv"][p, part] - n * torch.outer(offset[p], offset[part])
                own = self.tensors["vv"].diagonal()[part] - n * offset[part].square()
                parts.append((mean[part], cross, own))
            else:
                mean_y = self.tensors[f"y/{name}"] / max(1, n)
                cross = self.tensors[f"vy/{name}"][p] - n * torch.outer(offset[p], mean_y)
                parts.append((mean_y, cross, self.tensors[f"yy/{name}"] - n * mean_y.square()))
        gram = self.tensors["vv"][p][:, p] - n * torch.outer(offset[p], offset[p])
        means, crosses, owns = zip(*parts, strict=True)
        return _as_statistics(n, mean[p], torch.cat(means), gram, torch.cat(crosses, dim=1), torch.cat(owns))

    def affine_statistics(
        self, predictors: Sequence[str], block: str, linear_map: LinearMap, *, subtract_from: str | None = None
    ) -> LinearStatistics:
        """Statistics for a regression of `linear_map(block)` on blocks, or of `subtract_from` - `linear_map(block)`.

        With block "x" and the map b* these are the linear error, and (subtracted from the error) the nonlinear one.
        """
        x = self.statistics(predictors, [block])
        own = self.statistics([block], [block])
        weight = linear_map.weight
        mean, cross = own.mean_y @ weight + linear_map.bias, x.moment_xy @ weight
        square = (weight * (own.moment_xx @ weight)).sum(0)
        if subtract_from is None:
            return _as_statistics(self.count, x.mean_x, mean, x.moment_xx, cross, square)
        y, y_block = self.statistics(predictors, [subtract_from]), self.statistics([block], [subtract_from])
        square = y.moment_yy - 2 * (weight * y_block.moment_xy).sum(0) + square
        return _as_statistics(self.count, x.mean_x, y.mean_y - mean, x.moment_xx, y.moment_xy - cross, square)


def _check_finite(name: str, sums: Tensor, n: int) -> None:
    if not bool(sums.isfinite().all()):
        raise InputError(f"{name}: must be finite, got NaN or infinity in a batch of {n} tokens")


def _as_statistics(n: int, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> LinearStatistics:
    """Moments as the statistics that `least_squares.py` solves and scores; a variance below rounding is zero, not negative."""
    statistics = LinearStatistics(0, 0, mean_x.device, count=n)
    statistics.n_predictors, statistics.n_targets = xy.shape
    statistics.mean_x, statistics.mean_y = mean_x, mean_y
    statistics.moment_xx, statistics.moment_xy, statistics.moment_yy = xx, xy, yy.clamp(min=0)
    return statistics


@dataclass
class TokenSums:
    """Sums of per-token quantities by token id: what the mean over a token's occurrences predicts (a baseline).

    Memory: 8 V (1 + K) bytes for a vocabulary of V and K quantities.
    """

    names: tuple[str, ...]
    counts: Tensor  # [V]
    sums: Tensor  # [V, K]

    @classmethod
    def empty(cls, names: Sequence[str], vocabulary: int, device: torch.device | str) -> TokenSums:
        options = {"dtype": torch.float64, "device": device}
        return cls(tuple(names), torch.zeros(vocabulary, **options), torch.zeros(vocabulary, len(names), **options))

    @classmethod
    def merged(cls, parts: Sequence[TokenSums]) -> TokenSums:
        """The tokens of several sums of the same quantities."""
        return cls(
            parts[0].names,
            torch.stack([part.counts for part in parts]).sum(0),
            torch.stack([part.sums for part in parts]).sum(0),
        )

    def add(self, token_ids: Tensor, values: Tensor) -> None:
        """token_ids [n] int64, values [n, K]."""
        self.counts += torch.bincount(token_ids, minlength=len(self.counts))
        self.sums.index_add_(0, token_ids, values.double())

    def reduced(self, reduce: Reduce) -> TokenSums:
        """The sums of all processes."""
        return TokenSums(self.names, reduce(self.counts.clone()), reduce(self.sums.clone()))

    @property
    def means(self) -> Tensor:
        """[V, K]: the means of every id; for one that never occurred, the overall mean."""
        overall = self.sums.sum(0) / self.counts.sum().clamp(min=1)
        return torch.where(self.counts[:, None] > 0, self.sums / self.counts.clamp(min=1)[:, None], overall)

    def r2_of_means(self, held_out: TokenSums, squares: Tensor) -> dict[str, float]:
        """R2, on held-out tokens, of predicting each quantity by its mean over these tokens with the same id.

        Args:
            held_out: the sums of the held-out tokens.
            squares: [K] sums of squares of the quantities over the held-out tokens.

        An id that never occurred here is predicted by the overall mean.
        """
        mean, n = self.means, held_out.counts[:, None]
        sse = squares - 2 * (mean * held_out.sums).sum(0) + (n * mean.square()).sum(0)
        sst = squares - held_out.sums.sum(0).square() / held_out.counts.sum().clamp(min=1)
        return dict(zip(self.names, torch.where(sst > 0, 1 - sse / sst, torch.nan).tolist(), strict=True))


@dataclass
class LatentSums:
    """How often each latent fired and the sum of its values."""

    fired: Tensor  # [F]
    values: Tensor  # [F]

    @classmethod
    def empty(cls, d_sae: int, device: torch.device | str) -> LatentSums:
        return cls(*(torch.zeros(d_sae, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, indices: Tensor, values: Tensor) -> None:
        """Add active latents of some tokens, in any order: indices [z] int64, values [z]."""
        kept = values > 0
        indices, values = indices[kept], values[kept].double()
        self.fired += torch.bincount(indices, minlength=len(self.fired))
        self.values += torch.bincount(indices, weights=values, minlength=len(self.values))

    def reduced(self, reduce: Reduce) -> LatentSums:
        """The sums of all processes."""
        return LatentSums(reduce(self.fired.clone()), reduce(self.values.clone()))

    @property
    def mean_active_value(self) -> Tensor:
        """[F]: mean value when active; NaN for a latent that never fired."""
        return torch.where(self.fired > 0, self.values / self.fired, torch.nan)
