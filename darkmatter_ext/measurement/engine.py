"""The pass itself: blocks of contexts from a source through all SAEs into sums, resumable, in any number of processes.

`measurement.py` defines what is measured and how it is read, `sweeps.py` which context is read when. Memory: the SAEs'
weights; 8 (p^2 + S p d) bytes of sums per role; 8 p^2 for each further group of held-out contexts (8 (p^2 + S p d) with
predictors); one block of activations. Nothing grows with the number of tokens. Cost per token and SAE: one encode and decode
per reading, p d multiply-adds for the errors, d^2 to apply b*; p^2 for the Gram matrix that all SAEs of a site share.

Shapes: n tokens, d width of the site, S SAEs, p = d + widths of the predictors.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import ContextBatch, Source
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.estimators.sums import LinearSums, Reduce, as_columns, column_sums
from darkmatter_ext.measurement import principal
from darkmatter_ext.measurement.error import norm_targets, sae_error, varies
from darkmatter_ext.measurement.measurement import WRITTEN, SiteMeasurement
from darkmatter_ext.measurement.settings import Measure, Regressions
from darkmatter_ext.measurement.site_sums import SUMS_VERSION, Piece, Scalars, SiteSums, transcodes, what_is_read
from darkmatter_ext.measurement.sweeps import Sweep, sweeps
from darkmatter_ext.measurement.token_table import TokenTable
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, NORM_FIT, UNUSED, LeftOut, TokenRoles
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.processes import Processes
from darkmatter_ext.saes.encoders import Encoded, Encoder, Inputs

TABLE_SCALARS = ("sae", "error", "linear", "nonlinear", "l0")  # those of SAE_SCALARS that the table of tokens keeps
Encode = Callable[[Inputs], Encoded]


@dataclass
class _Rack:
    """Encoders. As many as fit the budget stay loaded; the others are loaded when their turn comes."""

    budget: float
    _loaded: dict[int, Encode] = field(default_factory=dict)
    _bytes: float = 0.0

    def encoder(self, sae: Encoder) -> Encode:
        if id(sae) in self._loaded:
            return self._loaded[id(sae)]
        encode = sae.load()
        if self.budget <= 0 or self._bytes + sae.weight_bytes <= self.budget:
            self._loaded[id(sae)] = encode
            self._bytes += sae.weight_bytes
        return encode


def _rows(x: Tensor, chosen: Tensor, device: str) -> Tensor:
    """The chosen tokens of x [c, L, d] as [n, d] on the device, in float32 or better."""
    rows = x.flatten(0, 1) if bool(chosen.all()) else x[chosen.to(x.device)]
    return rows.to(device, torch.float64 if x.dtype == torch.float64 else torch.float32)


class _Engine:
    """One measurement in progress in one process."""

    def __init__(
        self,
        source: Source,
        saes: Sequence[Encoder],
        predictors: Mapping[str, Sequence[Encoder]],
        roles: TokenRoles,
        processes: Processes,
        checkpoint: CheckpointFolder,
        regressions: Regressions,
    ) -> None:
        self.regressions = regressions
        self.source, self.roles, self.settings = source, roles, roles.settings
        self.processes, self.checkpoint, self.device = processes, checkpoint, processes.device
        self.rack = _Rack(self.settings.sae_memory_gb * 1e9)
        self.sweeps = sweeps(roles)
        by_token = self.settings.split == "tokens"
        held_out = self.sweeps[1].contexts if by_token else (roles.contexts == HELD_OUT).nonzero().flatten()
        self.in_table = torch.as_tensor(held_out)[: self.settings.table_contexts or None]
        self.has_loss = roles.pilot.loss is not None
        self.sites = {
            site: self._site(site, tuple(sae for sae in saes if sae.site == site), tuple(predictors.get(site, ())))
            for site in dict.fromkeys(sae.site for sae in saes)
        }
        self.tables = {hook: TokenTable(checkpoint.folder / "per_token" / hook, processes.rank) for hook in self.sites}
        self.maps: dict[str, dict[str, LinearMap]] = {}
        self.applied: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.directions: dict[str, Tensor] = {}  # [d, M], see principal.py

    # ---- the start: empty sums, shifted by the mean of the first contexts

    def _site(self, hook: str, saes: tuple[Encoder, ...], predictors: tuple[Encoder, ...]) -> SiteSums:
        pilot = self.roles.pilot
        used = self.roles.of(pilot, *_own_hooks(saes))[0] != UNUSED
        x = {name: _rows(pilot.activations[name], used, self.device) for name in _read_hooks(saes, predictors)}
        outputs = [self._outputs(predictor, x) for predictor in predictors]
        own = what_is_read(saes, x)
        widths = {"x": own.shape[1]} | {p.name: z.shape[1] for p, z in zip(predictors, outputs, strict=True)}
        return SiteSums.empty(
            hook,
            saes,
            predictors,
            torch.cat([own, *outputs], dim=1),
            widths,
            x[saes[0].writes].shape[1],
            self.sweeps,
            self.settings,
            loss=self.has_loss,
            vocabulary=1 + self.source.largest_token if self.settings.token_means else 0,
        )

    def _outputs(self, predictor: Encoder, x: Mapping[str, Tensor]) -> Tensor:
        """[n, d'] the predictor SAE's output on the activations of its own site."""
        encode = self.rack.encoder(predictor)
        return torch.cat([encode(given).x_hat for _, given in self._parts(predictor, x)])

    def _parts(self, sae: Encoder, x: Mapping[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The tokens' slices and what an SAE reads there, batch_tokens at a time."""
        for start in range(0, len(x[sae.reads[0]]), self.settings.batch_tokens):
            part = slice(start, start + self.settings.batch_tokens)
            yield part, {hook: x[hook][part] for hook in sae.reads}

    # ---- the sweeps

    def run(self, advance: Callable[[int], None]) -> dict[str, SiteMeasurement]:
        """Run both sweeps, starting from the checkpoint, then compute the results."""
        saved = self.checkpoint.load()
        sweep_now, blocks_now = 0, 0
        if saved is not None:
            tensors, state = saved
            for site in self.sites.values():
                site.load(tensors)
            self.roles.typical_norm.update(state["typical_norms"])
            sweep_now, blocks_now = state["sweep"], state["blocks"]
        for hook, table in self.tables.items():
            table.resume(0 if saved is None else saved[1]["parts"][hook])
        for number, sweep in enumerate(self.sweeps):
            if number >= sweep_now:
                self._sweep(number, sweep, blocks_now if number == sweep_now else 0, advance)
            if number == 0:  # in every process and after every restart, because the sums need all processes
                self.maps = {hook: self._error_maps(site) for hook, site in self.sites.items()}
                self.applied = {hook: self._on_shifted(site) for hook, site in self.sites.items()}
        return {hook: self._result(site) for hook, site in self.sites.items()}

    def _blocks(self, sweep: Sweep) -> list[list[int]]:
        size, contexts = self.settings.block_contexts, torch.tensor(sweep.contexts)
        blocks: list[list[int]] = []
        for role in (FIT, NORM_FIT, HELD_OUT):  # a block has one role and one group, so its tokens need no sorting
            own = contexts[self.roles.contexts[contexts] == role]
            for group in self.roles.groups[own].unique().tolist():
                blocks += [part.tolist() for part in own[self.roles.groups[own] == group].split(size)]
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
            "typical_norms": self.roles.typical_norm,
        }
        self.checkpoint.save(tensors, state)

    def _pieces(self, batch: ContextBatch, site: SiteSums, sweep: Sweep) -> Iterator[Piece]:
        """The measured tokens of a block at a site, by role."""
        roles, left_out = self.roles.of(batch, *_own_hooks(site.saes))
        if sweep.counted:
            site.left_out += torch.tensor(dataclasses.astuple(left_out))
        contexts = torch.tensor(batch.numbers)[:, None].expand(roles.shape)
        positions = torch.arange(roles.shape[1]).expand(roles.shape)
        hooks = _read_hooks(site.saes, site.predictors)
        for role in roles.unique().tolist():
            if role == UNUSED:
                continue
            chosen = roles == role
            yield Piece(
                role=role,
                group=int(self.roles.groups[batch.numbers[0]]),
                x={hook: _rows(batch.activations[hook], chosen, self.device) for hook in hooks},
                tokens=batch.tokens[chosen],
                contexts=contexts[chosen],
                positions=positions[chosen],
                loss=None if batch.loss is None else batch.loss[chosen],
            )

    def _add(self, site: SiteSums, piece: Piece, sweep: Sweep) -> None:
        """Run the tokens of a piece through everything the sweep does with their role."""
        sums, errors, x, y = site.linear_of(piece), site.errors_of(piece), site.read(piece.x), piece.x[site.writes]
        others = [self._outputs(predictor, piece.x) for predictor in site.predictors]
        v = sums.centred(x, *others)
        if piece.role in sweep.counted:
            sums.add_predictors(v)
            if site.transcodes:
                sums.add_target(WRITTEN, v, y)
        scalars = Scalars.of(site, y, piece.loss) if piece.role in sweep.norms else None
        for number, sae in enumerate(site.saes):
            encode = self.rack.encoder(sae)
            for part, given in self._parts(sae, piece.x):
                encoded = encode(given)
                error = sae_error(y[part], encoded.x_hat)
                if piece.role in sweep.errors:
                    errors.add_target(f"error/{sae.name}", v[part], error)
                    self._add_once(site, number, piece.role, y[part], error, encoded)
                if scalars is not None:
                    weight, bias = self.applied[site.hook][sae.name]
                    linear = v[part, : x.shape[1]] @ weight + bias
                    norms = norm_targets(y[part], encoded.x_hat, linear, dtype=linear.dtype)
                    scalars.add(number, part, norms, encoded.l0)
                    sums.add_target(f"norms/{sae.name}", v[part], norms)
                    if piece.role == HELD_OUT:
                        rest = error.to(linear.dtype) - linear
                        columns = (error, error.double().square(), rest.double().square())
                        site.residuals[piece.group, number] += torch.stack([column_sums(part) for part in columns])
                        if not site.transcodes:
                            tops = self.directions[site.hook]
                            principal.add_errors(site.principal[piece.group], number, tops, error.to(rest.dtype), rest)
            del encode  # free an SAE that is not kept before loading the next
        if scalars is not None:
            self._add_scalars(site, piece, scalars)
            if piece.role == HELD_OUT and not site.transcodes:
                principal.add_x(site.principal[piece.group], self.directions[site.hook], v[:, : x.shape[1]])

    def _add_once(self, site: SiteSums, number: int, role: int, x: Tensor, error: Tensor, encoded: Encoded) -> None:
        """Add what needs the encoder but not b*: latents of all tokens; relative error and L0 of held-out tokens."""
        acts = encoded.acts
        site.latents[site.saes[number].name].add(
            (acts.col_indices if acts.is_ragged else acts.indices).flatten(), acts.values.flatten()
        )
        if role == HELD_OUT:
            square, size = (vector.double().square().sum(-1) for vector in (error, x))
            nonzero = size > 0
            row = [(square[nonzero] / size[nonzero]).sum(), (~nonzero).sum(), encoded.l0.double().sum()]
            site.extra[number] += torch.stack([value.double() for value in row])

    def _add_scalars(self, site: SiteSums, piece: Piece, scalars: Scalars) -> None:
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
            places["group"] = torch.full_like(piece.contexts, piece.group)  # as in the intervals of `measurement.py`
            table |= {name: column[rows].int() for name, column in places.items()}
            self.tables[site.hook].add(table)

    # ---- the results

    def _error_maps(self, site: SiteSums) -> dict[str, LinearMap]:
        """b* of every SAE, from the fit tokens of all processes; the sums of one SAE are copied at a time."""
        maps = {}
        parts = [site.linear[FIT], *(site.groups if self.regressions.map_on_all else ())]
        for name in ("x", WRITTEN) if site.transcodes else ("x",):
            wanted = [name] if name == WRITTEN else []
            x = site.linear[FIT].reduced(self.processes.sum, targets=wanted).statistics(["x"], [name])
            if not varies(x.moment_yy.sum().item(), x.mean_y, x.count):
                raise InputError(f"activations: must vary over the fit tokens, got a constant at {site.hook}")
            if not site.transcodes:
                self.directions[site.hook] = principal.top_directions(x)
        for sae in site.saes:
            name = f"error/{sae.name}"
            total = LinearSums.merged(
                [part.reduced(self.processes.sum, targets=[name] if name in part.targets else []) for part in parts]
            )
            statistics = total.statistics(["x"], [name])
            maps[sae.name] = (statistics if self.regressions.bias else statistics.about_zero()).solve()
        return maps

    def _on_shifted(self, site: SiteSums) -> dict[str, tuple[Tensor, Tensor]]:
        """b* as weight and bias for x - shift, in the dtype of products: nothing large cancels in float32."""
        applied = {}
        for name, b_star in self.maps[site.hook].items():
            shift = site.linear[FIT].shift[: len(b_star.weight)]
            both = (b_star.weight, b_star.bias + shift @ b_star.weight)
            applied[name] = tuple(as_columns(tensor, self.settings.products) for tensor in both)
        return applied

    def _result(self, site: SiteSums) -> SiteMeasurement:
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
            left_out=LeftOut(*map(int, left_out)),
            typical_norm=self.roles.typical_norm[site.writes],
            regressions=self.regressions,
            _linear={role: sums.reduced(reduce) for role, sums in site.linear.items()}
            | {HELD_OUT: LinearSums.merged(groups)},
            _scalars={role: sums.reduced(reduce) for role, sums in site.scalars.items()}
            | {HELD_OUT: LinearSums.merged(scalar_groups)},
            _groups=groups,
            _scalar_groups=scalar_groups,
            _residuals=reduce(site.residuals.clone()),
            _principal=reduce(site.principal.clone()).cpu(),
            _token_means={role: sums.reduced(reduce) for role, sums in site.token_means.items()},
            _extra=extra.cpu(),
        )


def _own_hooks(saes: Sequence[Encoder]) -> list[str]:
    """The hook points of a site: the one that is written and, for transcoders, the one that is read."""
    return list(dict.fromkeys([saes[0].writes, *(saes[0].reads if transcodes(saes) else ())]))


def _read_hooks(saes: Sequence[Encoder], predictors: Sequence[Encoder]) -> list[str]:
    """The hook points whose activations a site's tokens need."""
    return list(dict.fromkeys([saes[0].writes, *(read for sae in (*saes, *predictors) for read in sae.reads)]))


@torch.no_grad()
def measure(
    source: Source,
    saes: Sequence[Encoder],
    roles: TokenRoles,
    *,
    folder: Path,
    predictors: Mapping[str, Sequence[Encoder]] | None = None,
    regressions: Regressions | None = None,
    processes: Processes | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SiteMeasurement]:
    """Measure every SAE of every site in one pass over the tokens (or in two, as in the paper).

    Args:
        source: activations; must be the same in every process.
        saes: SAEs at any number of sites that the source reads; names are unique within a site.
        roles: roles of the source's tokens, at every site; `roles.settings` says how to measure.
        folder: for checkpoints and the per-token table. A stopped run resumes from here; a finished one returns its
            result at once.
        predictors: site -> SAEs of other hook points whose outputs join x as predictors.
        regressions: on x; default the paper's, or with parity "released-code" those of its scaling script.
        processes: from `runtime.processes`; default a single process.
        config: whatever else the result depends on; a folder started with a different config is refused.
        progress: called with the number of tokens read.

    Returns:
        hook point -> SiteMeasurement, the same in every process; for transcoders `READ to WRITTEN`, see `Encoder.site`.

    Raises:
        InputError: no SAE, NaN or infinity, a folder with another configuration.
        StateError: a damaged checkpoint or source. OSError: a folder that cannot be written; what was saved is kept.
    """
    if not saes:
        raise InputError("saes: must name at least one SAE, got none")
    if regressions is None:
        regressions = roles.settings.regressions()
    everything = {
        "sums_version": SUMS_VERSION,
        **dataclasses.asdict(roles.settings),
        "positions": roles.kept.nonzero().flatten().tolist(),
        "excluded_tokens": roles.excluded,
        "saes": [[sae.name, sae.site, sae.d_sae] for sae in saes],
        "predictors": {hook: [predictor.name for predictor in own] for hook, own in (predictors or {}).items()},
        "regressions": dataclasses.asdict(regressions),
        "contexts": [source.n_contexts, source.context_length, source.identity],
        **(config or {}),
    }
    # Where and when state is saved and which SAEs stay loaded do not change the result.
    for name in ("checkpoint", "checkpoint_seconds", "sae_memory_gb"):
        del everything[name]
    own = processes or Processes()
    checkpoint = CheckpointFolder(folder, own.rank, own.size)
    with checkpoint.in_use() if own.is_first else nullcontext():
        if own.is_first:
            checkpoint.start(everything)
        own.wait()
        checkpoint.start(everything)
        engine = _Engine(source, saes, predictors or {}, roles, own, checkpoint, regressions)
        return engine.run(progress or (lambda _tokens: None))


def tokens_to_read(source: Source, settings: Measure) -> int:
    """The number of tokens all processes read in total, over all sweeps: the total of a progress bar."""
    return source.context_length * source.n_contexts * settings.passes
