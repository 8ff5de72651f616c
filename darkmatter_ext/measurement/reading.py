"""Tokens of some roles read once more, for what an experiment needs beside the sums of a measurement."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.measurement.tokens import TokenRoles

READ_CONTEXTS = 16  # at a time


def tokens_again(
    source: Source, roles: TokenRoles, hook: str, wanted: Collection[int], *, limit: int, seed: int, device: str = "cpu"
) -> Iterator[Tensor]:
    """Activations [n, d] at a site of tokens with some roles, from contexts in a seeded order, `limit` tokens at most.

    Cost: where activations are streamed, the model runs again over as many contexts as the tokens need.
    """
    order = torch.randperm(source.n_contexts, generator=torch.Generator().manual_seed(seed))
    if roles.settings.split != "tokens":
        order = order[torch.isin(roles.contexts[order], torch.tensor(sorted(wanted)))]
    left = limit
    for part in order.split(READ_CONTEXTS):
        if left <= 0:
            return
        batch = source.read(part.sort().values.tolist())
        found, _ = roles.of(batch, hook)
        rows = batch.activations[hook][torch.isin(found, torch.tensor(sorted(wanted)))][:left]
        left -= len(rows)
        yield rows.to(device)
