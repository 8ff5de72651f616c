"""Settings with what the SAEs' own files say filled in: model, hook points, context length, tokens to leave out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL, check_terms
from darkmatter_ext.activations.hook_points import parse_hook_point, translated_hook
from darkmatter_ext.activations.store import published_name
from darkmatter_ext.measurement.metadata import Usage, excluded_ids, own_sites, usage
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.loading import SaeDescription, describe_sae


@dataclass(frozen=True)
class Resolved:
    """Settings with what the SAEs' metadata says filled in."""

    settings: Settings
    model: str
    usage: Usage
    saes: Sequence[SaeDescription]  # the given ones
    hooks: list[str]  # the hook point each of them reads
    written: list[str]  # the hook point each of them writes
    predictors: Sequence[SaeDescription]
    predictor_hooks: list[str]
    trained: list[str]  # hook points at which SAEs are trained

    @property
    def sites(self) -> list[str]:
        """Where the SAEs (not the predictors) are: the hook points they read or write."""
        return list(dict.fromkeys([*self.hooks, *self.written])) or self.trained

    @property
    def read(self) -> list[str]:
        """All hook points whose activations are needed."""
        return list(dict.fromkeys([*self.sites, *self.predictor_hooks]))

    @functools.cached_property
    def excluded(self) -> tuple[int, ...]:
        """Ids of tokens that are not measured."""
        return excluded_ids(self.usage.special_tokens, self.model)


def resolve(settings: Settings, *, train_at: Sequence[str] = (), transcoders: bool = False) -> Resolved:
    """Read what the SAEs say about themselves, and work out what follows. Downloads at most small files.

    Args:
        train_at: hook points at which SAEs are trained, instead of those of the settings.
        transcoders: whether the caller can handle SAEs that do not reconstruct their own input.

    Raises InputError if an SAE cannot be read, or the SAEs do not fit together.
    """
    data, saes = settings.data, settings.saes
    given, predictors = ([describe_sae(spec) for spec in specs] for specs in (saes.sae, saes.predictor))
    for sae in given:
        _check_transcoder(settings, sae, "sae", allowed=transcoders)
    for sae in predictors:
        _check_transcoder(settings, sae, "predictor", allowed=False)
    sites = [_sites(settings, sae, saes.hook) for sae in given]
    predictor_hooks = [_sites(settings, sae, "")[0] for sae in predictors]
    model = published_name(data.model) or _named_model([*given, *predictors]) or ("" if given else EMBEDDED_MODEL)
    if not model and not data.cache:
        raise InputError(
            f"model: must be given, {given[0].spec} does not say its model, got none "
            f"(a folder, a Hugging Face id, or {EMBEDDED_MODEL})"
        )
    if not data.cache:
        check_terms(model, accept=data.accept_terms)
    own = usage(given, data, others=predictors, model=data.model, hook=saes.hook, stored=data.stored)
    trained = [] if given else list(train_at) or saes.trained_hooks
    hooks, written = ([site[side] for site in sites] for side in (0, 1))
    return Resolved(settings, model, own, given, hooks, written, predictors, predictor_hooks, trained)


def _check_transcoder(settings: Settings, sae: SaeDescription, argument: str, *, allowed: bool) -> None:
    if sae.transcodes and not allowed:
        raise InputError(f"{argument}: must reconstruct its own input here, got the {sae.architecture} {sae.spec}")
    if sae.transcodes and settings.stores:
        raise InputError(f"store: must be False for a transcoder, got True for {sae.spec}")


def _named_model(saes: Sequence[SaeDescription]) -> str:
    """The model that all SAEs name. Raises InputError if they differ."""
    named = {published_name(name): name for sae in saes if (name := str(sae.metadata.get("model_name") or ""))}
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise InputError(f"model: must be given, the SAEs were made with {first} and {second}, got {saes[0].spec} ...")
    return next(iter(named), "")


def _sites(settings: Settings, sae: SaeDescription, given: str) -> tuple[str, str]:
    """What an SAE reads and writes: as it says, or `given` if it does not say or the cache has its own names.

    Raises InputError if that is unknown, or the two differ.
    """
    own = own_sites(sae)
    if sae.transcodes:
        reads, writes = own if settings.data.cache else (translated_hook(own[0]), translated_hook(own[1]))
    elif settings.data.cache:
        reads = writes = given or own[0]
    else:
        reads = writes = translated_hook(own[0]) or given
    if not reads:
        raise InputError(
            f"hook: must be given, {sae.spec} does not say where it reads, got none (as blocks.10.hook_resid_post)"
        )
    if not settings.data.cache:
        for hook in (reads, writes):
            parse_hook_point(hook)
        if given and given not in (reads, writes):
            raise InputError(f"sae: must be of the site {given}, got one of {reads} in {sae.spec}")
    return reads, writes
