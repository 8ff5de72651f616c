"""From settings to inputs and from inputs to a measurement: the path every experiment takes.

`prepare` makes the inputs once: what the SAEs' metadata says, the activations, the role of every token, the SAEs.
`measured` measures them, as often as an experiment needs, with the SAEs' own encoders or others. Activations are
streamed from a model or read from disk. A run can be stopped at any time and resumed; `torchrun` splits it over processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from darkmatter_ext.activations.sources import CacheSource, SelectedContexts, Source, stored_losses
from darkmatter_ext.activations.store import ActivationCache
from darkmatter_ext.activations.text import installed_versions
from darkmatter_ext.measurement.engine import measure, tokens_to_read
from darkmatter_ext.measurement.measurement import SaeMeasurement, SiteMeasurement
from darkmatter_ext.measurement.notes import run_notes
from darkmatter_ext.measurement.opening import opened_source, stored_activations
from darkmatter_ext.measurement.principal import WITHOUT
from darkmatter_ext.measurement.resolved import Resolved, resolve
from darkmatter_ext.measurement.run_checks import RunChecks, measured_samples
from darkmatter_ext.measurement.settings import SCALING_SCRIPT, Regressions, Settings, replaced
from darkmatter_ext.measurement.site_saes import Make, SiteSae, given_saes, trained_saes
from darkmatter_ext.measurement.site_sums import SUMS_VERSION
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.tokens import TokenRoles, training_contexts
from darkmatter_ext.measurement.training_text import fvu_on, training_sample
from darkmatter_ext.runtime.checkpoint import FORMAT
from darkmatter_ext.runtime.html import html_table
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.processes import Processes, processes
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint, make_folder, stamp
from darkmatter_ext.saes.encoders import Encoder
from darkmatter_ext.saes.loading import SaeDescription

if TYPE_CHECKING:
    import pyarrow

# These decide where state is kept, how fast a run is and what its page shows; they change no number.
OPERATIONAL = (
    "checkpoint", "checkpoint_seconds", "device", "device_map", "sae_memory_gb", "forward_tokens", "accept_terms",
    "page_megabytes", "page_kl_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a run works on, made once by `prepare` and passed on."""

    resolved: Resolved
    source: Source  # the contexts that do not train SAEs, at every hook point
    roles: TokenRoles  # of the source's tokens
    saes: tuple[SiteSae, ...]  # those that are measured
    predictors: tuple[SiteSae, ...]
    processes: Processes
    stored: Mapping[str, StoredTokens] = field(default_factory=dict)  # hook point -> all tokens, if they are on disk
    text: str = ""  # a hash of the text or its tokens

    @property
    def settings(self) -> Settings:
        return self.resolved.settings

    @property
    def model(self) -> str:
        return self.resolved.model

    def of(self, hook: str) -> list[SiteSae]:
        """The SAEs at a site."""
        return [sae for sae in self.saes if sae.hook == hook]

    def sae(self, name: str) -> SiteSae:
        """The SAE with this name."""
        return next(sae for sae in (*self.saes, *self.predictors) if sae.name == name)

    @property
    def one_site(self) -> str:
        """The one hook point of all SAEs. Raises InputError if there are several."""
        hooks = list(dict.fromkeys(sae.hook for sae in self.saes))
        if len(hooks) > 1:
            raise InputError(f"sae: must be of one site, got {hooks[0]} and {hooks[1]}")
        return hooks[0]

    def config(self, hooks: Sequence[str] = ()) -> dict[str, Any]:
        """The settings as a result reports them, with what the SAEs filled in."""
        shown = ", ".join(hooks or dict.fromkeys(sae.hook for sae in self.saes))
        return self.settings.flat() | {"model": self.model, "hook": shown}

    def widest(self, hook: str) -> SiteSae:
        """The SAE with the most latents at a site."""
        return max(self.of(hook), key=lambda sae: sae.d_sae)


def prepare(
    settings: Settings,
    stages: Stages,
    *,
    splices: bool = False,
    transcoders: bool = False,
    train_at: Sequence[str] = (),
) -> Inputs:
    """Make the inputs of a run. Under torchrun, every process calls it.

    Args:
        splices: the caller reads whole stored contexts and splices into the model on some of them. Otherwise activations
            are stored only if SAEs are trained or the settings ask for it.
        transcoders: the caller can handle SAEs that do not reconstruct their own input; otherwise they are refused.
        train_at: hook points at which SAEs are trained, instead of those of the settings.

    Raises InputError for settings, SAEs or a model that do not fit; StateError for damaged files.
    """
    if settings.measure.released:
        settings = replaced(settings, max_norm_ratio=0.0)  # no released script leaves tokens out by norm
    found = resolve(settings, train_at=train_at, transcoders=transcoders)
    if splices and (asked := found.usage.processing):
        raise InputError(
            "backend: must be huggingface to splice into the model, got auto for SAEs that ask for weights processed by "
            f"TransformerLens ({', '.join(asked)})"
        )
    with processes(settings.device) as own:
        if splices or settings.stores:
            return _from_store(found, stages, own, drop_last=not splices)
        source = opened_source(found, contexts_folder(found), own, stages)
        _check_widths(found, source.widths)
        return Inputs(
            resolved=found,
            source=source,
            roles=_roles(found, source),
            saes=tuple(_given(found, own.device)),
            predictors=tuple(_predictors(found, own.device)),
            processes=own,
            text=source.identity,
        )


def _described(found: Resolved) -> list[tuple[SaeDescription, str]]:
    """All given SAEs and the hook points they read."""
    measured = zip(found.saes, found.hooks, strict=True)
    return [*measured, *zip(found.predictors, found.predictor_hooks, strict=True)]


def _check_widths(found: Resolved, widths: Mapping[str, int]) -> None:
    for sae, hook in _described(found):
        if sae.d_in != widths[hook]:
            raise InputError(f"sae: must have d_in {widths[hook]} as {hook}, got {sae.d_in} in {sae.spec}")
    for sae, hook in zip(found.saes, found.written, strict=True):
        if sae.width_out != widths[hook]:
            raise InputError(f"sae: must have d_out {widths[hook]} as {hook}, got {sae.width_out} in {sae.spec}")


def _given(found: Resolved, device: str) -> list[SiteSae]:
    ends = list(zip(found.hooks, found.written, strict=True))
    return given_saes(found.saes, ends, found.usage.scales[: len(found.saes)], found.settings, device)


def _predictors(found: Resolved, device: str) -> list[SiteSae]:
    scales = found.usage.scales[len(found.saes) :]
    ends = [(hook, hook) for hook in found.predictor_hooks]
    return given_saes(found.predictors, ends, scales, found.settings, device)


def _roles(found: Resolved, source: Source, *, drop_last: bool = True) -> TokenRoles:
    """`drop_last`: the released measurement scripts leave out the last position; the other released scripts do not."""
    settings, positions = found.settings.measure, found.usage.positions
    return TokenRoles.decide(
        source,
        settings,
        found.sites,
        positions=positions,
        excluded=found.excluded,
        drop_last=drop_last and settings.released,
    )


def _from_store(found: Resolved, stages: Stages, own: Processes, *, drop_last: bool) -> Inputs:
    """Inputs with activations on disk, and SAEs that are given or trained on a share of them."""
    settings = found.settings
    if own.size > 1:
        raise InputError(
            "torchrun: must be used with SAEs that exist (sae) and activations that are streamed, got store"
        )
    given = _given(found, settings.device)
    for sae in given:
        sae.load()  # reject a bad SAE before the model runs for minutes
    caches = stored_activations(found, stages)
    widths = {hook: cache.d_in for hook, cache in caches.items()}
    _check_widths(found, widths)
    any_cache = next(iter(caches.values()))  # all caches hold the same contexts
    documents = any_cache.column("documents")
    training = training_contexts(documents, settings.measure, 0.0 if settings.saes.sae else settings.saes.sae_fraction)
    measured = (~training).nonzero().flatten()
    losses = _losses(found, any_cache, measured, stages) if settings.measure.loss else None
    source = SelectedContexts(CacheSource(caches), measured, losses)
    roles = _roles(found, source, drop_last=drop_last)
    stored = {hook: StoredTokens.of(caches[hook], hook, training, roles) for hook in found.sites}
    return Inputs(
        resolved=found,
        source=source,
        roles=roles,
        saes=tuple(given or trained_saes(settings, found.usage, found.model, stored, stages)),
        predictors=tuple(_predictors(found, settings.device)),
        processes=own,
        stored=stored,
        text=any_cache.meta["text_sha256"],
    )


def _losses(found: Resolved, cache: ActivationCache, chosen: Tensor, stages: Stages) -> Tensor:
    tokens = cache.column("tokens")[chosen]
    with stages.stage("loss of the language model", tokens.numel()) as advance:
        return stored_losses(found.model, tokens, device=found.settings.device, progress=advance)


@dataclass(frozen=True, repr=False)
class Measurement:
    """A finished measurement, with what a result reports about it."""

    sites: dict[str, SiteMeasurement]
    saes: list[dict[str, Any]]  # name, d_sae, architecture, folder, hook: listed in figures and tables
    predictors: list[str]  # names, as `SiteMeasurement.part_fit` takes them
    config: dict[str, Any]
    notes: list[str]
    numbers: dict[str, float]  # token counts
    provenance: dict[str, Any]  # what identifies the text
    training_text: dict[str, float] = field(default_factory=dict)  # `SAE/fvu_training_text` of SAEs trained here

    def site_of(self, name: str) -> SiteMeasurement:
        """The site of an SAE. Raises InputError if the name is not among `saes`."""
        for sae in self.saes:
            if sae["name"] == name:
                return self.sites[sae["hook"]]
        raise InputError(f"name: must be one of {', '.join(sae['name'] for sae in self.saes)}, got {name!r}")

    def __getitem__(self, name: str) -> SaeMeasurement:
        """One SAE: its numbers and their intervals. Raises InputError as `site_of` does."""
        return SaeMeasurement(name, self.site_of(name))

    def _rows(self) -> list[list[str]]:
        """Headings, then one row per SAE."""
        rows = [["SAE", "hook", "L0", "FVU", "FVU nonlinear", "linear share"]]
        for sae in self.saes:
            found = self.site_of(sae["name"]).decomposition(sae["name"]).numbers()
            keys = ("l0", "fvu", "fvu_nonlinear", "linear_share")
            rows.append([sae["name"], sae["hook"], *(f"{found[key]:.4g}" for key in keys)])
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        """One row per SAE, and the notes, for notebooks."""
        headings, *rows = self._rows()
        return html_table(f"{len(rows)} SAEs on held-out tokens", headings, rows, self.notes)

    def tokens(self, columns: Sequence[str] | None = None, *, hook: str = "") -> pyarrow.Table:
        """The table of held-out tokens: context, position, token, group and the requested columns.

        Args:
            columns: "x" (squared norm), "loss", "SAE/error", "SAE/nonlinear", "SAE/l0", ...; default all.
            hook: the site, if there are several.

        Raises InputError for an unknown column, or if there are several sites and no hook is given.
        """
        if not hook and len(self.sites) > 1:
            raise InputError(f"hook: must be one of {', '.join(self.sites)} where there are several, got none")
        site = self.sites[hook] if hook else next(iter(self.sites.values()))
        return read_tokens(site.per_token, columns)

    def sae_numbers(self) -> dict[str, float]:
        """All numbers of `Decomposition` as `SAE/NAME`, with `/low` and `/high` for those with intervals.

        Also fvu, fvu_nonlinear and linear_share as `SAE/without_top_M/NAME`, without the top M principal directions of x.
        """
        numbers: dict[str, float] = {}
        for sae in self.saes:
            name, site = sae["name"], self.site_of(sae["name"])
            numbers |= {f"{name}/{key}": value for key, value in site.decomposition(name).numbers().items()}
            for key, interval in site.intervals(name).items():
                numbers |= {f"{name}/{key}/low": interval.low, f"{name}/{key}/high": interval.high}
            for count in WITHOUT:
                for key, interval in site.without_top(name, count).items():
                    numbers |= interval.numbers(f"{name}/without_top_{count}/{key}")
        return numbers | self.training_text


def measured(
    inputs: Inputs,
    stages: Stages,
    *,
    saes: Sequence[SiteSae] | None = None,
    encoders: Mapping[str, Make] | None = None,
    predictors: Sequence[Encoder] | None = None,
    released: Regressions = SCALING_SCRIPT,
) -> Measurement:
    """Measure SAEs. Under torchrun, every process calls it and gets the same result.

    Args:
        saes: some of the inputs' SAEs; default all.
        encoders: name -> how an SAE is used; every SAE is measured once with each, as `SAE NAME`, not with its own encoder.
        predictors: encoders whose outputs join x as predictors of the errors; default the inputs' predictors with their own.
        released: how the experiment's released script does its regressions, for parity "released-code".

    Raises InputError for SAEs that do not fit; StateError for damaged files; OSError for a folder that cannot be written.
    """
    chosen = list(inputs.saes if saes is None else saes)
    roles, own = inputs.roles, inputs.processes
    regressions = roles.settings.regressions(released)
    decided = deciding(inputs, chosen, encoders, predictors) | {"regressions": dataclasses.asdict(regressions)}
    folder = make_folder("checkpoint", run_folder(inputs, decided))
    sites = list(dict.fromkeys(sae.hook for sae in chosen))
    hooks = list(dict.fromkeys(hook for sae in (*chosen, *inputs.predictors) for hook in (sae.reads, sae.writes)))
    checks = RunChecks(folder, lambda: measured_samples(inputs.source, hooks, roles, own.device))
    look = checks if inputs.settings.saes.sae else None
    variants = [(sae, name) for sae in chosen for name in (encoders or {"": None})]
    listed = [_listed(sae, name) for sae, name in variants]
    measuring = [
        sae.encoder((encoders or {})[name], name=entry["name"], checks=look) if name else sae.encoder(checks=look)
        for (sae, name), entry in zip(variants, listed, strict=True)
    ]
    others = [sae.encoder(checks=look) for sae in inputs.predictors] if predictors is None else list(predictors)
    with stages.stage("measure", tokens_to_read(inputs.source, roles.settings) // own.size) as advance:
        found = measure(
            inputs.source,
            measuring,
            roles,
            folder=folder,
            predictors=dict.fromkeys(sites, others),
            regressions=regressions,
            processes=own,
            config=decided,
            progress=advance,
        )
    if own.is_first and look is not None:
        checks.save()
    counts = token_counts(inputs, found)
    return Measurement(
        sites=found,
        saes=listed,
        predictors=[other.name for other in others],
        config=inputs.config(sites),
        notes=[*run_notes(inputs.resolved, found, counts), *checks.notes()],
        numbers=counts,
        provenance={"text_sha256" if inputs.stored else "tokens_sha256": inputs.text},
        training_text={} if encoders else _on_training_text(inputs, chosen, found, stages),
    )


def _on_training_text(
    inputs: Inputs, saes: Sequence[SiteSae], sites: Mapping[str, SiteMeasurement], stages: Stages
) -> dict[str, float]:
    """FVU and FVU_nonlinear of SAEs trained here, on training tokens: as many as there are held-out tokens."""
    trained = [sae for sae in saes if sae.trained is not None]
    numbers: dict[str, float] = {}
    if not trained:
        return numbers
    with stages.stage("training text", len(trained)) as advance:
        for hook in dict.fromkeys(sae.hook for sae in trained):
            site, seed = sites[hook], inputs.settings.seed
            x = training_sample(inputs.stored[hook], site.n_held_out, seed=seed).to(inputs.processes.device)
            for sae in (sae for sae in trained if sae.hook == hook):
                own = fvu_on(x, sae.own, site.maps[sae.name])
                numbers |= {f"{sae.name}/{key}": value for key, value in own.items()}
                advance(1)
    return numbers


def _listed(sae: SiteSae, variant: str) -> dict[str, Any]:
    entry = sae.listed
    return entry | {"name": f"{sae.name} {variant}", "sae": sae.name, "variant": variant} if variant else entry


def token_counts(inputs: Inputs, sites: Mapping[str, SiteMeasurement]) -> dict[str, float]:
    """What a result reports about the tokens of the first site, by name. Counts include the text that trains SAEs."""
    hook, first = next(iter(sites.items()))
    left_out, more = first.left_out, {}
    if tokens := inputs.stored.get(hook):
        left_out, more = tokens.left_out, tokens.numbers()
    return {
        **left_out.numbers(),
        "tokens/median_norm": first.typical_norm,
        **more,
        "tokens/fit": first.n_fit,
        "tokens/norm_fit": first.n_norm_fit,
        "tokens/held_out": first.n_held_out,
    }


def deciding(
    inputs: Inputs,
    saes: Sequence[SiteSae],
    encoders: Mapping[str, Make] | None,
    predictors: Sequence[Encoder] | None,
) -> dict[str, Any]:
    """Everything that a measurement's result, or the format of its state, depends on."""
    settings = inputs.settings
    fields = settings.flat()
    variants = [*(encoders or ()), *(predictor.name for predictor in predictors or ())]
    if not variants:  # an experiment's own settings matter only to the encoders it makes
        shared = Settings().flat()
        fields = {name: value for name, value in fields.items() if name in shared}
    for name in OPERATIONAL:
        del fields[name]
    data = settings.data
    local = [sae.folder for sae in (*saes, *inputs.predictors)]
    local += [*data.cache, inputs.model, data.text, data.dataset, data.tokenised]
    return {
        **fields,
        "sums_version": SUMS_VERSION,
        "measured": [[sae.name, sae.hook, sae.folder] for sae in saes],
        "variants": variants,
        "files": {path: stamp(Path(path)) for path in local if path and Path(path).exists()},
    }


def run_folder(inputs: Inputs, decided: Mapping[str, Any]) -> Path:
    """Where a measurement keeps its state: in `checkpoint`, or in a cache folder keyed by everything that decides the result.

    Each set of encoders or controls has its own folder below `checkpoint`.
    """
    if checkpoint := inputs.settings.measure.checkpoint:
        return Path(checkpoint) / "-".join(decided["variants"])
    return cache_dir("runs") / fingerprint(**decided, identity=inputs.text, checkpoint_format=FORMAT)


def contexts_folder(found: Resolved) -> Path:
    """Where the tokens of a streamed run are kept, for its restarts and all of its measurements."""
    if checkpoint := found.settings.measure.checkpoint:
        return Path(checkpoint) / "contexts"
    data = dataclasses.asdict(found.settings.data)
    del data["accept_terms"]
    files = [path for path in (found.model, found.settings.data.text, found.settings.data.tokenised) if path]
    stamps: dict[str, Any] = {path: stamp(Path(path)) for path in files if Path(path).exists()}
    if not found.settings.data.text and not found.settings.data.dataset:
        stamps["documentation"] = installed_versions()  # an upgrade changes the text
    key = fingerprint(**data, usage=dataclasses.asdict(found.usage), seed=found.settings.seed, files=stamps)
    return cache_dir("contexts") / key
