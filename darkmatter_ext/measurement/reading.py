"""Tokens of some roles read once more, for what an experiment needs beside the sums of a measurement."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.measurement.tokens import TokenRoles

READ_CONTEXTS = 16  # at a time


class Again(NamedTuple):
    """Some tokens of a site."""

    x: Tensor  # [n, d]
    documents: Tensor  # [n] int64


def tokens_again(
    source: Source, roles: TokenRoles, hook: str, wanted: Collection[int], *, limit: int, seed: int, device: str = "cpu"
) -> Iterator[Again]:
    """Activations at a site, and documents, of tokens with some roles, from contexts in a seeded order, `limit` tokens at most.

    Cost: where activations are streamed, the model runs again over as many contexts as the tokens need.
    """
    order = torch.randperm(source.n_contexts, generator=torch.Generator().manual_seed(seed))
    if roles.settings.split != "tokens":
        order = order[torch.isin(roles.contexts[order], torch.tensor(sorted(wanted)))]
    left = limit
    for part in order.split(READ_CONTEXTS):
        if left <= 0:
            return
        numbers = part.sort().values
        batch = source.read(numbers.tolist())
        found, _ = roles.of(batch, hook)
        chosen = torch.isin(found, torch.tensor(sorted(wanted)))
        documents = source.documents[numbers][:, None].expand(chosen.shape)
        again = Again(batch.activations[hook][chosen][:left].to(device), documents[chosen][:left])
        left -= len(again.x)
        yield again
