"""`darkmatter run decomposition`: the dark matter of the SAEs of one site, measured on held-out text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from darkmatter_ext import many_saes, many_saes_config
from darkmatter_ext import sae as sae_module
from darkmatter_ext.activations import ActivationCache, load_tokenizer
from darkmatter_ext.decomposition import Decomposition, Reconstruct, TokenBatch, decompose_stream
from darkmatter_ext.error import sae_error
from darkmatter_ext.many_saes import Measured
from darkmatter_ext.many_saes_config import ManySaesConfig
from darkmatter_ext.progress import Stages
from darkmatter_ext.results import Result, provenance
from darkmatter_ext.selection import HELD_OUT, UNUSED, MeasuredBatches, TokenSelection
from darkmatter_ext.site import SiteConfig, listed_saes, prepared_site, site_notes, site_plan

EXCERPT_TOKENS = 60  # of the per-token figure: one line of text that can still be read
SHOWN_HIGH_NORM_TOKENS = 8


@dataclass(frozen=True)
class DecompositionConfig(SiteConfig):
    """Measure linear and nonlinear SAE error at one site of a language model."""


DEMO = DecompositionConfig()
PRESETS: dict[str, DecompositionConfig | ManySaesConfig] = {"demo": DEMO, **many_saes_config.PRESETS}


def plan(config: DecompositionConfig | ManySaesConfig) -> list[str]:
    """What a run would do, in lines, without doing it."""
    return many_saes.plan_lines(config) if isinstance(config, ManySaesConfig) else site_plan(config)


def _excerpt(
    config: DecompositionConfig,
    cache: ActivationCache,
    selection: TokenSelection,
    saes: dict[str, Reconstruct],
    found: dict[str, Decomposition],
) -> dict[str, Any]:
    """Per-token squared norms of error and nonlinear error over a piece of held-out text, for the figure."""
    context = int((selection.roles == HELD_OUT).sum(1).argmax())
    start = config.drop_positions
    for shard in cache.shards():
        if shard.first_context <= context < shard.first_context + len(shard.tokens):
            row = context - shard.first_context
            x = shard.activations[row, start : start + EXCERPT_TOKENS].to(config.device)
            tokens = shard.tokens[row, start : start + EXCERPT_TOKENS]
            break
    else:
        raise RuntimeError(f"activation cache: context {context} is missing; delete {cache.folder}")
    tokenizer = load_tokenizer(config.model)
    curves = {}
    for name, reconstruct in saes.items():
        batch = TokenBatch(x, torch.zeros(len(x), dtype=torch.bool))
        error = sae_error(x, reconstruct(batch).x_hat).double()
        nonlinear = error - found[name].error_map(x)
        curves[name] = {
            "error": error.square().sum(-1).tolist(),
            "nonlinear": nonlinear.square().sum(-1).tolist(),
        }
    return {
        "tokens": [tokenizer.decode([token]) for token in tokens.tolist()],
        "squared_norm_x": x.double().square().sum(-1).tolist(),
        "squared_norms": curves,
    }


def _high_norm_tokens(
    config: DecompositionConfig, cache: ActivationCache, selection: TokenSelection
) -> list[dict[str, Any]]:
    """The tokens of largest norm, whatever rule they fell under: nothing is left out unseen."""
    norms, tokens = cache.column("norms"), cache.column("tokens")
    tokenizer = load_tokenizer(config.model)
    shown = []
    for flat in norms.flatten().topk(min(SHOWN_HIGH_NORM_TOKENS, norms.numel())).indices.tolist():
        context, position = divmod(flat, cache.context_length)
        shown.append(
            {
                "token": tokenizer.decode([int(tokens[context, position])]),
                "position": position,
                "norm_over_median": norms[context, position].item() / selection.median_norm,
                "left_out": int(selection.roles[context, position]) == UNUSED,
            }
        )
    return shown


def _from_predictors(measured: Measured, sae: str) -> dict[str, float]:
    """R2 of each predictor, and of all together, for error, linear and nonlinear error."""
    site, numbers = measured.site_of(sae), {}
    sets = {name: [name] for name in measured.predictors}
    if len(sets) > 1:
        sets["all predictors"] = measured.predictors
    for name, used in sets.items():
        for part in ("error", "linear", "nonlinear"):
            numbers[f"{sae}/r2_from/{name}/{part}"] = site.part_fit(used, sae, part).r2
    return numbers


def _run_many(config: ManySaesConfig, stages: Stages) -> Result:
    """Many SAEs that exist already, streamed; in every process of a torchrun."""
    measured = many_saes.measured(config, stages)
    with stages.stage("decompose the error"):
        numbers = measured.numbers | measured.sae_numbers()
        for sae in measured.saes:
            numbers |= _from_predictors(measured, sae["name"])
    return Result(
        experiment="decomposition",
        config=measured.config,
        numbers=numbers,
        series={
            "saes": measured.saes,
            "excerpt": many_saes.excerpt(measured),
            "per_token": {hook: str(site.per_token) for hook, site in measured.sites.items()},
        },
        notes=measured.notes,
        seconds=stages.seconds,
        provenance=provenance(config.device),
    )


def run(config: DecompositionConfig | ManySaesConfig, stages: Stages) -> Result:
    """Measure; see the module of the same name one level up for the method.

    Raises ValueError for bad settings, a missing SAE, text too short; RuntimeError for a damaged cache or checkpoint.
    """
    if isinstance(config, ManySaesConfig):
        return _run_many(config, stages)
    cache, selection, saes = prepared_site(config, stages)
    reconstruct = {name: sae_module.as_reconstruct(sae) for name, (sae, _) in saes.items()}
    with stages.stage("decompose the error"):
        batches = MeasuredBatches(cache, selection.roles, config.device)
        found = decompose_stream(batches, reconstruct)
    numbers = selection.numbers()
    for name, decomposition in found.items():
        numbers |= {f"{name}/{key}": value for key, value in decomposition.numbers().items()}
    return Result(
        experiment="decomposition",
        config=dataclasses.asdict(config),
        numbers=numbers,
        series={
            "saes": listed_saes(saes),
            "excerpt": _excerpt(config, cache, selection, reconstruct, found),
            "largest_norm_tokens": _high_norm_tokens(config, cache, selection),
        },
        notes=site_notes(config, cache, selection),
        seconds=stages.seconds,
        provenance=provenance(config.device) | {"text_sha256": cache.meta["text_sha256"]},
    )
