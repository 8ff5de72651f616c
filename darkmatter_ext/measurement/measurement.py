"""What one pass over the tokens measures for every SAE of every site, and how to query it (`engine.py` does the work).

A *measurement* reads the contexts of a source in blocks. Each block goes through all SAEs and into sums (`estimators/sums.py`).
Every estimator is computed from these afterwards, without reading a token again: error vector test, norm prediction test,
FVU and its linear and nonlinear parts, predictors from other sites, baselines, mean latent values. The nonlinear error of a
token is known only once b* is, so tokens are read in two sweeps:

- `passes=2`, the paper's procedure: b* is fitted on the fit tokens in sweep 1; sweep 2 reads all tokens again, and the
  norm tests are fitted on the same fit tokens. Equal to `decompose.decompose_stream`.
- `passes=1`: every token is read and encoded once. Contexts are dealt into three roles: b* is fitted on the first part, the
  norm tests on the second, which b* has not seen, and everything is scored on the held-out rest.

What an experiment does with a measurement:

    measurement = engine.measure(source, saes, roles, folder=folder)           # {hook: SiteMeasurement}
    site = measurement["blocks.20.hook_resid_post"]
    site.decomposition("16k").numbers()                # FVU, FVU_nonlinear, R2, R2 of norms, L0 (scaling, norm-test)
    site.norm_map("16k", "error").weight               # a*: what the latents are compared with (latent-alignment)
    site.latents["16k"].mean_active_value              # [F]
    site.scalar_fit(["16k/error_norm"], ["65k/error_norm"]).r2     # per-token; also "loss", "x_norm", "16k/l0" (baselines)
    site.scalar_gain(["16k/error_norm"], ["16k/nonlinear_norm"], "65k/error_norm")  # what a second scalar adds, percent
    site.token_mean_r2()                               # baseline: the mean over a token's occurrences
    site.part_fit(["mlp"], "16k", "nonlinear").r2      # error, linear, nonlinear from other SAEs' outputs (earlier-layers)
    site.intervals("16k")["fvu"]                       # with 95 % intervals; also scalar_interval, part_interval
    read_tokens(site.per_token)                        # arrow table, one row per held-out token

Intervals: the held-out contexts are dealt into G groups whose Gram matrices are kept apart. Every score is a function of
sums over groups, so leaving out one group at a time (`intervals.jackknife`) needs no further reading. Intervals cover the
choice of held-out text; the maps are always those of the fit tokens.

At a site of transcoders, b* and a* are maps from what they read. FVU, errors and norms refer to what they write, and so
does `x` in the names.

Shapes: n tokens, d width of the site, S SAEs, p = d + widths of the predictors, G groups of held-out contexts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, jackknife
from darkmatter_ext.estimators.least_squares import LinearFit, LinearMap, LinearStatistics, SplitStatistics
from darkmatter_ext.estimators.sums import LatentSums, LinearSums, TokenSums
from darkmatter_ext.measurement import principal
from darkmatter_ext.measurement.decompose import Decomposition
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.settings import Regressions
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, NORM_FIT, LeftOut
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.encoders import Encoder

# Per SAE and token, squared norms first. The per-token figures regress the two unsquared norms.
WRITTEN = "written"  # at a site of transcoders, the target that holds what they write
SAE_SCALARS = ("sae", "error", "linear", "nonlinear", "sae_plus_nonlinear", "l0", "error_norm", "nonlinear_norm")


def scalar_names(saes: Sequence[str], *, loss: bool) -> tuple[str, ...]:
    """Names of the per-token scalars of a site, in order: those of x, the loss, then SAE_SCALARS of each SAE."""
    own = ("x", "x_norm", *(("loss",) if loss else ()))
    return (*own, *(f"{name}/{scalar}" for name in saes for scalar in SAE_SCALARS))


@dataclass
class SiteMeasurement:
    """What was measured at one site: the sums of all processes, and every estimator, computed from them on demand."""

    hook: str
    saes: dict[str, Encoder]
    maps: dict[str, LinearMap]  # SAE -> b*
    latents: dict[str, LatentSums]  # SAE -> firing of each latent on the fit and held-out tokens
    per_token: Path  # folder of the table of held-out tokens
    left_out: LeftOut
    typical_norm: float  # median over the first contexts
    regressions: Regressions  # on x
    _linear: dict[int, LinearSums]
    _scalars: dict[int, LinearSums]
    _groups: list[LinearSums]  # of held-out contexts
    _scalar_groups: list[LinearSums]
    _residuals: Tensor  # [G, S, 3, d] held-out: sums of the error, its square, the square of its nonlinear part
    _principal: Tensor  # [G, 2 + 2 S, M], see principal.py
    _token_means: dict[int, TokenSums]
    _extra: Tensor

    @property
    def _norm_fit(self) -> int:
        return NORM_FIT if NORM_FIT in self._linear else FIT

    @property
    def transcodes(self) -> bool:
        """Whether its SAEs write to another hook point than they read."""
        return WRITTEN in self._linear[HELD_OUT].targets

    @property
    def _explained(self) -> str:
        """The block or target whose variance is the denominator of FVU."""
        return WRITTEN if self.transcodes else "x"

    @property
    def width(self) -> int:
        """The width of what the SAEs reconstruct."""
        return next(iter(self.maps.values())).weight.shape[1]

    def written_fit(self) -> LinearFit:
        """Least squares from what transcoders read to what they write: the linear part of the layer they replace."""
        return self._fit(FIT, lambda sums: sums.statistics(["x"], [WRITTEN]))

    @property
    def n_fit(self) -> int:
        """The number of tokens b* is fitted on."""
        return self._linear[FIT].count

    @property
    def n_norm_fit(self) -> int:
        """The number of tokens the norm tests and scalar regressions are fitted on."""
        return self._linear[self._norm_fit].count

    @property
    def n_held_out(self) -> int:
        return self._linear[HELD_OUT].count

    def _fit(self, role: int, statistics: Callable[[LinearSums], LinearStatistics]) -> LinearFit:
        sides = (statistics(self._linear[role]), statistics(self._linear[HELD_OUT]))
        return SplitStatistics(*sides).fit(bias=self.regressions.bias)

    def error_fit(self, sae: str) -> LinearFit:
        """Error vector test: b* with its scores on fit and held-out tokens."""
        return self._fit(FIT, lambda sums: sums.statistics(["x"], [f"error/{sae}"]))

    def norm_fit(self, sae: str) -> LinearFit:
        """Norm prediction test: x -> squared norms, targets in the order of NORM_TARGETS."""
        return self._fit(self._norm_fit, lambda sums: sums.statistics(["x"], [f"norms/{sae}"]))

    def norm_map(self, sae: str, target: str) -> LinearMap:
        """The linear map [d, 1] from x to the squared norm of one of NORM_TARGETS (a* of the paper)."""
        number = NORM_TARGETS.index(target)
        return self.norm_fit(sae).map.targets(slice(number, number + 1))

    def part_fit(self, predictors: Sequence[str], sae: str, part: str) -> LinearFit:
        """Least squares from predictors (names of Predictor, or "x") to a part of the error, scored on held-out tokens.

        Args:
            part: "error", "linear" (b*.x) or "nonlinear" (error - b*.x).

        Raises ValueError for another part, KeyError for an unknown name.
        """
        return self._fit(FIT, self._part_statistics(predictors, sae, part))

    def _part_statistics(
        self, predictors: Sequence[str], sae: str, part: str
    ) -> Callable[[LinearSums], LinearStatistics]:
        error = f"error/{sae}"
        kinds: dict[str, Callable[[LinearSums], LinearStatistics]] = {
            "error": lambda sums: sums.statistics(predictors, [error]),
            "linear": lambda sums: sums.affine_statistics(predictors, "x", self.maps[sae]),
            "nonlinear": lambda sums: sums.affine_statistics(predictors, "x", self.maps[sae], subtract_from=error),
        }
        if part not in kinds:
            raise InputError(f"part: must be one of {', '.join(kinds)}, got {part!r}")
        return kinds[part]

    def n_columns(self, predictors: Sequence[str]) -> int:
        """The number of columns of these predictors side by side: the slopes of a regression on them."""
        blocks = self._linear[FIT].blocks
        return sum(blocks[name].stop - blocks[name].start for name in predictors)

    def part_interval(self, predictors: Sequence[str], sae: str, part: str) -> Interval:
        """R2 of `part_fit` with its interval. Raises as `part_fit` does; KeyError if measured without predictors."""
        fit = self.part_fit(predictors, sae, part)
        statistics = self._part_statistics(predictors, sae, part)
        return _r2_intervals(fit.map, map(statistics, self._groups), mean=True)[0]

    def scalar_fit(self, predictors: Sequence[str], targets: Sequence[str]) -> LinearFit:
        """Least squares between per-token scalars (see `scalar_names`), fitted and scored as the norm tests are."""
        train, test = (self._scalars[role].statistics(predictors, targets) for role in (self._norm_fit, HELD_OUT))
        return SplitStatistics(train, test).fit()

    def scalar_interval(self, predictors: Sequence[str], target: str) -> Interval:
        """R2 of `scalar_fit` for one target, with its interval."""
        fit = self.scalar_fit(predictors, [target])
        groups = (sums.statistics(predictors, [target]) for sums in self._scalar_groups)
        return _r2_intervals(fit.map, groups)[0]

    def scalar_gain(self, predictors: Sequence[str], more: Sequence[str], target: str) -> Interval:
        """What `more` scalars add to `predictors`: (R2' - R2) / (1 - R2) in percent, with its interval.

        That is 100 (1 - SSE' / SSE), the share of the remaining variance that the larger regression explains.
        """
        sets = [list(predictors), [*predictors, *more]]
        maps = [self.scalar_fit(names, [target]).map for names in sets]
        rows = []
        for sums in self._scalar_groups:
            count = torch.tensor([sums.count], dtype=torch.float64)
            pairs = zip(sets, maps, strict=True)
            rows.append(
                torch.cat([count, *(sums.statistics(names, [target]).score(own).sse.cpu() for names, own in pairs)])
            )
        return jackknife(_nonempty(rows), lambda sums: 100 * (1 - sums[..., 2:] / sums[..., 1:2]))[0]

    def token_mean(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean of "SAE/error", "SAE/linear" or "SAE/nonlinear" over the fit tokens of each id [V], and their number [V].

        An id without fit tokens gets the overall mean. Raises KeyError if measured without `token_means`.
        """
        sums = self._token_means[self._norm_fit]
        return sums.means[:, sums.names.index(name)].cpu(), sums.counts.long().cpu()

    @property
    def has_loss(self) -> bool:
        """Whether the source provided the model's loss."""
        return "loss" in self._scalars[HELD_OUT].blocks

    @property
    def has_token_means(self) -> bool:
        """Whether means over tokens were measured."""
        return bool(self._token_means)

    def token_mean_r2(self, *, in_sample: bool = False) -> dict[str, float]:
        """R2 of predicting squared norms by their mean over the token's occurrences: "SAE/error" and so on.

        `in_sample`: take means over all tokens and score on the same tokens, as the released code does. This flatters, most
        of all for rare tokens. Empty if measured without `token_means`.
        """
        if not self._token_means:
            return {}
        means = self._token_means[self._norm_fit]
        roles = [self._norm_fit, HELD_OUT] if in_sample else [HELD_OUT]
        scored = TokenSums.merged([self._token_means[role] for role in roles])
        squares = torch.zeros(len(scored.names), dtype=torch.float64, device=scored.sums.device)
        for scalars in (self._scalars[role] for role in roles):
            diagonal = scalars.tensors["vv"].diagonal()
            squares += torch.stack([diagonal[scalars.blocks[name]][0] for name in scored.names])
        return (scored if in_sample else means).r2_of_means(scored, squares)

    def l0(self, sae: str) -> float:
        """Mean active latents per held-out token; needs no regression."""
        return self._extra[list(self.saes).index(sae), 2].item() / self.n_held_out

    def decomposition(self, sae: str) -> Decomposition:
        """All numbers of an SAE, as from `decompose.decompose_stream`."""
        held_out = self._linear[HELD_OUT]
        error, norms = self.error_fit(sae), self.norm_fit(sae)
        scored = LinearSums.merged([self._linear[FIT], held_out]) if self.regressions.fvu_of_all else held_out
        variance = scored.statistics(["x"], [self._explained]).moment_yy.sum().item()
        squared_error = scored.tensors[f"yy/error/{sae}"].sum().item()
        unexplained = (
            scored.statistics(["x"], [f"error/{sae}"]).score(error.map).sse
            if self.regressions.fvu_of_all
            else error.test.sse
        )
        mean_norms = held_out.tensors[f"y/norms/{sae}"] / held_out.count
        relative, zero_tokens, _ = self._extra[list(self.saes).index(sae)].tolist()
        counted = held_out.count - zero_tokens
        return Decomposition(
            fvu=squared_error / variance if variance > 0 else float("nan"),
            fvu_nonlinear=unexplained.sum().item() / variance if variance > 0 else float("nan"),
            normalised_mse=relative / counted if counted else float("nan"),
            r2_vec=error.r2,
            r2_vec_train=error.train.mean_r2,
            r2_norm=dict(zip(NORM_TARGETS, norms.test.r2.tolist(), strict=True)),
            mean_squared_norm=dict(zip(NORM_TARGETS, mean_norms.tolist(), strict=True)),
            l0=self.l0(sae),
            n_train=self.n_fit,
            n_test=held_out.count,
            rank=error.map.rank,
            error_map=self.maps[sae],
        )

    def intervals(self, sae: str) -> dict[str, Interval]:
        """Intervals by the names of `decomposition(sae).numbers()`: fvu, fvu_nonlinear, linear_share, r2_vec, r2_norm/..."""
        found = dict(zip(ERROR_SCORES, jackknife(_nonempty(self._error_sums(sae)), _error_scores), strict=True))
        groups = (group.statistics(["x"], [f"norms/{sae}"]) for group in self._groups)
        norms = _r2_intervals(self.norm_fit(sae).map, groups)
        found |= {f"r2_norm/{name}": interval for name, interval in zip(NORM_TARGETS, norms, strict=True)}
        if (
            self.regressions.fvu_of_all or self.regressions.map_on_all
        ):  # these are scored on all tokens, or with a separate map: no group holds those sums
            numbers = self.decomposition(sae).numbers()
            found |= {name: Interval(numbers[name], *[float("nan")] * 2) for name in ERROR_SCORES}
        return found

    def _error_sums(self, sae: str) -> list[Tensor]:
        """Per group: tokens, squared norm and sum of x; sum and square of the error, and square of its nonlinear part."""
        number, rows = list(self.saes).index(sae), []
        for group, residuals in zip(self._groups, self._residuals[:, number], strict=True):
            x = group.statistics(["x"], [self._explained])
            square_x = (x.moment_yy + x.count * x.mean_y.square()).sum()
            head = [torch.tensor([x.count], dtype=torch.float64), square_x[None].cpu(), (x.count * x.mean_y).cpu()]
            rows.append(torch.cat([*head, residuals.flatten().cpu()]))
        return rows

    def without_top(self, sae: str, count: int) -> dict[str, Interval]:
        """fvu, fvu_nonlinear and linear_share of held-out tokens without the top `count` principal directions of x.

        Empty if that many are not kept: for transcoders, or at a width below 2 `count`.
        """
        if count > self._principal.shape[-1]:
            return {}
        at = 2 + 2 * list(self.saes).index(sae)
        errors = torch.stack(self._error_sums(sae))  # [G, 2 + 4 d]
        tops = torch.cat([self._principal[:, :2], self._principal[:, at : at + 2]], dim=1)  # [G, 4, M]
        width = errors.shape[1]

        def scores(sums: Tensor) -> Tensor:
            n, square_x = sums[..., 0], sums[..., 1]
            x, _, *squares = sums[..., 2:width].unflatten(-1, (4, -1)).unbind(-2)
            variance = square_x - x.square().sum(-1) / n
            totals = torch.stack([n, variance, *(part.sum(-1) for part in squares)], dim=-1)
            return principal.scores_without(totals, sums[..., width:].unflatten(-1, (4, -1)), count)

        rows = _nonempty(list(torch.cat([errors, tops.flatten(1)], dim=1)))
        return dict(zip(principal.SCORES, jackknife(rows, scores), strict=True))

    def contrast(self, weights: Mapping[str, float]) -> dict[str, Interval]:
        """A weighted sum over SAEs of each of ERROR_SCORES, with its interval on the same tokens (paired).

        {"wide": 1, "narrow": -1} is their difference: text that both find hard affects both scores and cancels.
        """
        sums = torch.stack([torch.stack(self._error_sums(sae)) for sae in weights], dim=1)  # [G, S, m]
        own, shape = torch.tensor(list(weights.values()), dtype=torch.float64), sums.shape[1:]

        def scores(totals: Tensor) -> Tensor:
            return (own[:, None] * _error_scores(totals.unflatten(-1, shape))).sum(-2)

        return dict(zip(ERROR_SCORES, jackknife(_nonempty(list(sums.flatten(1))), scores), strict=True))


@dataclass(frozen=True)
class SaeMeasurement:
    """What was measured for one SAE. Numbers are on held-out tokens."""

    name: str
    site: SiteMeasurement

    @functools.cached_property
    def decomposition(self) -> Decomposition:
        """All numbers, and b* as `error_map`."""
        return self.site.decomposition(self.name)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained by Sae(x)."""
        return self.decomposition.fvu

    @property
    def fvu_nonlinear(self) -> float:
        """What remains of the FVU once the linear error is explained too."""
        return self.decomposition.fvu_nonlinear

    @property
    def linear_share(self) -> float:
        """1 - FVU_nonlinear / FVU."""
        return self.decomposition.linear_share

    @property
    def r2_vec(self) -> float:
        """Error vector test: R2 of x -> SaeError(x), mean over dimensions."""
        return self.decomposition.r2_vec

    @property
    def r2_norm(self) -> dict[str, float]:
        """Norm prediction test: R2 of x -> squared norm, by the names of NORM_TARGETS."""
        return self.decomposition.r2_norm

    @property
    def l0(self) -> float:
        """Mean active latents per token."""
        return self.decomposition.l0

    def interval(self, quantity: str) -> Interval:
        """A number with its 95 % interval: "fvu", "fvu_nonlinear", "linear_share", "r2_vec", "r2_norm/error", ...

        Raises InputError for any other quantity.
        """
        found = self.site.intervals(self.name)
        if quantity not in found:
            raise InputError(f"quantity: must be one of {', '.join(found)}, got {quantity!r}")
        return found[quantity]

    def __repr__(self) -> str:
        return f"SaeMeasurement({self.name!r}, fvu={self.fvu:.4g}, fvu_nonlinear={self.fvu_nonlinear:.4g}, l0={self.l0:.4g})"


ERROR_SCORES = ("fvu", "fvu_nonlinear", "linear_share", "r2_vec")


def _nonempty(rows: Sequence[Tensor]) -> Tensor:
    """[G, m] the groups that have tokens; a row starts with their count."""
    kept = [row for row in rows if row[0] > 0]
    return torch.stack(kept or list(rows))


def _error_scores(sums: Tensor) -> Tensor:
    """FVU, FVU_nonlinear, linear share and R2 of the error vector from sums [..., 2 + 4 d] over groups."""
    n, square_x, sums = sums[..., 0], sums[..., 1], sums[..., 2:]
    x, error, square, nonlinear = sums.unflatten(-1, (4, -1)).unbind(-2)
    variance = square_x - x.square().sum(-1) / n
    fvu, fvu_nonlinear = (part.sum(-1) / variance for part in (square, nonlinear))
    total = square - error.square() / n[..., None]
    r2 = torch.where(total > 0, 1 - nonlinear / total, torch.nan).nanmean(-1)
    return torch.stack([fvu, fvu_nonlinear, 1 - fvu_nonlinear / fvu, r2], dim=-1)


def _r2_intervals(linear_map: LinearMap, groups: Iterable[LinearStatistics], *, mean: bool = False) -> list[Interval]:
    """R2 of a map on the tokens of all groups, per target or their mean (over those that vary), with intervals."""
    rows = []
    for group in groups:
        y, n = group.mean_y, group.count
        parts = [n * y, group.moment_yy + n * y.square(), group.score(linear_map).sse]
        rows.append(torch.cat([torch.tensor([n], dtype=torch.float64), *(part.cpu() for part in parts)]))

    def r2(sums: Tensor) -> Tensor:
        y, square, sse = sums[..., 1:].unflatten(-1, (3, -1)).unbind(-2)
        total = square - y.square() / sums[..., :1]
        found = torch.where(total > 0, 1 - sse / total, torch.nan)
        return found.nanmean(-1, keepdim=True) if mean else found

    return jackknife(_nonempty(rows), r2)
