"""The pass itself: blocks of contexts from a source through all SAEs into sums, resumable, in any number of processes.

`measurement.py` says what is measured and how it is read, `sweeps.py` which context is read when. Memory: the SAEs' weights,
8 (p^2 + S p d) bytes of sums a role, 8 p^2 for each further group of held-out contexts (with predictors 8 (p^2 + S p d)), one
block of activations; nothing grows with the tokens. Cost a token and SAE: one encode and decode a reading, p d
multiply-adds for the errors, d^2 for b* applied to them; p^2 for the Gram matrix all SAEs of a site share.

Shapes: n tokens, d width of the site, S SAEs, p = d + widths of the predictors.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import ContextBatch, Source
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.estimators.sums import LatentSums, LinearSums, Reduce, TokenSums, as_columns, column_sums
from darkmatter_ext.measurement.error import NORM_TARGETS, norm_targets, sae_error, varies
from darkmatter_ext.measurement.measurement import (
    NORM_FIT,
    SAE_SCALARS,
    MeasuredSae,
    MeasureSettings,
    Predictor,
    SiteMeasurement,
    scalar_names,
)
from darkmatter_ext.measurement.selection import FIT, HELD_OUT, UNUSED, kept_positions
from darkmatter_ext.measurement.sweeps import Sweep, context_groups, context_roles, sweeps
from darkmatter_ext.measurement.token_table import TokenTable
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.processes import Processes
from darkmatter_ext.saes.encoders import Encoded, Encoder

TABLE_SCALARS = ("sae", "error", "linear", "nonlinear", "l0")  # of SAE_SCALARS, what the table of tokens keeps
TOKEN_MEANS = ("error", "linear", "nonlinear")
PILOT_CONTEXTS = 16  # read first: the shift of the sums and the typical norm come from them


class _Piece(NamedTuple):
    """Tokens of one role of a block at one site."""

    role: int
    group: int  # of held-out contexts
    x: dict[str, Tensor]  # hook point -> [n, d]: the site's own and those its predictors read
    tokens: Tensor  # [n] int64
    contexts: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    loss: Tensor | None  # [n]


@dataclass
class _Rack:
    """Encoders: as many stay loaded as fit the budget, the others are loaded when their turn comes."""

    budget: float
    _loaded: dict[int, Encoder] = field(default_factory=dict)
    _bytes: float = 0.0

    def encoder(self, sae: MeasuredSae) -> Encoder:
        if id(sae) in self._loaded:
            return self._loaded[id(sae)]
        encode = sae.load()
        if self.budget <= 0 or self._bytes + sae.weight_bytes <= self.budget:
            self._loaded[id(sae)] = encode
            self._bytes += sae.weight_bytes
        return encode


@dataclass
class _SiteSums:
    """Everything that adds up at one site, by role where roles differ."""

    hook: str
    saes: tuple[MeasuredSae, ...]
    predictors: tuple[Predictor, ...]
    typical_norm: float
    linear: dict[int, LinearSums]  # of the roles that are not held out
    scalars: dict[int, LinearSums]
    # Held-out tokens by group. Errors are large, [p, d] an SAE: without predictors the first has those of all groups.
    groups: list[LinearSums]
    scalar_groups: list[LinearSums]
    residuals: Tensor  # [G, S, 3, d] held-out: sums of the error, its square, the square of its nonlinear part
    token_means: dict[int, TokenSums]
    latents: dict[str, LatentSums]
    extra: Tensor  # [S, 3] held-out: sum of ||e||^2 / ||x||^2, tokens with ||x|| = 0, sum of L0
    left_out: Tensor  # [3] tokens left out by position, for what they are, by norm

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, not copied."""
        named = {"extra": self.extra, "left_out": self.left_out, "residuals": self.residuals}
        named["shift"] = self.linear[FIT].shift  # one for all roles
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

    def linear_of(self, piece: _Piece) -> LinearSums:
        return self.groups[piece.group] if piece.role == HELD_OUT else self.linear[piece.role]

    def errors_of(self, piece: _Piece) -> LinearSums:
        """Where errors are added: see `groups`."""
        return self.groups[0] if piece.role == HELD_OUT and not self.predictors else self.linear_of(piece)

    def scalars_of(self, piece: _Piece) -> LinearSums:
        return self.scalar_groups[piece.group] if piece.role == HELD_OUT else self.scalars[piece.role]


@dataclass
class _Scalars:
    """The per-token scalars of some tokens, filled SAE by SAE."""

    values: Tensor  # [n, K] float64, columns of `scalar_names`
    first: int  # column of the first SAE

    @classmethod
    def of(cls, site: _SiteSums, x: Tensor, loss: Tensor | None) -> _Scalars:
        names = scalar_names([sae.name for sae in site.saes], loss=loss is not None)
        values = torch.zeros(len(x), len(names), dtype=torch.float64, device=x.device)
        if loss is not None:
            values[:, names.index("loss")] = loss.to(x.device)
        return cls(values, names.index(f"{site.saes[0].name}/{SAE_SCALARS[0]}"))

    def add(self, number: int, rows: slice, norms: Tensor, l0: Tensor) -> None:
        """Of SAE `number`: squared norms [n, 6] in the order of NORM_TARGETS, l0 [n]."""
        at = self.first + number * len(SAE_SCALARS)
        own = self.values[rows]
        own[:, 0], own[:, 1] = norms[:, 0], norms[:, 0].sqrt()
        own[:, at : at + 5], own[:, at + 5] = norms[:, 1:], l0
        own[:, at + 6], own[:, at + 7] = norms[:, 2].sqrt(), norms[:, 4].sqrt()


def _rows(x: Tensor, chosen: Tensor, device: str) -> Tensor:
    """[n, d] the chosen tokens of x [c, L, d] on the device, float32 or better."""
    rows = x.flatten(0, 1) if bool(chosen.all()) else x[chosen.to(x.device)]
    return rows.to(device, torch.float64 if x.dtype == torch.float64 else torch.float32)


class _Engine:
    """One measurement in progress in one process."""

    def __init__(
        self,
        source: Source,
        saes: Sequence[MeasuredSae],
        predictors: Mapping[str, Sequence[Predictor]],
        settings: MeasureSettings,
        processes: Processes,
        checkpoint: CheckpointFolder,
    ) -> None:
        self.source, self.settings, self.processes, self.checkpoint = source, settings, processes, checkpoint
        self.device = processes.device
        self.rack = _Rack(settings.sae_memory)
        self.roles = context_roles(source.documents, settings)
        self.groups = context_groups(source.documents, self.roles, settings)
        self.sweeps = sweeps(self.roles, settings)
        held_out = (
            self.sweeps[1].contexts if settings.split == "tokens" else (self.roles == HELD_OUT).nonzero().flatten()
        )
        self.in_table = torch.as_tensor(held_out)[: settings.table_contexts or None]
        pilot = source.read(list(range(min(PILOT_CONTEXTS, source.n_contexts))))
        self.has_loss = pilot.loss is not None
        self.sites = {
            hook: self._site(
                pilot, hook, tuple(sae for sae in saes if sae.hook == hook), tuple(predictors.get(hook, ()))
            )
            for hook in dict.fromkeys(sae.hook for sae in saes)
        }
        self.tables = {hook: TokenTable(checkpoint.folder / "per_token" / hook, processes.rank) for hook in self.sites}
        self.maps: dict[str, dict[str, LinearMap]] = {}
        self.applied: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    # ---- the start: what the first contexts say, empty sums

    def _site(
        self, pilot: ContextBatch, hook: str, saes: tuple[MeasuredSae, ...], predictors: tuple[Predictor, ...]
    ) -> _SiteSums:
        norms = pilot.activations[hook].float().norm(dim=-1).cpu()
        kept = self._kept_positions(pilot).expand_as(norms) & ~self._excluded(pilot)
        typical = norms[kept].median().item() if bool(kept.any()) else 0.0
        usable = kept & self._usual(norms, typical)
        if not bool(usable.any()):
            raise InputError(self._nothing_left(norms.shape[1]))
        x = {name: _rows(pilot.activations[name], usable, self.device) for name in self._read_hooks(hook, predictors)}
        outputs = [self._outputs(predictor, x) for predictor in predictors]
        shift = torch.cat([x[hook], *outputs], dim=1).double().mean(0)
        d = x[hook].shape[1]
        blocks = {"x": d} | {p.name: z.shape[1] for p, z in zip(predictors, outputs, strict=True)}
        errors = {f"error/{sae.name}": d for sae in saes}
        norm_targets_ = {f"norms/{sae.name}": len(NORM_TARGETS) for sae in saes}
        counted = frozenset().union(*(sweep.counted for sweep in self.sweeps))
        with_errors = frozenset().union(*(sweep.errors for sweep in self.sweeps))
        with_norms = frozenset().union(*(sweep.norms for sweep in self.sweeps))
        products, n_groups = self.settings.products, self.settings.interval_groups
        linear = {
            role: LinearSums.empty(
                blocks,
                (errors if role in with_errors else {}) | (norm_targets_ if role in with_norms else {}),
                shift,
                products,
            )
            for role in sorted(counted - {HELD_OUT})
        }
        groups = [
            LinearSums.empty(blocks, (errors if predictors or not number else {}) | norm_targets_, shift, products)
            for number in range(n_groups)
        ]
        names = scalar_names([sae.name for sae in saes], loss=self.has_loss)
        zero = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        columns = dict.fromkeys(names, 1)
        scalars = {role: LinearSums.empty(columns, {}, zero) for role in sorted(with_norms - {HELD_OUT})}
        scalar_groups = [LinearSums.empty(columns, {}, zero) for _ in range(n_groups)]
        residuals = torch.zeros(n_groups, len(saes), 3, d, dtype=torch.float64, device=self.device)
        means = [f"{sae.name}/{part}" for sae in saes for part in TOKEN_MEANS]
        vocabulary = self.settings.token_means
        token_means = {
            role: TokenSums.empty(means, vocabulary, self.device) for role in (sorted(with_norms) if vocabulary else ())
        }
        latents = {sae.name: LatentSums.empty(sae.d_sae, self.device) for sae in saes}
        extra = torch.zeros(len(saes), 3, dtype=torch.float64, device=self.device)
        left_out = torch.zeros(3, dtype=torch.float64)
        return _SiteSums(
            hook,
            saes,
            predictors,
            typical,
            linear,
            scalars,
            groups,
            scalar_groups,
            residuals,
            token_means,
            latents,
            extra,
            left_out,
        )

    def _nothing_left(self, length: int) -> str:
        settings = self.settings
        cut = f" within {slice(*settings.positions)}" if settings.positions else ""
        special = f" and {len(settings.excluded_tokens)} special tokens" if settings.excluded_tokens else ""
        return (
            "drop_positions, max_norm_ratio: must leave tokens to measure, got "
            f"{settings.drop_positions} of contexts of {length}{cut} and {settings.max_norm_ratio:g}{special}"
        )

    def _read_hooks(self, hook: str, predictors: Sequence[Predictor]) -> list[str]:
        return list(dict.fromkeys([hook, *(predictor.sae.hook for predictor in predictors)]))

    def _kept_positions(self, batch: ContextBatch) -> Tensor:
        """[L] bool: positions that are measured."""
        length = batch.tokens.shape[1]
        kept = torch.zeros(length, dtype=torch.bool)
        kept[kept_positions(length, positions=self.settings.positions, first=self.settings.drop_positions)] = True
        if batch.loss is not None or self.settings.parity == "released-code":
            kept[-1] = False  # the last token has no next one to predict; the released code never keeps it
        return kept

    def _excluded(self, batch: ContextBatch) -> Tensor:
        """[c, L] bool: tokens that are left out for what they are."""
        return torch.isin(batch.tokens, torch.tensor(self.settings.excluded_tokens, dtype=batch.tokens.dtype))

    def _usual(self, norms: Tensor, typical: float) -> Tensor:
        ratio = self.settings.max_norm_ratio
        return norms <= ratio * typical if ratio > 0 else torch.ones_like(norms, dtype=torch.bool)

    def _outputs(self, predictor: Predictor, x: Mapping[str, Tensor]) -> Tensor:
        """[n, d'] what the predictor's SAE makes of its own site's activations."""
        encode, given = self.rack.encoder(predictor.sae), x[predictor.sae.hook]
        return torch.cat([encode(part).x_hat for part in given.split(self.settings.batch_tokens)])

    # ---- the sweeps

    def run(self, advance: Callable[[int], None]) -> dict[str, SiteMeasurement]:
        """Both sweeps from where the checkpoint is, then the results."""
        saved = self.checkpoint.load()
        sweep_now, blocks_now = 0, 0
        if saved is not None:
            tensors, state = saved
            for site in self.sites.values():
                site.load(tensors)
                site.typical_norm = state["typical_norms"][site.hook]
            sweep_now, blocks_now = state["sweep"], state["blocks"]
        for hook, table in self.tables.items():
            table.resume(0 if saved is None else saved[1]["parts"][hook])
        for number, sweep in enumerate(self.sweeps):
            if number >= sweep_now:
                self._sweep(number, sweep, blocks_now if number == sweep_now else 0, advance)
            if number == 0:  # in every process and after every restart, so that all take part in the sums
                self.maps = {hook: self._error_maps(site) for hook, site in self.sites.items()}
                self.applied = {hook: self._on_shifted(site) for hook, site in self.sites.items()}
        return {hook: self._result(site) for hook, site in self.sites.items()}

    def _blocks(self, sweep: Sweep) -> list[list[int]]:
        size, contexts = self.settings.block_contexts, torch.tensor(sweep.contexts)
        blocks: list[list[int]] = []
        for role in (FIT, NORM_FIT, HELD_OUT):  # a block has one role and group, so that its tokens need not be sorted
            own = contexts[self.roles[contexts] == role]
            for group in self.groups[own].unique().tolist():
                blocks += [part.tolist() for part in own[self.groups[own] == group].split(size)]
        return self.processes.share(blocks)

    def _sweep(self, number: int, sweep: Sweep, done: int, advance: Callable[[int], None]) -> None:
        blocks, last = self._blocks(sweep), time.monotonic()
        length = self.source.context_length
        advance(length * sum(len(block) for block in blocks[:done]))
        for position in range(done, len(blocks)):
            batch = self.source.read(blocks[position])
            for site in self.sites.values():
                for piece in self._pieces(batch, site, sweep):
                    self._add(site, piece, sweep)
            advance(batch.tokens.numel())
            if time.monotonic() - last >= self.settings.checkpoint_seconds:
                self._save(number, position + 1)
                last = time.monotonic()
        self._save(number + 1, 0)

    def _save(self, sweep: int, blocks: int) -> None:
        for table in self.tables.values():
            table.flush()
        tensors = {
            f"{hook}/{name}": tensor for hook, site in self.sites.items() for name, tensor in site.tensors().items()
        }
        state = {
            "sweep": sweep,
            "blocks": blocks,
            "parts": {hook: table.n_parts for hook, table in self.tables.items()},
            "typical_norms": {hook: site.typical_norm for hook, site in self.sites.items()},
        }
        self.checkpoint.save(tensors, state)

    def _pieces(self, batch: ContextBatch, site: _SiteSums, sweep: Sweep) -> Iterator[_Piece]:
        """The measured tokens of a block at a site, by role."""
        own = batch.activations[site.hook]
        in_place = self._kept_positions(batch).expand(own.shape[:2])
        kept = in_place & ~self._excluded(batch)
        used = kept & self._usual(own.float().norm(dim=-1).cpu(), site.typical_norm)
        if sweep.counted:
            site.left_out += torch.tensor([(~in_place).sum(), (in_place & ~kept).sum(), (kept & ~used).sum()])
        numbers = torch.tensor(batch.numbers)
        if self.settings.split == "tokens":
            roles = torch.stack([self._token_roles(number, own.shape[1]) for number in batch.numbers])
        else:
            roles = self.roles[numbers][:, None].expand(own.shape[:2])
        roles = torch.where(used, roles, UNUSED)
        grid_contexts = numbers[:, None].expand(own.shape[:2])
        grid_positions = torch.arange(own.shape[1]).expand(own.shape[:2])
        hooks = self._read_hooks(site.hook, site.predictors)
        for role in roles.unique().tolist():
            if role == UNUSED:
                continue
            chosen = roles == role
            yield _Piece(
                role,
                int(self.groups[batch.numbers[0]]),
                {hook: _rows(batch.activations[hook], chosen, self.device) for hook in hooks},
                batch.tokens[chosen],
                grid_contexts[chosen],
                grid_positions[chosen],
                None if batch.loss is None else batch.loss[chosen],
            )

    def _token_roles(self, context: int, length: int) -> Tensor:
        """[L] roles by token: the same in every process, sweep and restart."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + context)
        fit = torch.rand(length, generator=generator) < self.settings.fit_fraction
        return torch.where(fit, FIT, HELD_OUT)

    def _add(self, site: _SiteSums, piece: _Piece, sweep: Sweep) -> None:
        """Run the tokens of a piece through everything the sweep wants of their role."""
        sums, errors, x = site.linear_of(piece), site.errors_of(piece), piece.x[site.hook]
        others = [self._outputs(predictor, piece.x) for predictor in site.predictors]
        v = sums.centred(x, *others)
        if piece.role in sweep.counted:
            sums.add_predictors(v)
        scalars = _Scalars.of(site, x, piece.loss) if piece.role in sweep.norms else None
        for number, sae in enumerate(site.saes):
            encode = self.rack.encoder(sae)
            for start in range(0, len(x), self.settings.batch_tokens):
                part = slice(start, start + self.settings.batch_tokens)
                encoded = encode(x[part])
                error = sae_error(x[part], encoded.x_hat)
                if piece.role in sweep.errors:
                    errors.add_target(f"error/{sae.name}", v[part], error)
                    self._add_once(site, number, piece.role, x[part], error, encoded)
                if scalars is not None:
                    weight, bias = self.applied[site.hook][sae.name]
                    linear = v[part, : x.shape[1]] @ weight + bias
                    norms = norm_targets(x[part], encoded.x_hat, linear, dtype=linear.dtype)
                    scalars.add(number, part, norms, encoded.l0)
                    sums.add_target(f"norms/{sae.name}", v[part], norms)
                    if piece.role == HELD_OUT:
                        rest = error.to(linear.dtype) - linear
                        columns = (error, error.double().square(), rest.double().square())
                        site.residuals[piece.group, number] += torch.stack([column_sums(part) for part in columns])
            del encode  # an SAE that is not kept goes before the next one comes
        if scalars is not None:
            self._add_scalars(site, piece, scalars)

    def _add_once(self, site: _SiteSums, number: int, role: int, x: Tensor, error: Tensor, encoded: Encoded) -> None:
        """What needs the encoder and no b*: latents of all tokens; relative error and L0 of held-out ones."""
        acts = encoded.acts
        site.latents[site.saes[number].name].add(
            (acts.col_indices if acts.is_ragged else acts.indices).flatten(), acts.values.flatten()
        )
        if role == HELD_OUT:
            square, size = (vector.double().square().sum(-1) for vector in (error, x))
            nonzero = size > 0
            row = [(square[nonzero] / size[nonzero]).sum(), (~nonzero).sum(), encoded.l0.double().sum()]
            site.extra[number] += torch.stack([value.double() for value in row])

    def _add_scalars(self, site: _SiteSums, piece: _Piece, scalars: _Scalars) -> None:
        columns = scalars.values  # [n, K]
        sums = site.scalars_of(piece)
        sums.add_predictors(columns)
        names = list(sums.blocks)
        if site.token_means:
            means = site.token_means[piece.role]
            means.add(piece.tokens.to(self.device), columns[:, [names.index(name) for name in means.names]])
        if piece.role == HELD_OUT:
            rows = torch.isin(piece.contexts, self.in_table)
            kept = ["x", *(["loss"] if self.has_loss else [])]
            kept += [f"{sae.name}/{scalar}" for sae in site.saes for scalar in TABLE_SCALARS]
            table = {name: columns[rows, names.index(name)].float() for name in kept}
            table |= {name: table[name].int() for name in kept if name.endswith("/l0")}
            places = {"context": piece.contexts, "position": piece.positions, "token": piece.tokens}
            places["group"] = torch.full_like(
                piece.contexts, piece.group
            )  # as the intervals of `measurement.py` have it
            table |= {name: column[rows].int() for name, column in places.items()}
            self.tables[site.hook].add(table)

    # ---- the results

    def _error_maps(self, site: _SiteSums) -> dict[str, LinearMap]:
        """b* of every SAE from the fit tokens of all processes; one SAE's sums are copied at a time."""
        maps, released = {}, self.settings.parity == "released-code"
        parts = [site.linear[FIT], *(site.groups if released else ())]
        x = site.linear[FIT].reduced(self.processes.sum, targets=[]).statistics(["x"], ["x"])
        if not varies(x.moment_yy.sum().item(), x.mean_x, x.count):
            raise InputError(f"activations: must vary over the fit tokens, got a constant at {site.hook}")
        for sae in site.saes:
            name = f"error/{sae.name}"
            total = LinearSums.merged(
                [part.reduced(self.processes.sum, targets=[name] if name in part.targets else []) for part in parts]
            )
            statistics = total.statistics(["x"], [name])
            maps[sae.name] = (statistics.about_zero() if released else statistics).solve()
        return maps

    def _on_shifted(self, site: _SiteSums) -> dict[str, tuple[Tensor, Tensor]]:
        """b* as weight and bias for x - shift, in the dtype of products: nothing large cancels in float32."""
        applied = {}
        for name, b_star in self.maps[site.hook].items():
            shift = site.linear[FIT].shift[: len(b_star.weight)]
            both = (b_star.weight, b_star.bias + shift @ b_star.weight)
            applied[name] = tuple(as_columns(tensor, self.settings.products) for tensor in both)
        return applied

    def _result(self, site: _SiteSums) -> SiteMeasurement:
        reduce: Reduce = self.processes.sum
        left_out = reduce(site.left_out.to(self.device, copy=True)).tolist()
        extra = reduce(site.extra.clone())
        groups = [sums.reduced(reduce) for sums in site.groups]
        scalar_groups = [sums.reduced(reduce) for sums in site.scalar_groups]
        self.processes.wait()  # every part of the table is written
        return SiteMeasurement(
            hook=site.hook,
            saes={sae.name: sae for sae in site.saes},
            maps=self.maps[site.hook],
            latents={name: sums.reduced(reduce) for name, sums in site.latents.items()},
            per_token=self.tables[site.hook].folder,
            left_out_by_position=int(left_out[0]),
            left_out_by_token=int(left_out[1]),
            left_out_by_norm=int(left_out[2]),
            typical_norm=site.typical_norm,
            released=self.settings.parity == "released-code",
            _linear={role: sums.reduced(reduce) for role, sums in site.linear.items()}
            | {HELD_OUT: LinearSums.merged(groups)},
            _scalars={role: sums.reduced(reduce) for role, sums in site.scalars.items()}
            | {HELD_OUT: LinearSums.merged(scalar_groups)},
            _groups=groups,
            _scalar_groups=scalar_groups,
            _residuals=reduce(site.residuals.clone()),
            _token_means={role: sums.reduced(reduce) for role, sums in site.token_means.items()},
            _extra=extra.cpu(),
        )


@torch.no_grad()
def measure(
    source: Source,
    saes: Sequence[MeasuredSae],
    settings: MeasureSettings,
    *,
    folder: Path,
    predictors: Mapping[str, Sequence[Predictor]] | None = None,
    processes: Processes | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SiteMeasurement]:
    """Measure every SAE of every site in one pass (or the paper's two).

    Args:
        source: activations; every process must have the same.
        saes: SAEs, of any number of sites the source reads; names are unique within a site.
        folder: for checkpoints and the per-token table. A run that was stopped goes on from here; a finished one gives its
            result at once.
        predictors: site -> SAEs of other hook points whose outputs join x as predictors.
        processes: of `distributed.processes`; default alone.
        config: what else the result depends on; a folder begun with another is refused.
        progress: called with the number of tokens read.

    Returns:
        hook point -> SiteMeasurement, the same in every process.

    Raises:
        ValueError: no SAE, an empty side of the split, NaN or infinity, a folder of another configuration.
        RuntimeError: damaged checkpoint or source. OSError: a folder that cannot be written; what was saved is kept.
    """
    if not saes:
        raise InputError("saes: must name at least one SAE, got none")
    everything = {
        **dataclasses.asdict(settings),
        "saes": [[sae.name, sae.hook, sae.d_sae] for sae in saes],
        "predictors": {hook: [predictor.name for predictor in own] for hook, own in (predictors or {}).items()},
        "contexts": [source.n_contexts, source.context_length, source.identity],
        **(config or {}),
    }
    # When a state is written and which SAEs stay loaded does not change the result.
    del everything["checkpoint_seconds"], everything["sae_memory"]
    own = processes or Processes()
    checkpoint = CheckpointFolder(folder, own.rank, own.size)
    if own.is_first:
        checkpoint.start(everything)
    own.wait()
    checkpoint.start(everything)
    engine = _Engine(source, saes, predictors or {}, settings, own, checkpoint)
    return engine.run(progress or (lambda _tokens: None))


def tokens_to_read(source: Source, settings: MeasureSettings) -> int:
    """Tokens all processes read together, over all sweeps: the total of a progress bar."""
    return source.context_length * source.n_contexts * settings.passes
