"""A family of SAEs of one model, trained here or given, measured in one pass: what the experiments over many SAEs start from.

`site.py` trains SAEs on a part of the text and keeps activations on disk; `one_pass.py` measures any number of SAEs from
sums. Here they meet: SAEs of several widths, L0 and hook points are trained on the one part of the text, and all are
measured on the other. Experiments take either a `FamilyConfig` or, for SAEs that exist already, a `ManySaesConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter_ext.activations.hook_points import translated_hook
from darkmatter_ext.activations.sources import CacheSource, SelectedContexts, stored_losses
from darkmatter_ext.activations.store import ActivationCache
from darkmatter_ext.measurement import many_saes
from darkmatter_ext.measurement.engine import measure, tokens_to_read
from darkmatter_ext.measurement.many_saes import Encoders, Measured, stamp, token_counts, variant_fields, with_encoders
from darkmatter_ext.measurement.many_saes_config import ManySaesConfig
from darkmatter_ext.measurement.measurement import MeasuredSae, MeasureSettings, Predictor
from darkmatter_ext.measurement.metadata import excluded_ids, narrowed, own_hook
from darkmatter_ext.measurement.selection import SAE_TRAINING, TokenSelection
from darkmatter_ext.measurement.site import (
    SiteConfig,
    given_saes,
    listed_saes,
    site_contexts,
    site_notes,
    site_plan,
    site_selection,
    site_usage,
    sites_activations,
    trained_saes,
)
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.encoders import Encoder, as_encoder
from darkmatter_ext.saes.loading import describe_sae, load_sae

if TYPE_CHECKING:
    from sae_lens import SAE

WIDTHS = (512, 1024, 2048, 4096, 8192)  # of the demo's families
KS = (16, 32, 64)


@dataclass(frozen=True)
class FamilyConfig(SiteConfig):
    """Train TopK SAEs of several widths and k, and measure them all in one pass over the rest of the text."""

    ks: tuple[int, ...] = ()
    """instead of k, several: SAEs of every width are trained with each, the widest of several with the middle one only"""
    full_grid: bool = False
    """train the widest with every one of ks too: it takes about as long as all the others"""
    parity: str = "paper"
    """paper, or released-code: regressions on x without bias, b* of the norm tests and FVU on all tokens"""
    interval_groups: int = 10
    """groups of held-out contexts that confidence intervals come from; 1: no intervals"""

    def __post_init__(self) -> None:
        super().__post_init__()
        MeasureSettings(interval_groups=self.interval_groups, parity=self.parity, split=self.split)  # their own checks
        for k in () if self.sae else self.ks:
            if not 1 <= k <= min(self.widths, default=k):
                raise InputError(f"ks: must be from 1 to the least of widths ({min(self.widths)}), got {k}")
        for name in ("ks", "widths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"{name}: must be different numbers, got {list(values)}")

    @property
    def least_width(self) -> int:
        """Of an SAE to train; with ks, which have a rule of their own, k does not count."""
        return 1 if self.ks else self.k

    @property
    def widths_by_k(self) -> dict[int, tuple[int, ...]]:
        """k -> the widths trained with it."""
        every = sorted(self.ks) or [self.k]
        middle, widest = every[(len(every) - 1) // 2], max(self.widths, default=0)
        narrower = tuple(width for width in self.widths if width < widest) or self.widths
        return {k: self.widths if k == middle or self.full_grid else narrower for k in self.ks or (self.k,)}


AnyConfig = FamilyConfig | ManySaesConfig


def plan(config: AnyConfig, hooks: Sequence[str] = ()) -> list[str]:
    """What a run would do, in lines, without doing it; `hooks`: sites of a family, default its own."""
    if isinstance(config, ManySaesConfig):
        return many_saes.plan_lines(config)
    parts = [
        dataclasses.replace(config, hook=hook, widths=widths, ks=(), k=k)
        for hook in hooks or [config.hook]
        for k, widths in config.widths_by_k.items()
    ]
    lines = dict.fromkeys(line for part in parts for line in site_plan(part))
    return [*lines, f"measure   in one pass, intervals from {config.interval_groups} groups of contexts"]


@dataclass(frozen=True)
class FamilySite:
    """One hook point of a family: its activations, the role of each token, its SAEs with their folders."""

    hook: str
    cache: ActivationCache
    selection: TokenSelection
    saes: dict[str, tuple[SAE, Path]]


def given_hooks(config: FamilyConfig) -> dict[str, tuple[str, ...]]:
    """Hook point -> folders of sae that name it (hook where one names none).

    Raises ValueError for an SAE that cannot be loaded.
    """
    found: dict[str, tuple[str, ...]] = {}
    for folder in config.sae:
        hook = translated_hook(own_hook(describe_sae(folder))) or config.hook
        found[hook] = (*found.get(hook, ()), folder)
    return found


def family_sites(config: FamilyConfig, hooks: Sequence[str], stages: Stages) -> dict[str, FamilySite]:
    """Activations and SAEs at each of `hooks`, from one reading of the text: those of sae, or trained here.

    Raises ValueError for bad settings, an SAE of another site; RuntimeError for a damaged cache.
    """
    given = given_hooks(config)
    if stray := next((hook for hook in given if hook not in hooks), None):
        raise InputError(f"sae: must be of the site {' or '.join(hooks)}, got one of {stray} in {given[stray][0]}")
    caches = sites_activations(config, hooks, site_contexts(config, stages), stages)
    sites = {}
    for hook in hooks:
        own = dataclasses.replace(config, hook=hook)
        selection, saes = site_selection(own, caches[hook]), {}
        if config.sae:
            saes = given_saes(narrowed(own, given.get(hook, ())), caches[hook])
        to_train = {} if config.sae else config.widths_by_k
        for k, widths in to_train.items():
            part = dataclasses.replace(own, widths=widths, ks=(), k=k)
            found = trained_saes(part, caches[hook], selection, stages)
            saes |= {f"{name}-k{k}" if len(config.ks) > 1 else name: sae for name, sae in found.items()}
        sites[hook] = FamilySite(hook, caches[hook], selection, saes)
    return sites


def measured_family(
    config: FamilyConfig,
    stages: Stages,
    *,
    hooks: Sequence[str] = (),
    sites: dict[str, FamilySite] | None = None,
    predictors: Mapping[str, Callable[[dict[str, FamilySite]], MeasuredSae]] | None = None,
    targets: Sequence[str] = (),
    encoders: Encoders | None = None,
    loss: bool = False,
    token_means: bool = False,
) -> Measured:
    """Measure every SAE of a family on the text that trained none of them.

    Args:
        hooks: sites of the family; default hook alone.
        sites: of `family_sites`, where the caller has them already.
        predictors: name -> what makes its SAE from the sites; joins x as a predictor of the errors.
        targets: the sites whose SAEs are measured (the others serve predictors only); default all.
        encoders: how each SAE is used, by name, instead of by its own encoder; see `many_saes.measured`.
        loss: also the model's loss at every token.
        token_means: also the baseline of the mean over a token's occurrences.

    Raises ValueError for bad settings, SAEs that do not fit; RuntimeError for damaged files.
    """
    hooks = list(hooks or [config.hook])
    targets = list(targets or hooks)
    sites = sites or family_sites(config, hooks, stages)
    source = _source(config, sites, stages, loss=loss)
    listed = [entry for own in _listed([sites[hook] for hook in targets]) for entry in with_encoders(own, encoders)]
    scales = dict(zip(config.sae, site_usage(config).scales, strict=False))
    saes = [_as_measured(entry, config.device, scales.get(entry["folder"]), encoders) for entry in listed]
    others = [Predictor(name, make(sites)) for name, make in (predictors or {}).items()]
    vocabulary = 1 + int(sites[hooks[0]].cache.column("tokens").max()) if token_means else 0
    settings = _settings(config, vocabulary)
    deciding = {
        "caches": [site.cache.folder.name for site in sites.values()],
        "files": {str(folder): stamp(folder) for site in sites.values() for _, folder in site.saes.values()},
        "targets": targets,
        "saes": [entry["name"] for entry in listed],
        **variant_fields(config, FamilyConfig, list(encoders or ())),
        "predictors": [other.name for other in others],
        "k": config.k if others else None,  # of random predictors
        "loss": loss,
        "text": source.identity,
        "settings": dataclasses.asdict(settings),
    }
    folder = cache_dir("runs") / fingerprint(**deciding)
    with stages.stage("measure", tokens_to_read(source, settings)) as advance:
        found = measure(
            source,
            saes,
            settings,
            folder=folder,
            predictors=dict.fromkeys(targets, others),
            config=deciding,
            progress=advance,
        )
    return Measured(
        found,
        [other.name for other in others],
        listed,
        dataclasses.asdict(config) | {"hook": ", ".join(targets)},
        _notes(config, sites),
        token_counts(found),
        folder,
        {"text_sha256": sites[hooks[0]].cache.meta["text_sha256"]},
    )


def _source(config: FamilyConfig, sites: dict[str, FamilySite], stages: Stages, *, loss: bool) -> SelectedContexts:
    """The contexts that trained no SAE, at all sites."""
    first = next(iter(sites.values()))
    chosen = (first.selection.roles != SAE_TRAINING).all(1).nonzero().flatten()
    losses = None
    if loss:
        tokens = first.cache.column("tokens")[chosen]
        with stages.stage("loss of the language model", tokens.numel()) as advance:
            losses = stored_losses(config.model, tokens, device=config.device, progress=advance)
    return SelectedContexts(CacheSource({hook: site.cache for hook, site in sites.items()}), chosen, losses)


def _notes(config: FamilyConfig, sites: dict[str, FamilySite]) -> list[str]:
    """What a reader must know of each site; the hook point is named where there are several."""
    return [
        f"{hook}: {note}" if len(sites) > 1 else note
        for hook, site in sites.items()
        for note in site_notes(config, site.cache, site.selection, site.saes)
    ]


def _listed(sites: Sequence[FamilySite]) -> list[dict[str, Any]]:
    """What results list of each SAE; names carry the hook point where several are measured."""
    several = len(sites) > 1
    return [
        entry | {"name": f"{site.hook}/{entry['name']}" if several else entry["name"], "hook": site.hook}
        for site in sites
        for entry in listed_saes(site.saes)
    ]


def _as_measured(entry: dict[str, Any], device: str, scale: float | None, encoders: Encoders | None) -> MeasuredSae:
    make = encoders[entry["variant"]] if encoders else as_encoder

    def load() -> Encoder:
        return make(load_sae(entry["folder"], device=device, activation_scale=scale))

    return MeasuredSae(entry["name"], entry["hook"], entry["d_sae"], load)


def _settings(config: FamilyConfig, vocabulary: int) -> MeasureSettings:
    wanted = site_usage(config)
    return MeasureSettings(
        split=config.split,
        fit_fraction=config.fit_fraction,
        drop_positions=config.drop_positions,
        max_norm_ratio=config.max_norm_ratio,
        interval_groups=config.interval_groups,
        parity=config.parity,
        token_means=vocabulary,
        positions=wanted.positions,
        excluded_tokens=excluded_ids(wanted.special_tokens, config.model),
        seed=config.seed,
    )


def measured(config: AnyConfig, stages: Stages, encoders: Encoders | None = None) -> Measured:
    """Measure the SAEs of either kind of configuration at their own sites, with their own encoders or others."""
    if isinstance(config, ManySaesConfig):
        return many_saes.measured(config, stages, encoders)
    return measured_family(config, stages, encoders=encoders)
