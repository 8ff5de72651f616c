"""Describe what a run would do and cost, before it starts; only configurations of a few kilobytes are downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL
from darkmatter_ext.activations.hook_points import parse_hook_point, translated_hook
from darkmatter_ext.measurement.cost import PlannedSae, cost, cost_lines, known_model, probe
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.saes.catalogue import SAE_SETS
from darkmatter_ext.saes.formats import on_disk
from darkmatter_ext.saes.loading import describe_sae, release_and_id


def plan_lines(settings: Settings) -> list[str]:
    """Describe a run, one line per step, without starting it; times come from one second of work on this device."""
    return [*_data_lines(settings), *(_given_lines(settings) if settings.saes.sae else _trained_lines(settings))]


def _data_lines(settings: Settings) -> list[str]:
    data, measure = settings.data, settings.measure
    given = data.text or data.dataset or data.tokenised or ", ".join(data.cache)
    shuffled = f", shuffled in a buffer of {data.shuffle_buffer}" if data.shuffle_buffer else ""
    model = data.model or ("as the SAEs say" if settings.saes.sae else EMBEDDED_MODEL)
    where = "kept on disk" if settings.stores else "streamed"
    length = data.context_length or ("the SAEs' own length" if settings.saes.sae else 256)
    return [
        f"model     {model}, {data.dtype}, on {data.device_map or settings.device}; activations {where}",
        f"text      {given or 'documentation installed on this machine'}{shuffled}: {data.tokens} tokens in contexts of "
        f"{length}",
        f"left out  positions below {measure.drop_positions}; norms above {measure.max_norm_ratio:g} medians",
        f"split     by {measure.split}, seed {settings.seed}; {measure.passes} reading(s) of every token, products "
        f"{measure.products}, intervals from {measure.interval_groups} groups of contexts",
    ]


def _trained_lines(settings: Settings) -> list[str]:
    saes = settings.saes
    return [
        f"SAE       {hook}  train {own.architecture}, {own.width} latents, k {own.k}, {saes.steps} steps"
        + (f", seed {settings.seed + own.seed}" if saes.sae_seeds > 1 else "")
        + (f", frozen {own.freeze}" if own.freeze != "none" else "")
        for hook in saes.trained_hooks
        for own in saes.trained
    ]


def _given_lines(settings: Settings) -> list[str]:
    planned, unknown = _planned(settings.saes.sae, settings.saes.hook)
    predictors, unknown_predictors = _planned(settings.saes.predictor, "")
    not_known = "(size not known before its configuration is downloaded)"
    lines = [
        *(f"SAE       {sae.hook}  {sae.d_sae:8} latents  {sae.name}" for sae in planned),
        *(f"SAE       {spec} {not_known}" for spec in unknown),
        *(f"predictor {sae.hook}  {sae.d_sae:8} latents  {sae.name}" for sae in predictors),
        *(f"predictor {spec} {not_known}" for spec in unknown_predictors),
        f"state     {settings.measure.checkpoint or 'in the cache folder, named by the settings'}",
    ]
    return lines + (_cost(settings, planned, predictors) if planned else [])


def _planned(specs: Sequence[str], hook: str) -> tuple[list[PlannedSae], list[str]]:
    """The SAEs whose sizes are known without a download, and the others."""
    known = {sae.spec: sae for own in SAE_SETS.values() for sae in own}
    planned, unknown = [], []
    for spec in specs:
        if spec in known:
            planned.append(PlannedSae(spec, hook or known[spec].hook, known[spec].d_in, known[spec].d_sae))
        elif on_disk(spec):
            sae = describe_sae(spec)
            own = translated_hook(str(sae.metadata.get("hook_name") or "")) or "?"
            planned.append(PlannedSae(spec, hook or own, sae.d_in, sae.d_sae))
        else:
            release_and_id(spec)
            unknown.append(spec)
    return planned, unknown


def _cost(settings: Settings, planned: Sequence[PlannedSae], predictors: Sequence[PlannedSae]) -> list[str]:
    data, measure = settings.data, settings.measure
    model = None if data.cache else known_model(data.model)
    every = (*planned, *predictors)
    depth = max((parse_hook_point(sae.hook).layer + 1 for sae in every if sae.hook != "?"), default=1)
    found = cost(
        model,
        planned,
        predictors,
        depth=model.n_layers if measure.loss and model else depth,
        tokens=data.tokens,
        passes=measure.passes,
        groups=measure.interval_groups,
        sae_bytes=4 if settings.saes.sae_dtype == "float32" else 2,
        download_saes=any(not on_disk(sae.name) for sae in every),
    )
    rates = probe(settings.device, max(sae.d_in for sae in planned))
    known = model is not None or bool(data.cache)
    return cost_lines(found, rates, products=measure.products, model_known=known)
