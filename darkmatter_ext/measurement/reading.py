"""Read tokens of some roles once more, for what an experiment needs besides the sums of a measurement."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.measurement.tokens import TokenRoles

READ_CONTEXTS = 16  # contexts read at a time


class Again(NamedTuple):
    """Some tokens at a site."""

    x: Tensor  # [n, d]
    documents: Tensor  # [n] int64


def tokens_again(
    source: Source, roles: TokenRoles, hook: str, wanted: Collection[int], *, limit: int, seed: int, device: str = "cpu"
) -> Iterator[Again]:
    """Activations and documents of at most `limit` tokens with the wanted roles at a site, from contexts in a seeded order.

    Cost: if activations are streamed, the model runs again on as many contexts as the tokens need.
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
