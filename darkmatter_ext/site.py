"""One site of a language model, ready to be measured: configuration, activations, which tokens, SAEs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from darkmatter_ext.activations import (
    ActivationCache,
    Contexts,
    activation_caches,
    load_tokenizer,
    parse_hook,
    tokenize_contexts,
)
from darkmatter_ext.embedded import EMBEDDED_MODEL
from darkmatter_ext.progress import Stages
from darkmatter_ext.sae import load_sae
from darkmatter_ext.selection import (
    FIT,
    SAE_TRAINING,
    TokenSelection,
    require_same_tokens,
    select_tokens,
    tokens_with_role,
)
from darkmatter_ext.storage import cache_dir, fingerprint
from darkmatter_ext.text import documents
from darkmatter_ext.training import TrainingConfig, save_sae, train_topk_sae

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True)
class SiteConfig:
    """What every experiment at one site of a language model needs to know: model, text, SAEs, which tokens."""

    model: str = EMBEDDED_MODEL
    """the embedded model, a local folder, or a Hugging Face id of a causal language model"""
    hook: str = "blocks.10.hook_resid_post"
    """site, as TransformerLens and SAELens name it"""
    sae: tuple[str, ...] = ()
    """folders of SAEs in SAELens' format; none: train TopK SAEs of --widths here"""
    text: str = ""
    """UTF-8 text file to measure on; default: the documentation installed on this machine"""
    dataset: str = ""
    """Hugging Face dataset (hub id or local path) with a column `text`, instead of --text"""
    tokens: int = 200_000
    """tokens of text, first positions included; both SAE training and measurement come out of them"""
    context_length: int = 256
    """tokens a context, BOS included"""
    drop_positions: int = 8
    """leave out the first positions of each context"""
    max_norm_ratio: float = 10.0
    """leave out tokens with a norm above this many medians; 0: keep all"""
    split: str = "documents"
    """what is never divided between fit and held-out: documents, contexts or tokens (as in the paper)"""
    sae_fraction: float = 0.6
    """share of the text that trains the SAEs and is not measured (unused with --sae)"""
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
        minimum = {"tokens": 2 * self.context_length, "context_length": 2, "k": 1, "steps": 1, "drop_positions": 0}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"{_flag(name)}: must be at least {least}, got {getattr(self, name)}")
        for name in ("sae_fraction", "fit_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)}: must be between 0 and 1, got {getattr(self, name)}")
        if not self.sae and not self.widths:
            raise ValueError("--widths: must name at least one width when no --sae is given, got none")
        for width in self.widths:
            if width < self.least_width:
                raise ValueError(f"--widths: must be at least k ({self.least_width}), got {width}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"--device: must be cpu or cuda, got {self.device!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device: must be available, got {self.device!r} on a machine without a CUDA device")

    @property
    def least_width(self) -> int:
        """Of an SAE to train."""
        return self.k


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def site_plan(config: SiteConfig) -> list[str]:
    """What a run at this site would do, in lines, without doing it."""
    source = config.text or config.dataset or "documentation installed on this machine"
    saes = list(config.sae) or [
        f"train TopK, {width} latents, k {config.k}, {config.steps} steps" for width in config.widths
    ]
    return [
        f"model     {config.model}, {config.hook}, on {config.device}",
        f"text      {source}: {config.tokens} tokens in contexts of {config.context_length}",
        f"left out  positions below {config.drop_positions}; norms above {config.max_norm_ratio:g} medians",
        f"split     by {config.split}, seed {config.seed}",
        *(f"SAE       {sae}" for sae in saes),
    ]


def site_contexts(config: SiteConfig, stages: Stages) -> Contexts:
    """The configured text in contexts of tokens."""
    with stages.stage("tokenise text"):
        return tokenize_contexts(
            load_tokenizer(config.model),
            documents(text=config.text, dataset=config.dataset),
            n_tokens=config.tokens,
            context_length=config.context_length,
        )


def sites_activations(
    config: SiteConfig, hooks: Sequence[str], contexts: Contexts, stages: Stages
) -> dict[str, ActivationCache]:
    """The activations of the contexts at every hook point, from the cache where they are."""
    with stages.stage("run the language model", contexts.tokens.numel()) as advance:
        caches = activation_caches(config.model, hooks, contexts, device=config.device, progress=advance)
    for cache in caches.values():
        require_same_tokens(contexts.tokens, cache.column("tokens"))
    return caches


def site_selection(config: SiteConfig, cache: ActivationCache) -> TokenSelection:
    """The role of every token; none trains SAEs where they are given. Raises ValueError when a side is empty."""
    return select_tokens(
        cache,
        drop_positions=config.drop_positions,
        max_norm_ratio=config.max_norm_ratio,
        sae_fraction=0.0 if config.sae else config.sae_fraction,
        fit_fraction=config.fit_fraction,
        split=config.split,
        seed=config.seed,
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
                metadata = {"model_name": config.model, "hook_name": config.hook, "context_size": config.context_length}
                sae, report = train_topk_sae(x.to(config.device), training, metadata=metadata, progress=advance)
                save_sae(sae, folder, report, training)
        saes[f"topk-{width}"] = load_sae(folder, device=config.device), folder
    return saes


def given_saes(config: SiteConfig, cache: ActivationCache) -> dict[str, tuple[SAE, Path]]:
    saes: dict[str, tuple[SAE, Path]] = {}
    for given in config.sae:
        folder = Path(given)
        sae = load_sae(folder, device=config.device)
        if sae.cfg.d_in != cache.d_in:
            raise ValueError(f"--sae: must have d_in {cache.d_in} as {config.hook}, got {sae.cfg.d_in} in {folder}")
        own_hook = sae.cfg.metadata.hook_name
        if own_hook not in (None, config.hook):
            raise ValueError(f"--sae: must be of the site {config.hook}, got one of {own_hook} in {folder}")
        name = folder.resolve().name
        saes[name if name not in saes else str(folder)] = sae, folder
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


def site_notes(config: SiteConfig, cache: ActivationCache, selection: TokenSelection) -> list[str]:
    total = cache.n_contexts * cache.context_length
    notes = [
        f"{selection.dropped_positions} of {total} tokens are left out by position (below {config.drop_positions}), "
        f"{selection.high_norm_tokens} by norm (above {config.max_norm_ratio:g} medians, "
        f"{selection.high_norm_share:.2%} of the squared norm of the others and theirs).",
        f"Split by {config.split}: {selection.count(SAE_TRAINING)} tokens train the SAEs and are not measured.",
    ]
    d_in, fit = cache.d_in, selection.count(FIT)
    if fit < 20 * d_in:
        notes.append(f"b* has {d_in} inputs and {fit} tokens to fit them: expect overfitting (see r2_vec_train).")
    return notes
