"""Settings with what the SAEs' own files say filled in: model, hook points, context length, tokens to leave out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL
from darkmatter_ext.activations.hook_points import parse_hook_point, translated_hook
from darkmatter_ext.activations.store import published_name
from darkmatter_ext.measurement.metadata import Usage, excluded_ids, own_hook, usage
from darkmatter_ext.measurement.settings import Settings
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.loading import SaeDescription, describe_sae


@dataclass(frozen=True)
class Resolved:
    """Settings with what the SAEs' metadata says filled in."""

    settings: Settings
    model: str
    usage: Usage
    saes: Sequence[SaeDescription]  # given ones
    hooks: list[str]  # of each of them
    predictors: Sequence[SaeDescription]
    predictor_hooks: list[str]
    trained: list[str]  # hook points at which SAEs are trained

    @property
    def sites(self) -> list[str]:
        """Where SAEs are, predictors aside."""
        return list(dict.fromkeys(self.hooks)) or self.trained

    @property
    def read(self) -> list[str]:
        """All hook points whose activations are needed."""
        return list(dict.fromkeys([*self.sites, *self.predictor_hooks]))

    @functools.cached_property
    def excluded(self) -> tuple[int, ...]:
        """Ids of tokens that are not measured."""
        return excluded_ids(self.usage.special_tokens, self.model)


def resolve(settings: Settings, *, train_at: Sequence[str] = ()) -> Resolved:
    """What the SAEs say of themselves, and what follows from it. Downloads at most small files.

    `train_at`: hook points at which SAEs are trained, instead of those of the settings.

    Raises InputError when an SAE cannot be read, or they do not fit together.
    """
    data, saes = settings.data, settings.saes
    given, predictors = ([describe_sae(spec) for spec in specs] for specs in (saes.sae, saes.predictor))
    hooks = [_hook(settings, sae, saes.hook) for sae in given]
    predictor_hooks = [_hook(settings, sae, "") for sae in predictors]
    model = published_name(data.model) or _named_model([*given, *predictors]) or ("" if given else EMBEDDED_MODEL)
    if not model and not data.cache:
        raise InputError(f"model: must be given, {given[0].spec} does not say its model, got none")
    own = usage(given, data, others=predictors, model=data.model, hook=saes.hook, stored=data.stored)
    trained = [] if given else list(train_at) or saes.trained_hooks
    return Resolved(settings, model, own, given, hooks, predictors, predictor_hooks, trained)


def _named_model(saes: Sequence[SaeDescription]) -> str:
    """The model all SAEs name. Raises InputError when they differ."""
    named = {published_name(name): name for sae in saes if (name := str(sae.metadata.get("model_name") or ""))}
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise InputError(f"model: must be given, the SAEs were made with {first} and {second}, got {saes[0].spec} ...")
    return next(iter(named), "")


def _hook(settings: Settings, sae: SaeDescription, given: str) -> str:
    """Where an SAE reads: as it says, or as `given` for one that does not, or for a cache with names of its own.

    Raises InputError when that is not known, the two differ, or the SAE does not reconstruct what it reads.
    """
    own = own_hook(sae)
    if settings.data.cache:
        hook = given or own
    else:
        hook = translated_hook(own) or given
        if hook:
            parse_hook_point(hook)
        if given and hook != given:
            raise InputError(f"sae: must be of the site {given}, got one of {hook} in {sae.spec}")
    if not hook:
        raise InputError(f"hook: must be given, {sae.spec} does not say where it reads, got none")
    return hook
