"""Many SAEs of one or more sites, measured in one go: configuration, plan and run of what experiments at scale share.

Where `site.py` trains SAEs on the spot and keeps activations on disk, this takes SAEs that exist (folders, or RELEASE:ID of
SAELens' list), follows their metadata (`metadata.py`), and streams: activations are never stored, a run can be stopped at
any moment, and `torchrun` divides it among processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from darkmatter_ext.activations.contexts import ContextStore, Rows, text_rows, tokenised_rows, write_contexts
from darkmatter_ext.activations.hook_points import parse_hook_point, translated_hook
from darkmatter_ext.activations.sources import LensSource, ModelSource, SelectedContexts, Source, open_cache
from darkmatter_ext.activations.store import check_fits, load_tokenizer, published_name
from darkmatter_ext.activations.text import bos_note, documents
from darkmatter_ext.measurement.cost import PlannedSae, cost, cost_lines, known_model, probe
from darkmatter_ext.measurement.engine import measure, tokens_to_read
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.measurement import MeasuredSae, MeasureSettings, Predictor, SiteMeasurement
from darkmatter_ext.measurement.metadata import Usage, excluded_ids, own_hook, usage
from darkmatter_ext.measurement.run_checks import RunChecks, measured_samples
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.processes import Processes, processes
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.catalogue import SAE_SETS
from darkmatter_ext.saes.encoders import Encoder, as_encoder
from darkmatter_ext.saes.loading import SaeDescription, describe_sae, load_sae

if TYPE_CHECKING:
    from sae_lens import SAE

Encoders = Mapping[str, Callable[["SAE"], Encoder]]  # name -> how to use an SAE

EXCERPT_TOKENS = 60  # of the per-token figure: one line of text that can still be read


class _Resolved(NamedTuple):
    """The configuration with what the SAEs' metadata says filled in."""

    saes: list[SaeDescription]
    hooks: list[str]  # of each SAE
    predictors: list[SaeDescription]
    predictor_hooks: list[str]
    model: str
    usage: Usage
    settings: MeasureSettings

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(self.hooks))

    @property
    def read(self) -> list[str]:
        """All hook points the source must give."""
        return list(dict.fromkeys([*self.hooks, *self.predictor_hooks]))


def _resolve(config: ManySaesConfig) -> _Resolved:
    """Raises ValueError when an SAE cannot be read, or they do not fit together."""
    if not config.sae:
        raise InputError("sae: must name at least one SAE, got none")
    saes, predictors = ([describe_sae(spec) for spec in specs] for specs in (config.sae, config.predictor))
    hooks = [_hook(config, sae, config.hook) for sae in saes]
    predictor_hooks = [_hook(config, sae, "") for sae in predictors]
    model = published_name(config.model) or _named_model([*saes, *predictors])
    if not model and not config.cache:
        raise InputError(f"model: must be given, {saes[0].spec} does not say its model, got none")
    stored = "cache" if config.cache else "tokenised" if config.tokenised else ""
    own = usage(saes, config, others=predictors, model=config.model, hook=config.hook, stored=stored)
    excluded = excluded_ids(own.special_tokens, model)
    settings = dataclasses.replace(config.settings(), positions=own.positions, excluded_tokens=excluded)
    return _Resolved(saes, hooks, predictors, predictor_hooks, model, own, settings)


def _named_model(saes: Sequence[SaeDescription]) -> str:
    """The model all SAEs name. Raises ValueError when they differ."""
    named = {published_name(name): name for sae in saes if (name := str(sae.metadata.get("model_name") or ""))}
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise InputError(f"model: must be given, the SAEs were made with {first} and {second}, got {saes[0].spec} ...")
    return next(iter(named), "")


def _hook(config: ManySaesConfig, sae: SaeDescription, given: str) -> str:
    """Where an SAE reads. Raises ValueError when that is not known, or it does not reconstruct what it reads."""
    own = own_hook(sae)
    hook = given or (own if config.cache else translated_hook(own))
    if not hook:
        raise InputError(f"hook: must be given, {sae.spec} does not say where it reads, got none")
    if not config.cache:
        parse_hook_point(hook)
    return hook


def _rows(config: ManySaesConfig, found: _Resolved) -> Rows:
    if config.tokenised:
        return tokenised_rows(config.tokenised, context_length=found.usage.context_length)
    text = documents(text=config.text, dataset=config.dataset, shuffle_buffer=config.shuffle_buffer, seed=config.seed)
    return text_rows(
        load_tokenizer(found.model),
        text,
        context_length=found.usage.context_length,
        prepend_bos=found.usage.bos,
        per_document=config.contexts_per_document,
    )


def _source(config: ManySaesConfig, found: _Resolved, folder: Path, own: Processes, stages: Stages) -> Source:
    if config.cache:
        source: Any = open_cache(config.cache)
        missing = [hook for hook in found.read if hook not in source.widths]
        if missing:
            raise InputError(f"cache: must hold {missing[0]}, got {', '.join(source.widths)}")
        if found.settings.excluded_tokens and int(source.read([0]).tokens.min()) < 0:
            raise InputError("exclude_special_tokens: must be no for a cache that holds no token ids, got auto or yes")
        wanted = max(2, config.tokens // source.context_length)
        return SelectedContexts(source, torch.arange(min(source.n_contexts, wanted)))
    check_fits(found.model, context_length=found.usage.context_length)
    contexts = folder / "contexts"
    if own.is_first and not contexts.exists():
        with stages.stage("tokenise text"):
            n_contexts = max(2, config.tokens // found.usage.context_length)
            write_contexts(
                contexts, _rows(config, found), n_contexts=n_contexts, context_length=found.usage.context_length
            )
    own.wait()
    store, dtype = ContextStore.open(contexts), getattr(torch, config.dtype)
    check_fits(found.model, tokens=store.token_range)
    with stages.stage("load the language model"):
        if found.usage.processing or config.backend == "transformer-lens":
            if config.loss:
                raise InputError("loss: must be left out with TransformerLens' processed weights, got loss")
            return LensSource.load(
                found.model, found.read, store, processing=found.usage.processing, device=own.device, dtype=dtype
            )
        return ModelSource.load(
            found.model,
            found.read,
            store,
            device=own.device,
            dtype=dtype,
            device_map=config.device_map,
            loss=config.loss,
            forward_tokens=config.forward_tokens,
        )


def _check_widths(source: Source, found: _Resolved) -> None:
    every = [*zip(found.saes, found.hooks, strict=True), *zip(found.predictors, found.predictor_hooks, strict=True)]
    for sae, hook in every:
        if sae.d_in != source.widths[hook]:
            raise InputError(f"sae: must have d_in {source.widths[hook]} as {hook}, got {sae.d_in} in {sae.spec}")


def _names(saes: Sequence[SaeDescription]) -> list[str]:
    """Short names where they are unique, else the whole specification."""
    short = [sae.name for sae in saes]
    return [name if short.count(name) == 1 else sae.spec for name, sae in zip(short, saes, strict=True)]


@dataclass(frozen=True)
class Measured:
    """A finished measurement with what a result tells about it. Experiments at scale start from here."""

    sites: dict[str, SiteMeasurement]
    predictors: list[str]  # names, as `SiteMeasurement.part_fit` takes them
    saes: list[dict[str, Any]]  # name, d_sae, architecture, folder, hook: what figures and tables list
    config: dict[str, Any]
    notes: list[str]
    numbers: dict[str, float]  # token counts
    folder: Path
    provenance: dict[str, Any]  # what identifies the text

    def site_of(self, name: str) -> SiteMeasurement:
        """The site of an SAE."""
        return next(self.sites[sae["hook"]] for sae in self.saes if sae["name"] == name)

    def sae_numbers(self) -> dict[str, float]:
        """`SAE/NAME` for all numbers of `Decomposition`, with `/low` and `/high` where there are intervals."""
        numbers: dict[str, float] = {}
        for sae in self.saes:
            name, site = sae["name"], self.site_of(sae["name"])
            numbers |= {f"{name}/{key}": value for key, value in site.decomposition(name).numbers().items()}
            for key, interval in site.intervals(name).items():
                numbers |= {f"{name}/{key}/low": interval.low, f"{name}/{key}/high": interval.high}
        return numbers


def sae_sites(config: ManySaesConfig) -> list[str]:
    """The hook points of the SAEs, from their metadata. Raises ValueError when one cannot be read, or they do not fit."""
    return _resolve(config).sites


def run_folder(config: ManySaesConfig, variants: Sequence[str] = ()) -> Path:
    """Where the run keeps its state: checkpoint, or the cache folder by everything that decides the result.

    A checkpoint has a folder of its own below it for each set of `variants` (encoders, controls).
    """
    if config.checkpoint:
        return Path(config.checkpoint) / "-".join(variants)
    return cache_dir("runs") / fingerprint(**_deciding(config, variants))


def variant_fields(config: Any, base: type, variants: Sequence[str]) -> dict[str, Any]:
    """What decides about a measurement beside the fields of `base`: encoders and controls by name, and the fields that an
    experiment adds for them."""
    known = {own.name for own in dataclasses.fields(base)}
    added = {name: value for name, value in dataclasses.asdict(config).items() if name not in known}
    return {"variants": list(variants), **added} if variants else {}


def _deciding(config: ManySaesConfig, variants: Sequence[str]) -> dict[str, Any]:
    """The configuration without what changes neither the result nor the form of its state."""
    fields = {own.name: getattr(config, own.name) for own in dataclasses.fields(ManySaesConfig)}
    for name in ("checkpoint", "checkpoint_seconds", "device", "device_map", "sae_memory_gb", "forward_tokens"):
        del fields[name]
    fields |= variant_fields(config, ManySaesConfig, variants)
    local = [*config.sae, *config.predictor, *config.cache, config.model, config.text, config.dataset, config.tokenised]
    fields["files"] = {path: stamp(Path(path)) for path in local if path and Path(path).exists()}
    return fields


def stamp(path: Path) -> list[int]:
    """Total size and last change of a file or a folder: another SAE under an old name must not be taken for it."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = [file.stat() for file in files]
    return [sum(stat.st_size for stat in found), max((stat.st_mtime_ns for stat in found), default=0)]


def measured(
    config: ManySaesConfig,
    stages: Stages,
    encoders: Encoders | None = None,
    *,
    controls: Mapping[str, Callable[[MeasuredSae], MeasuredSae]] | None = None,
) -> Measured:
    """Measure all SAEs of a configuration; every process of a torchrun calls it and has the same result.

    Args:
        encoders: name -> how an SAE is used; every SAE is measured once with each, as `SAE NAME`, instead of with its own.
        controls: name -> what makes a further predictor out of the first of predictor.

    Raises ValueError for bad settings, an SAE or model that cannot be read; RuntimeError for damaged files; OSError for a
    folder that cannot be written.
    """
    variants = [*(encoders or ()), *(controls or ())]
    found, folder = _resolve(config), run_folder(config, variants)
    folder.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as own:
        source = _source(config, found, folder, own, stages)
        _check_widths(source, found)
        names = _names(found.saes)
        settings = dataclasses.replace(found.settings, token_means=_vocabulary(source) if config.token_means else 0)
        checks = RunChecks(folder, lambda: measured_samples(source, found.read, settings, own.device))
        described = [
            (entry, sae, scale)
            for name, hook, sae, scale in zip(names, found.hooks, found.saes, found.usage.scales, strict=False)
            for entry in with_encoders(_listed(name, hook, sae), encoders)
        ]
        listed = [entry for entry, _, _ in described]
        saes = [_as_measured(config, *each, own.device, checks, encoders) for each in described]
        predicting = zip(_names(found.predictors), found.predictor_hooks, found.predictors, strict=True)
        scales = found.usage.scales[len(found.saes) :]
        others = [
            _as_measured(config, _listed(name, hook, sae), sae, scale, own.device, checks)
            for (name, hook, sae), scale in zip(predicting, scales, strict=True)
        ]
        others += [make(others[0]) for make in (controls or {}).values()]
        predictors = {hook: [Predictor(sae.name, sae) for sae in others] for hook in found.sites}
        with stages.stage("measure", tokens_to_read(source, settings) // own.size) as advance:
            sites = measure(
                source,
                saes,
                settings,
                folder=folder,
                predictors=predictors,
                processes=own,
                config=_deciding(config, variants),
                progress=advance,
            )
        if own.is_first:
            checks.save()
    shown = dataclasses.asdict(config) | {"model": found.model, "hook": ", ".join(found.sites)}
    return Measured(
        sites,
        [sae.name for sae in others],
        listed,
        shown,
        _notes(config, found, source, sites) + checks.notes(),
        token_counts(sites),
        folder,
        {"tokens_sha256": source.identity},
    )


def _listed(name: str, hook: str, sae: SaeDescription) -> dict[str, Any]:
    """What figures and tables list of an SAE."""
    return {"name": name, "d_sae": sae.d_sae, "architecture": sae.architecture, "folder": sae.spec, "hook": hook}


def with_encoders(entry: dict[str, Any], encoders: Encoders | None) -> list[dict[str, Any]]:
    """A listed SAE once for each encoder, or itself where there are none."""
    if not encoders:
        return [entry]
    return [
        entry | {"name": f"{entry['name']} {variant}", "sae": entry["name"], "variant": variant} for variant in encoders
    ]


def _as_measured(
    config: ManySaesConfig,
    entry: dict[str, Any],
    sae: SaeDescription,
    scale: float | None,
    device: str,
    checks: RunChecks,
    encoders: Encoders | None = None,
) -> MeasuredSae:
    make = encoders[entry["variant"]] if encoders else as_encoder

    def load() -> Encoder:
        loaded = load_sae(sae.spec, device=device, dtype=config.sae_dtype, activation_scale=scale)
        encode = make(loaded)
        own = None if encoders else encode
        checks.see(entry.get("sae", entry["name"]), entry["hook"], loaded, own, sae.expected_l0)
        return encode

    return MeasuredSae(entry["name"], entry["hook"], entry["d_sae"], load, sae.weight_bytes)


def _vocabulary(source: Source) -> int:
    """One more than the largest token id, from the tokens themselves."""
    store = getattr(source, "store", None)
    if isinstance(store, ContextStore):
        return 1 + store.token_range[1]
    return 1 + max(int(source.read([number]).tokens.max()) for number in range(source.n_contexts))


def token_counts(sites: dict[str, SiteMeasurement]) -> dict[str, float]:
    """What a result reports about tokens, by name, of the first site."""
    first = next(iter(sites.values()))
    return {
        "tokens/fit": first.n_fit,
        "tokens/norm_fit": first.n_norm_fit,
        "tokens/held_out": first.n_held_out,
        "tokens/dropped_first_positions": first.left_out_by_position,
        "tokens/left_out_special": first.left_out_by_token,
        "tokens/left_out_high_norm": first.left_out_by_norm,
        "tokens/median_norm": first.typical_norm,
    }


def _notes(config: ManySaesConfig, found: _Resolved, source: Source, sites: dict[str, SiteMeasurement]) -> list[str]:
    first, settings, own = next(iter(sites.values())), found.settings, found.usage
    total = source.n_contexts * source.context_length
    processing = f"; weights processed by TransformerLens ({', '.join(own.processing)})" if own.processing else ""
    special = f"{first.left_out_by_token} for being special, " if settings.excluded_tokens else ""
    if config.cache or config.tokenised:
        front = "BOS as they were stored"
    else:
        front = bos_note(load_tokenizer(found.model), own.bos)
    notes = [
        f"{first.left_out_by_position} of {total} tokens are left out by position, {special}{first.left_out_by_norm} by "
        f"norm (above {settings.max_norm_ratio:g} medians of the first contexts).",
        f"Contexts of {source.context_length} tokens, {front}, split by {settings.split}; "
        f"{settings.passes} reading{'s' if settings.passes > 1 else ''} of every token{processing}.",
        *own.notes,
        *rank_notes(sites),
    ]
    widest = max(source.widths[hook] for hook in sites)
    if first.n_fit < 20 * widest:
        notes.append(
            f"b* has {widest} inputs and {first.n_fit} tokens to fit them: expect overfitting (see r2_vec_train)."
        )
    return notes


def rank_notes(sites: Mapping[str, SiteMeasurement]) -> list[str]:
    """Sites whose activations do not span their width: b* is not unique there, and its share cannot grow with it."""
    ranks = {hook: next(iter(site.maps.values())) for hook, site in sites.items()}
    return [
        f"{hook}: the activations span {b_star.rank} of {len(b_star.weight)} dimensions on the fit tokens."
        for hook, b_star in ranks.items()
        if b_star.rank < len(b_star.weight)
    ]


def excerpt(found: Measured) -> dict[str, Any]:
    """Per-token squared norms over a piece of held-out text, for the per-token figure, from the table.

    Empty when SAEs of several sites were measured: their errors are not on one scale.
    """
    if len(found.sites) > 1:
        return {}
    (site,) = found.sites.values()
    table = read_tokens(site.per_token)
    first = table["context"][0].as_py()
    rows = table.slice(0, min(EXCERPT_TOKENS, table["context"].to_pylist().count(first)))
    ids = rows["token"].to_pylist()
    model = found.config["model"]
    tokenizer = None
    if model and min(ids) >= 0:
        with contextlib.suppress(
            ValueError
        ):  # stored activations of a model that is not on this machine: ids are shown
            tokenizer = load_tokenizer(model)
    return {
        "tokens": [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids],
        "squared_norm_x": rows["x"].to_pylist(),
        "squared_norms": {
            name: {part: rows[f"{name}/{part}"].to_pylist() for part in ("error", "nonlinear")} for name in site.saes
        },
    }


def _planned(specs: Sequence[str], hook: str) -> tuple[list[PlannedSae], list[str]]:
    """The SAEs whose sizes are known without a download, and the others."""
    known = {sae.spec: sae for own in SAE_SETS.values() for sae in own}
    planned, unknown = [], []
    for spec in specs:
        if spec in known:
            planned.append(PlannedSae(spec, hook or known[spec].hook, known[spec].d_in, known[spec].d_sae))
        elif Path(spec).is_dir():
            sae = describe_sae(spec)
            planned.append(PlannedSae(spec, hook or sae.metadata.get("hook_name") or "?", sae.d_in, sae.d_sae))
        else:
            unknown.append(spec)
    return planned, unknown


def plan_lines(config: ManySaesConfig) -> list[str]:
    """What a run would do and cost, in lines, without downloading anything; times a second of work on this device."""
    planned, unknown = _planned(config.sae, config.hook)
    predictors, unknown_predictors = _planned(config.predictor, "")
    given = config.text or config.dataset or config.tokenised or ", ".join(config.cache)
    shuffled = f", shuffled in a buffer of {config.shuffle_buffer}" if config.shuffle_buffer else ""
    lines = [
        f"model     {config.model or 'as the SAEs say'}, {config.dtype}, on {config.device_map or config.device}",
        f"text      {given or 'documentation installed on this machine'}{shuffled}: {config.tokens} tokens in contexts of "
        f"{config.context_length or 'the SAEs own length'}",
        f"left out  positions below {config.drop_positions}; norms above {config.max_norm_ratio:g} medians",
        f"split     by {config.split}, seed {config.seed}; {config.passes} reading(s) of every token, "
        f"products {config.products}",
        *(f"SAE       {sae.hook}  {sae.d_sae:8} latents  {sae.name}" for sae in planned),
        *(f"SAE       {spec} (size not known before its configuration is downloaded)" for spec in unknown),
        *(f"predictor {sae.hook}  {sae.d_sae:8} latents  {sae.name}" for sae in predictors),
        *(f"predictor {spec} (size not known before its configuration is downloaded)" for spec in unknown_predictors),
        f"state     {run_folder(config)}",
    ]
    if not planned:
        return lines
    model = None if config.cache else known_model(config.model)
    read = [sae.hook for sae in (*planned, *predictors) if sae.hook != "?"]
    depth = max((parse_hook_point(hook).layer + 1 for hook in read), default=1)
    found = cost(
        model,
        planned,
        predictors,
        depth=model.n_layers if config.loss and model else depth,
        tokens=config.tokens,
        passes=config.passes,
        groups=config.interval_groups,
        sae_bytes=4 if config.sae_dtype == "float32" else 2,
        download_saes=any(not Path(sae.name).is_dir() for sae in (*planned, *predictors)),
    )
    rates = probe(config.device, max(sae.d_in for sae in planned))
    known_here = model is not None or bool(config.cache)
    return [*lines, *cost_lines(found, rates, products=config.products, model_known=known_here)]
