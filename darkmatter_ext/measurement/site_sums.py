"""Everything that adds up at one site: sums by role, per-token scalars, and the tokens they are made from.

A site is one hook point, or two for transcoders: the one they read, on which errors are regressed, and the one they write,
of which errors are a part. There `x` is what is read and `y` what is written; for SAEs the two are the same.

Shapes: n tokens, d width of what is written, S SAEs, p = width of what is read + widths of the predictors, G groups of
held-out contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.estimators.sums import LatentSums, LinearSums, TokenSums
from darkmatter_ext.measurement import principal
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.measurement import SAE_SCALARS, WRITTEN, scalar_names
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.measurement.sweeps import Sweep
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT
from darkmatter_ext.saes.encoders import Encoder

SUMS_VERSION = 2  # version of what a state holds; a state from an older version of the package is not resumed
TOKEN_MEANS = ("error", "linear", "nonlinear")


class Piece(NamedTuple):
    """Tokens of one role in a block, at one site."""

    role: int
    group: int  # of held-out contexts
    x: dict[str, Tensor]  # hook point -> [n, d]: what SAEs and predictors read, and what SAEs write
    tokens: Tensor  # [n] int64
    contexts: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    loss: Tensor | None  # [n]


@dataclass
class SiteSums:
    """Everything that adds up at one site, by role if roles differ."""

    hook: str  # the site's name
    saes: tuple[Encoder, ...]
    predictors: tuple[Encoder, ...]
    linear: dict[int, LinearSums]  # of all roles but HELD_OUT
    scalars: dict[int, LinearSums]
    # Held-out tokens by group. Errors are large, [p, d] per SAE: without predictors, the first group holds those of all.
    groups: list[LinearSums]
    scalar_groups: list[LinearSums]
    residuals: Tensor  # [G, S, 3, d] held-out: sums of the error, its square, the square of its nonlinear part
    principal: Tensor  # [G, 2 + 2 S, M] held-out: see principal.py; M = 0 at a site of transcoders
    token_means: dict[int, TokenSums]
    latents: dict[str, LatentSums]
    extra: Tensor  # [S, 3] held-out: sum of ||e||^2 / ||x||^2, tokens with ||x|| = 0, sum of L0
    left_out: Tensor  # [3] tokens left out by each rule, in the order of LeftOut

    @classmethod
    def empty(
        cls,
        hook: str,
        saes: tuple[Encoder, ...],
        predictors: tuple[Encoder, ...],
        pilot: Tensor,
        widths: Mapping[str, int],
        d: int,
        sweeps: Sequence[Sweep],
        settings: Measure,
        *,
        loss: bool,
        vocabulary: int,
    ) -> SiteSums:
        """Empty sums.

        Args:
            pilot: [n, p] x and the predictors' outputs at some tokens; the sums are shifted by their mean.
            widths: columns of x and of each predictor, by name, in that order.
            d: width of what is written.
            loss: whether the source provides the model's loss.
            vocabulary: number of token ids, for means over tokens; 0: none are kept.
        """
        shift, device = pilot.double().mean(0), pilot.device
        errors = {f"error/{sae.name}": d for sae in saes}
        written = {WRITTEN: d} if transcodes(saes) else {}
        norms = {f"norms/{sae.name}": len(NORM_TARGETS) for sae in saes}
        counted, with_errors, with_norms = (
            frozenset().union(*(getattr(sweep, kind) for sweep in sweeps)) for kind in ("counted", "errors", "norms")
        )
        products, n_groups = settings.products, settings.interval_groups

        def linear(targets: dict[str, int]) -> LinearSums:
            return LinearSums.empty(widths, targets | written, shift, products)

        names = scalar_names([sae.name for sae in saes], loss=loss)
        zero = torch.zeros(len(names), dtype=torch.float64, device=device)
        means = [f"{sae.name}/{part}" for sae in saes for part in TOKEN_MEANS]
        mean_roles = sorted(with_norms) if vocabulary else ()
        return cls(
            hook=hook,
            saes=saes,
            predictors=predictors,
            linear={
                role: linear((errors if role in with_errors else {}) | (norms if role in with_norms else {}))
                for role in sorted(counted - {HELD_OUT})
            },
            scalars={
                role: LinearSums.empty(dict.fromkeys(names, 1), {}, zero) for role in sorted(with_norms - {HELD_OUT})
            },
            groups=[linear((errors if predictors or not number else {}) | norms) for number in range(n_groups)],
            scalar_groups=[LinearSums.empty(dict.fromkeys(names, 1), {}, zero) for _ in range(n_groups)],
            residuals=torch.zeros(n_groups, len(saes), 3, d, dtype=torch.float64, device=device),
            principal=principal.empty(n_groups, len(saes), 0 if transcodes(saes) else d, device),
            token_means={role: TokenSums.empty(means, vocabulary, device) for role in mean_roles},
            latents={sae.name: LatentSums.empty(sae.d_sae, device) for sae in saes},
            extra=torch.zeros(len(saes), 3, dtype=torch.float64, device=device),
            left_out=torch.zeros(3, dtype=torch.float64),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, not copied."""
        named = {"extra": self.extra, "left_out": self.left_out, "residuals": self.residuals}
        named["principal"] = self.principal
        named["shift"] = self.linear[FIT].shift  # the same for all roles
        held_out = dict(enumerate(self.groups)), dict(enumerate(self.scalar_groups))
        kinds = (
            ("linear", self.linear),
            ("scalars", self.scalars),
            ("group", held_out[0]),
            ("scalar_group", held_out[1]),
        )
        for kind, every in kinds:
            for key, sums in every.items():
                named |= {f"{kind}/{key}/{name}": tensor for name, tensor in sums.tensors.items()}
        for role, sums in self.token_means.items():
            named |= {f"token_means/{role}/counts": sums.counts, f"token_means/{role}/sums": sums.sums}
        for name, sums in self.latents.items():
            named |= {f"latents/{name}/fired": sums.fired, f"latents/{name}/values": sums.values}
        return named

    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[f"{self.hook}/{name}"])
        for sums in (*self.linear.values(), *self.groups):
            sums.shift.copy_(saved[f"{self.hook}/shift"])

    @property
    def transcodes(self) -> bool:
        """Whether its SAEs write another hook point than they read."""
        return transcodes(self.saes)

    @property
    def writes(self) -> str:
        """The hook point that its SAEs write."""
        return self.saes[0].writes

    def read(self, x: Mapping[str, Tensor]) -> Tensor:
        """[n, p'] what errors are regressed on."""
        return what_is_read(self.saes, x)

    def linear_of(self, piece: Piece) -> LinearSums:
        return self.groups[piece.group] if piece.role == HELD_OUT else self.linear[piece.role]

    def errors_of(self, piece: Piece) -> LinearSums:
        """Where errors are added: see `groups`."""
        return self.groups[0] if piece.role == HELD_OUT and not self.predictors else self.linear_of(piece)

    def scalars_of(self, piece: Piece) -> LinearSums:
        return self.scalar_groups[piece.group] if piece.role == HELD_OUT else self.scalars[piece.role]


def transcodes(saes: Sequence[Encoder]) -> bool:
    """Whether the SAEs of a site write another hook point than they read."""
    return saes[0].writes not in saes[0].reads


def what_is_read(saes: Sequence[Encoder], x: Mapping[str, Tensor]) -> Tensor:
    """[n, p'] what the errors of a site's SAEs are regressed on: what SAEs reconstruct, or all that transcoders read."""
    if not transcodes(saes):
        return x[saes[0].writes]
    reads = [x[hook] for hook in saes[0].reads]
    return reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)


@dataclass
class Scalars:
    """The per-token scalars of some tokens, filled SAE by SAE."""

    values: Tensor  # [n, K] float64, columns of `scalar_names`
    first: int  # column of the first SAE

    @classmethod
    def of(cls, site: SiteSums, x: Tensor, loss: Tensor | None) -> Scalars:
        names = scalar_names([sae.name for sae in site.saes], loss=loss is not None)
        values = torch.zeros(len(x), len(names), dtype=torch.float64, device=x.device)
        if loss is not None:
            values[:, names.index("loss")] = loss.to(x.device)
        return cls(values, names.index(f"{site.saes[0].name}/{SAE_SCALARS[0]}"))

    def add(self, number: int, rows: slice, norms: Tensor, l0: Tensor) -> None:
        """Add SAE `number`: squared norms [n, 6] in the order of NORM_TARGETS, l0 [n]."""
        at = self.first + number * len(SAE_SCALARS)
        own = self.values[rows]
        own[:, 0], own[:, 1] = norms[:, 0], norms[:, 0].sqrt()
        own[:, at : at + 5], own[:, at + 5] = norms[:, 1:], l0
        own[:, at + 6], own[:, at + 7] = norms[:, 2].sqrt(), norms[:, 4].sqrt()
