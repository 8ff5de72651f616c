"""SAEs whose error norms are planted functions of the activations, and the tensors of a finished run on the small model."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from darkmatter_ext import activations
from darkmatter_ext.family import family_sites, measured_family
from darkmatter_ext.measurement import MeasuredSae
from darkmatter_ext.per_token import read_tokens
from darkmatter_ext.progress import Stages
from darkmatter_ext.sae import Encoded
from darkmatter_ext.selection import SAE_TRAINING
from darkmatter_ext.sources import CacheSource
from darkmatter_ext.sparse import SparseActs

HOOK = "blocks.1.hook_resid_post"


def stored(folder, x: Tensor, tokens: Tensor) -> CacheSource:
    """A cache of x [C, L, d] and tokens [C, L], a document every two contexts."""
    own = folder / HOOK
    own.mkdir(parents=True)
    activations._write_shard(own, 0, x, tokens, torch.arange(len(x)) // 2)
    meta = {
        "hook": HOOK,
        "d_in": x.shape[2],
        "n_contexts": len(x),
        "context_length": x.shape[1],
        "tokens_sha256": "same",
    }
    (own / "meta.json").write_text(json.dumps(meta))
    return CacheSource.open([own])


def planted_sae(name, error_of, l0_of=lambda x: torch.ones(len(x))) -> MeasuredSae:
    """An "SAE" that errs by error_of(x) [n, d] with l0_of(x) [n] active latents."""

    def encode(x):
        ones = torch.ones(len(x), 1)
        acts = SparseActs.fixed(ones, torch.zeros(len(x), 1, dtype=torch.int64), 4)
        return Encoded((x.double() - error_of(x.double())).float(), l0_of(x), acts)

    return MeasuredSae(name, HOOK, 4, lambda: encode)


def r2(given: Tensor, y: Tensor, fit: Tensor, *, bias=True) -> float:
    """Held-out R2 of least squares from given [n, p] to y [n], in plain torch."""
    given = torch.cat([given, torch.ones(len(given), 1)], 1).double() if bias else given.double()
    weight = torch.linalg.lstsq(given[fit], y[fit, None].double()).solution
    residual = y[~fit] - (given[~fit] @ weight)[:, 0]
    return (1 - residual.square().sum() / (y[~fit] - y[~fit].mean()).square().sum()).item()


class Finished(NamedTuple):
    """A finished run on the small model: the tensors it was made from."""

    x: Tensor  # [n, d] measured tokens
    ids: Tensor  # [n]
    contexts: Tensor  # [C, L] token ids of the contexts
    places: tuple[Tensor, Tensor]  # context and position of every token
    fit: Tensor  # [n] bool
    saes: dict[str, SAE]

    @classmethod
    def of(cls, config, hook, hooks, **more) -> Finished:
        """Of a family's site: roles from the table of held-out tokens, everything else from the cache."""
        stages = Stages(show=False)
        site = family_sites(config, hooks, stages)[hook]
        table = measured_family(config, stages, hooks=hooks, **more).sites[hook].per_token
        held_out = torch.tensor(read_tokens(table)["context"].to_pylist()).unique()
        chosen = (site.selection.roles != SAE_TRAINING).all(1).nonzero().flatten()
        contexts = site.cache.column("tokens")[chosen]
        last = config.context_length - ("loss" in more)
        kept = torch.zeros(contexts.shape, dtype=torch.bool)
        kept[:, config.drop_positions : last] = True
        context, position = kept.nonzero().unbind(1)
        x = torch.cat([shard.activations for shard in site.cache.shards()])[chosen].float()[kept]
        fit = ~torch.isin(context, held_out)
        return cls(x, contexts[kept], contexts, (context, position), fit, {n: sae for n, (sae, _) in site.saes.items()})

    def error(self, name: str) -> Tensor:
        """[n, d] x less the SAE's own forward, by SAELens."""
        with torch.no_grad():
            return (self.x - self.saes[name](self.x)).double()
