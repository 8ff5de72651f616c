"""Stored activations at two sites with small SAEs on them: what the tests of measurements share, and their child processes."""

import json
from pathlib import Path

import torch

from cases.models import small_sae
from darkmatter_ext.activations import store
from darkmatter_ext.activations.sources import CacheSource
from darkmatter_ext.measurement import engine
from darkmatter_ext.measurement.tokens import TokenRoles
from darkmatter_ext.saes.encoders import Encoder, as_encoder

HOOKS = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
CONTEXTS, LENGTH, D = 60, 16, 12


def _measured(name, hook, architecture, d_sae, seed):
    def load():
        return as_encoder(small_sae(architecture, D, d_sae, seed))

    return Encoder.of_site(name, hook, d_sae, load, weight_bytes=8 * D * d_sae)


def decided(source, encoders, settings):
    """The roles of a source's tokens, as a run decides them."""
    hooks = list(dict.fromkeys(encoder.writes for encoder in encoders))
    return TokenRoles.decide(source, settings, hooks, drop_last=settings.parity == "released-code")


def measure(source, encoders, settings, **more):
    """The engine's `measure`, with the roles that a run decides."""
    return engine.measure(source, encoders, decided(source, encoders, settings), **more)


def saes():
    """Three SAEs at the first site, one at the second."""
    return [
        _measured("small", HOOKS[0], "topk", 24, 0),
        _measured("large", HOOKS[0], "topk", 64, 1),
        _measured("jump", HOOKS[0], "jumprelu", 32, 2),
        _measured("mlp", HOOKS[1], "topk", 24, 3),
    ]


def write_caches(folder: Path):
    """Two caches of the same 60 contexts of 16 tokens from 20 documents, with attention sinks and one odd token."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-0.5, 0.5, D)
    x = torch.randn(CONTEXTS, LENGTH, D, generator=generator) * scales + torch.cat(
        [torch.tensor([5.0]), torch.zeros(D - 1)]
    )
    mlp = 0.5 * torch.tanh(x) + 0.3 * torch.randn(CONTEXTS, LENGTH, D, generator=generator)
    x[:, 0] *= 30
    x[7, 9] *= 200
    tokens = torch.randint(0, 40, (CONTEXTS, LENGTH), generator=generator)
    for hook, values in zip(HOOKS, (x, mlp), strict=True):
        store_activations(folder / hook, hook, values, tokens, torch.arange(CONTEXTS) // 3)
    return open_caches(folder)


def store_activations(folder, hook, x, tokens, documents):
    """A cache folder of activations x [C, L, d] in three shards."""
    folder.mkdir(parents=True)
    size = -(-len(x) // 3)
    for number in range(3):
        rows = slice(size * number, size * number + size)
        store._write_shard(folder, number, x[rows], tokens[rows], documents[rows])
    meta = {
        "hook": hook,
        "d_in": x.shape[2],
        "n_contexts": len(x),
        "context_length": x.shape[1],
        "tokens_sha256": "same",
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def open_caches(folder: Path) -> CacheSource:
    return CacheSource.open([folder / hook for hook in HOOKS])


def numbers(measurement):
    """Everything a measurement says, as one flat dict of floats."""
    found = {}
    for hook, site in measurement.items():
        for name in site.saes:
            found |= {f"{hook}/{name}/{key}": value for key, value in site.decomposition(name).numbers().items()}
            found |= {f"{hook}/{name}/latents/{i}": v for i, v in enumerate(site.latents[name].values.tolist())}
        found |= {f"{hook}/means/{key}": value for key, value in site.token_mean_r2().items()}
        first = next(iter(site.saes))
        fit = site.scalar_fit([f"{first}/l0", "x_norm"], [f"{first}/error_norm"])
        found |= {f"{hook}/scalar": fit.r2, f"{hook}/left_out": site.left_out.by_norm}
    return found
