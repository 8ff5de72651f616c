"""Estimate what a measurement will cost before it starts: downloads, memory, operations, and time from short timings.

Shapes: d width of the site, F latents, S SAEs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from darkmatter_ext.ops._library import has_kernels
from darkmatter_ext.ops.encode import prepare_encoder, threshold_encode
from darkmatter_ext.runtime.inputs import told
from darkmatter_ext.runtime.storage import parsed_json
from darkmatter_ext.saes.catalogue import KNOWN_MODELS, KnownModel

PROBE_TOKENS, PROBE_LATENTS = 512, 4096


@dataclass(frozen=True)
class PlannedSae:
    """The sizes of one SAE at one hook point."""

    name: str
    hook: str
    d_in: int
    d_sae: int


@dataclass(frozen=True)
class Cost:
    """The cost of a whole run, summed over all processes. Operations are two per multiply-add."""

    download_bytes: float
    weight_bytes: float  # of the SAEs, loaded
    largest_sae_bytes: float
    sum_bytes: float  # of the statistics
    model_operations: float
    encode_operations: float  # what a dense encoder would need; screening does most of them in 8 bits
    sum_operations: float


def known_model(model: str) -> KnownModel | None:
    """Sizes of a model, from the table or from the config.json of a local folder; None if they are not known here."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return KNOWN_MODELS.get(model)
    with told("model", "must have a config.json that can be read", path):
        config = dict(parsed_json(path.read_text()))
        config |= config.get("text_config") or {}
        d = config.get("hidden_size", config.get("n_embd"))
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        vocabulary = config.get("vocab_size")
        if d is None or layers is None or vocabulary is None:
            return None
        inner = config.get("intermediate_size") or 4 * d
        attention = 4 * d * d
        per_layer = attention + (2 if config.get("model_type") == "gpt2" else 3) * d * inner
        return KnownModel(d, layers, per_layer, vocabulary * d, 0)


def cost(
    model: KnownModel | None,
    saes: Sequence[PlannedSae],
    predictors: Sequence[PlannedSae] = (),
    *,
    depth: int,
    tokens: int,
    passes: int,
    groups: int,
    sae_bytes: int,
    download_saes: bool,
) -> Cost:
    """Compute costs by arithmetic. `predictors`: SAEs whose outputs join x; `depth`: blocks of the model that run;
    `groups`: number of groups of held-out contexts; `sae_bytes`: bytes per SAE weight as loaded.
    """
    weights = [2 * sae.d_in * sae.d_sae for sae in (*saes, *predictors)]
    sites, more = {sae.hook: sae.d_in for sae in saes}, sum(sae.d_in for sae in predictors)
    roles = 2 if passes == 2 else 3
    # Every role has one Gram matrix per site, held-out tokens one per group; errors are summed over fit and held-out tokens,
    # and with predictors over each group of held-out tokens.
    grams, errors = sum((d + more) ** 2 for d in sites.values()), sum((sae.d_in + more) * sae.d_in for sae in saes)
    sums = 8 * ((roles + groups - 1) * grams + (1 + groups if predictors else 2) * errors)
    per_token_sums = grams + errors + sum(sae.d_in**2 for sae in saes)
    own = 0.0 if model is None else model.layer_parameters * depth
    return Cost(
        download_bytes=(0.0 if model is None else model.file_bytes) + (4 * sum(weights) if download_saes else 0),
        weight_bytes=sae_bytes * sum(weights),
        largest_sae_bytes=sae_bytes * max(weights),
        sum_bytes=sums,
        model_operations=2.0 * own * tokens * passes,
        encode_operations=sum(weights) * tokens * passes,
        sum_operations=2.0 * per_token_sums * tokens,
    )


@dataclass(frozen=True)
class Rates:
    """Operations per second on this device: dense ones, and those of an encoder as this package runs it."""

    dense: float
    double: float
    encode: float


@torch.no_grad()
def probe(device: str, d: int) -> Rates:
    """Time one product in float32, one in float64 and one encoder of 4096 latents, about a second in all."""
    d = min(d, 1024)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_TOKENS, d, generator=generator).to(device)
    weight = (torch.randn(d, PROBE_LATENTS, generator=generator) / d**0.5).to(device)
    bias = torch.zeros(PROBE_LATENTS, device=device)
    prepared = prepare_encoder(weight, bias) if has_kernels(torch.device(device)) else None
    wide = x.double()

    def encode() -> None:
        if prepared is not None:
            threshold_encode(x, weight, bias, 2.5, prepared=prepared)
        else:
            _ = (x @ weight) > 2.5

    operations = 2.0 * PROBE_TOKENS * d * PROBE_LATENTS
    return Rates(
        dense=operations / _seconds(lambda: x @ weight, device),
        double=2.0 * PROBE_TOKENS * d * d / _seconds(lambda: wide.mT @ wide, device),
        encode=operations / _seconds(encode, device),
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """The best of three timings, after one warm-up."""
    best = float("inf")
    for attempt in range(4):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def _size(n_bytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for unit, factor in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.0f} s"


def cost_lines(found: Cost, rates: Rates, *, products: str, model_known: bool) -> list[str]:
    """The last lines of the plan: bytes, operations, time on this device."""
    sums = found.sum_operations / (rates.double if products == "float64" else rates.dense)
    parts = {
        "model": found.model_operations / rates.dense,
        "SAEs": found.encode_operations / rates.encode,
        "sums": sums,
    }
    shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    unknown = "" if model_known else " (without the model, whose size is not known before it is downloaded)"
    return [
        f"download  {_size(found.download_bytes)}{unknown}",
        f"memory    SAE weights {_size(found.weight_bytes)} (the largest {_size(found.largest_sae_bytes)}), "
        f"sums {_size(found.sum_bytes)}; sae_memory_gb loads SAEs in turn",
        f"operations  model {found.model_operations:.1e}, SAEs {found.encode_operations:.1e}, sums {found.sum_operations:.1e}",
        f"time      about {duration(sum(parts.values()))} on this device, one process ({shares}): arithmetic from "
        f"timings of a second ({rates.dense / 1e9:.0f} GFLOPS float32, {rates.double / 1e9:.0f} float64, "
        f"encoder {rates.encode / 1e9:.0f})",
    ]
