"""One site of a language model, ready to be measured: configuration, activations, which tokens, SAEs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL
from darkmatter_ext.activations.hook_points import translated_hook
from darkmatter_ext.activations.store import (
    ActivationCache,
    Contexts,
    activation_caches,
    check_fits,
    load_tokenizer,
    parse_hook,
    tokenize_contexts,
)
from darkmatter_ext.activations.text import bos_note, documents
from darkmatter_ext.measurement.metadata import DEFAULT_CONTEXT_LENGTH, InputFlags, Usage, excluded_ids, own_hook, usage
from darkmatter_ext.measurement.selection import (
    FIT,
    HELD_OUT,
    SAE_TRAINING,
    TokenSelection,
    require_same_tokens,
    select_tokens,
    tokens_with_role,
)
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir, fingerprint
from darkmatter_ext.saes.loading import describe_sae, load_sae
from darkmatter_ext.saes.sanity import SAMPLE_TOKENS, misloaded, signs
from darkmatter_ext.saes.training import TrainingConfig, save_sae, train_topk_sae

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True)
class SiteConfig(InputFlags):
    """What every experiment at one site of a language model needs to know: model, text, SAEs, which tokens."""

    model: str = EMBEDDED_MODEL
    """the embedded model, a local folder, or a Hugging Face id of a causal language model"""
    hook: str = "blocks.10.hook_resid_post"
    """site, as TransformerLens and SAELens name it"""
    sae: tuple[str, ...] = ()
    """folders of SAEs in SAELens' format; none: train TopK SAEs of widths here"""
    text: str = ""
    """UTF-8 text file to measure on; default: the documentation installed on this machine"""
    dataset: str = ""
    """Hugging Face dataset (hub id or local path) with a column `text`, instead of text"""
    tokens: int = 200_000
    """tokens of text, first positions included; both SAE training and measurement come out of them"""
    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians; 0: keep all"""
    split: str = "documents"
    """what is never divided between fit and held-out: documents, contexts or tokens (as in the paper)"""
    sae_fraction: float = 0.6
    """share of the text that trains the SAEs and is not measured (unused with sae)"""
    fit_fraction: float = 0.6
    """share of the measured text that the linear map is fitted on; the rest is held out"""
    widths: tuple[int, ...] = (1024, 2048, 4096)
    """latents of the SAEs to train"""
    k: int = 32
    """active latents a token of the SAEs to train"""
    steps: int = 400
    """training steps of 2048 tokens"""
    seed: int = 0
    """of the splits and of SAE training"""
    device: str = "cpu"
    """cpu or cuda"""

    def __post_init__(self) -> None:
        parse_hook(self.hook)
        self.check_inputs()
        if self.context_length == 1:
            raise InputError("context_length: must be at least 2 (0: as the SAEs' metadata says), got 1")
        shortest = 2 * (self.context_length or (2 if self.sae else DEFAULT_CONTEXT_LENGTH))
        minimum = {"tokens": shortest, "k": 1, "steps": 1, "drop_positions": 0}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        for name in ("sae_fraction", "fit_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name}: must be between 0 and 1, got {getattr(self, name)}")
        if not self.sae and not self.widths:
            raise InputError("widths: must name at least one width when no sae is given, got none")
        for width in self.widths:
            if width < self.least_width:
                raise InputError(f"widths: must be at least k ({self.least_width}), got {width}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise InputError(f"device: must be cpu or cuda, got {self.device!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device: must be available, got {self.device!r} on a machine without a CUDA device")

    @property
    def least_width(self) -> int:
        """Of an SAE to train."""
        return self.k


def site_usage(config: SiteConfig) -> Usage:
    """How the inputs of a configuration are made: as its SAEs say, unless flags say otherwise.

    Raises ValueError for SAEs that cannot be read or do not agree.
    """
    return usage([describe_sae(spec) for spec in config.sae], config, model=config.model)


def refuse_processing(config: SiteConfig) -> None:
    """What an experiment that splices into the model needs. Raises ValueError for SAEs of processed weights."""
    if asked := site_usage(config).processing:
        raise InputError(
            "backend: must be huggingface to splice into the model, got auto for SAEs that ask for weights processed by "
            f"TransformerLens ({', '.join(asked)})"
        )


def site_plan(config: SiteConfig) -> list[str]:
    """What a run at this site would do, in lines, without doing it."""
    source = config.text or config.dataset or "documentation installed on this machine"
    length = site_usage(config).context_length
    saes = list(config.sae) or [
        f"train TopK, {width} latents, k {config.k}, {config.steps} steps" for width in config.widths
    ]
    return [
        f"model     {config.model}, {config.hook}, on {config.device}",
        f"text      {source}: {config.tokens} tokens in contexts of {length}",
        f"left out  positions below {config.drop_positions}; norms above {config.max_norm_ratio:g} medians",
        f"split     by {config.split}, seed {config.seed}",
        *(f"SAE       {sae}" for sae in saes),
    ]


def site_contexts(config: SiteConfig, stages: Stages) -> Contexts:
    """The configured text in contexts of tokens. Raises ValueError for contexts the model does not take."""
    wanted = site_usage(config)
    check_fits(config.model, context_length=wanted.context_length)
    with stages.stage("tokenise text"):
        contexts = tokenize_contexts(
            load_tokenizer(config.model),
            documents(text=config.text, dataset=config.dataset),
            n_tokens=config.tokens,
            context_length=wanted.context_length,
            prepend_bos=wanted.bos,
        )
    check_fits(config.model, tokens=(int(contexts.tokens.min()), int(contexts.tokens.max())))
    return contexts


def sites_activations(
    config: SiteConfig, hooks: Sequence[str], contexts: Contexts, stages: Stages
) -> dict[str, ActivationCache]:
    """The activations of the contexts at every hook point, from the cache where they are."""
    processing = site_usage(config).processing
    with stages.stage("run the language model", contexts.tokens.numel()) as advance:
        caches = activation_caches(
            config.model, hooks, contexts, device=config.device, processing=processing, progress=advance
        )
    for cache in caches.values():
        require_same_tokens(contexts.tokens, cache.column("tokens"))
    return caches


def site_selection(config: SiteConfig, cache: ActivationCache) -> TokenSelection:
    """The role of every token; none trains SAEs where they are given. Raises ValueError when a side is empty."""
    wanted = site_usage(config)
    return select_tokens(
        cache,
        drop_positions=config.drop_positions,
        max_norm_ratio=config.max_norm_ratio,
        sae_fraction=0.0 if config.sae else config.sae_fraction,
        fit_fraction=config.fit_fraction,
        split=config.split,
        seed=config.seed,
        positions=wanted.positions,
        excluded_tokens=excluded_ids(wanted.special_tokens, config.model),
    )


def trained_saes(
    config: SiteConfig, cache: ActivationCache, selection: TokenSelection, stages: Stages
) -> dict[str, tuple[SAE, Path]]:
    """One TopK SAE a width: trained on this text, or found from an earlier run that is the same in everything."""
    saes, x = {}, None
    for width in config.widths:
        training = TrainingConfig(d_sae=width, k=config.k, steps=config.steps, seed=config.seed)
        roles = fingerprint(roles=selection.roles.flatten().tolist())
        key = fingerprint(activations=cache.folder.name, roles=roles, training=dataclasses.asdict(training))
        folder = cache_dir("saes") / f"topk-{width}-{key}"
        with stages.stage(f"train SAE, {width} latents", training.steps) as advance:
            if not folder.exists():
                x = tokens_with_role(cache, selection.roles, SAE_TRAINING) if x is None else x
                wanted = site_usage(config)
                metadata = {"model_name": config.model, "hook_name": config.hook, "prepend_bos": wanted.bos}
                metadata["context_size"] = wanted.context_length
                sae, report = train_topk_sae(x.to(config.device), training, metadata=metadata, progress=advance)
                save_sae(sae, folder, report, training)
        saes[f"topk-{width}"] = load_sae(folder, device=config.device), folder
    return saes


def given_saes(config: SiteConfig, cache: ActivationCache) -> dict[str, tuple[SAE, Path]]:
    """Name -> (SAE, folder) of sae. Raises ValueError for one that cannot be loaded or is of another site."""
    saes: dict[str, tuple[SAE, Path]] = {}
    for given, scale in zip(config.sae, site_usage(config).scales, strict=True):
        found = describe_sae(given)
        if found.d_in != cache.d_in:
            raise InputError(f"sae: must have d_in {cache.d_in} as {config.hook}, got {found.d_in} in {given}")
        if (hook := translated_hook(own_hook(found))) not in ("", config.hook):
            raise InputError(f"sae: must be of the site {config.hook}, got one of {hook} in {given}")
        name = found.name if found.name not in saes else given
        saes[name] = load_sae(given, device=config.device, activation_scale=scale), Path(given)
    return saes


def prepared_site(
    config: SiteConfig, stages: Stages, cache: ActivationCache | None = None
) -> tuple[ActivationCache, TokenSelection, dict[str, tuple[SAE, Path]]]:
    """Activations (or those given), the role of every token, and name -> (SAE, folder): given ones or trained here."""
    for folder in config.sae:
        load_sae(folder)  # a bad SAE is told before the model runs for minutes
    if cache is None:
        cache = sites_activations(config, [config.hook], site_contexts(config, stages), stages)[config.hook]
    selection = site_selection(config, cache)
    saes = given_saes(config, cache) if config.sae else trained_saes(config, cache, selection, stages)
    return cache, selection, saes


def listed_saes(saes: dict[str, tuple[SAE, Path]]) -> list[dict[str, Any]]:
    """What a result says about each SAE, for its readers and figures."""
    return [
        {"name": name, "d_sae": sae.cfg.d_sae, "architecture": sae.cfg.architecture(), "folder": str(folder)}
        for name, (sae, folder) in saes.items()
    ]


def site_notes(
    config: SiteConfig,
    cache: ActivationCache,
    selection: TokenSelection,
    saes: Mapping[str, tuple[SAE, Path]] | None = None,
) -> list[str]:
    """What a reader must know of a site; of given SAEs also what was followed, and whether they look misloaded."""
    total, wanted = cache.n_contexts * cache.context_length, site_usage(config)
    special = f"{selection.special_tokens} for being special, " if wanted.special_tokens else ""
    within = f" or not in {slice(*wanted.positions)}" if wanted.positions else ""
    notes = [
        f"{selection.dropped_positions} of {total} tokens are left out by position (below {config.drop_positions}{within}), "
        f"{special}{selection.high_norm_tokens} by norm (above {config.max_norm_ratio:g} medians, "
        f"{selection.high_norm_share:.2%} of the squared norm of the others and theirs).",
        f"Split by {config.split}: {selection.count(SAE_TRAINING)} tokens train the SAEs and are not measured.",
    ]
    d_in, fit = cache.d_in, selection.count(FIT)
    if fit < 20 * d_in:
        notes.append(f"b* has {d_in} inputs and {fit} tokens to fit them: expect overfitting (see r2_vec_train).")
    if config.sae:
        processing = (
            f"; weights processed by TransformerLens ({', '.join(wanted.processing)})" if wanted.processing else ""
        )
        front = bos_note(load_tokenizer(config.model), wanted.bos)
        notes += [f"Contexts of {cache.context_length} tokens, {front}{processing}.", *wanted.notes]
        notes += _signs(cache, selection, saes or {})
    return notes


def _signs(cache: ActivationCache, selection: TokenSelection, saes: Mapping[str, tuple[SAE, Path]]) -> list[str]:
    """What makes given SAEs look misloaded, on some of the measured tokens."""
    shard = next(cache.shards())
    roles = selection.roles[: len(shard.tokens)]
    x = shard.activations[(roles == FIT) | (roles == HELD_OUT)]
    x = x[torch.linspace(0, max(0, len(x) - 1), min(len(x), SAMPLE_TOKENS)).long()]
    found = []
    for name, (sae, folder) in saes.items():
        own = signs(sae, x.to(sae.device), expected_l0=describe_sae(str(folder)).expected_l0)
        found += [misloaded(name, sign) for sign in own]
    return found
