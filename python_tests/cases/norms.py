"""SAEs whose error norms are planted functions of the activations, and the tensors of a finished run on the small model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from cases.measured import store_activations
from cases.planted import plain_map, plain_r2, planted_sae
from darkmatter_ext.activations.sources import CacheSource
from darkmatter_ext.measurement.run import measured, prepare
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.measurement.tokens import SAE_TRAINING
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encoder

HOOK = "blocks.1.hook_resid_post"


def stored(folder, x: Tensor, tokens: Tensor) -> CacheSource:
    """A cache of x [C, L, d] and tokens [C, L], a document every two contexts."""
    store_activations(folder / HOOK, HOOK, x, tokens, torch.arange(len(x)) // 2)
    return CacheSource.open([folder / HOOK])


def erring_sae(name, error_of, l0_of=lambda x: torch.ones(len(x))) -> Encoder:
    """An "SAE" of 64 latents that errs by error_of(x) [n, d] with l0_of(x) [n] active ones."""

    def codes(x):
        return (torch.arange(64) < l0_of(x)[:, None]).float()

    return planted_sae(name, HOOK, lambda x: (x.double() - error_of(x.double())).float(), codes, d_sae=64)


def r2(given: Tensor, y: Tensor, fit: Tensor, *, bias=True) -> float:
    """Held-out R2 of least squares from given [n, p] to y [n], in plain torch."""
    given, y = given.double(), y[:, None].double()
    return plain_r2(plain_map(given[fit], y[fit], bias=bias)(given[~fit]), y[~fit])


class Finished(NamedTuple):
    """A finished run on the small model: the tensors it was made from."""

    x: Tensor  # [n, d] measured tokens
    ids: Tensor  # [n]
    contexts: Tensor  # [C, L] token ids of the contexts
    places: tuple[Tensor, Tensor]  # context and position of every token
    fit: Tensor  # [n] bool
    saes: dict[str, SAE]

    @classmethod
    def of(cls, settings, hook) -> Finished:
        """Of a site: roles from the table of held-out tokens, everything else from the cache."""
        stages = Stages(show=False)
        inputs = prepare(settings, stages)
        site, measure = inputs.stored[hook], settings.measure
        table = measured(inputs, stages).sites[hook].per_token
        held_out = torch.tensor(read_tokens(table)["context"].to_pylist()).unique()
        chosen = (site.roles != SAE_TRAINING).all(1).nonzero().flatten()
        contexts = site.cache.column("tokens")[chosen]
        last = contexts.shape[1] - (measure.loss or measure.parity == "released-code")
        kept = torch.zeros(contexts.shape, dtype=torch.bool)
        kept[:, measure.drop_positions : last] = True
        context, position = kept.nonzero().unbind(1)
        x = torch.cat([shard.activations for shard in site.cache.shards()])[chosen].float()[kept]
        fit = ~torch.isin(context, held_out)
        return cls(x, contexts[kept], contexts, (context, position), fit, {s.name: s.load() for s in inputs.of(hook)})

    def error(self, name: str) -> Tensor:
        """[n, d] x less the SAE's own forward, by SAELens."""
        with torch.no_grad():
            return (self.x - self.saes[name](self.x)).double()
