"""Stored activations with the role of each token, as read by whatever trains SAEs or splices into a model.

Shapes: C contexts of L tokens, d width of the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import PlacesToSplice
from darkmatter_ext.activations.store import CONTEXTS_PER_FORWARD, ActivationCache, ActivationShard
from darkmatter_ext.measurement.decompose import TokenBatch
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, SAE_TRAINING, UNUSED, LeftOut, TokenRoles
from darkmatter_ext.runtime.inputs import InputError


@dataclass(frozen=True)
class StoredTokens:
    """The activations at one site, each token with its role."""

    cache: ActivationCache
    roles: Tensor  # [C, L] uint8
    left_out: LeftOut  # over all contexts
    typical_norm: float
    largest_norm: float  # before any rule applies
    high_norm_share: float  # share of the squared norm of tokens kept by the other rules that the norm rule takes

    @classmethod
    def of(cls, cache: ActivationCache, hook: str, training: Tensor, roles: TokenRoles) -> StoredTokens:
        """`training` [C] bool: contexts that train SAEs; `roles`: those of the other contexts, numbered on their own.

        Raises InputError if no token is left on a side.
        """
        tokens, norms = cache.column("tokens"), cache.column("norms")
        found = torch.full(tokens.shape, SAE_TRAINING, dtype=torch.uint8)
        used, wanted, left_out = torch.zeros_like(tokens).bool(), torch.zeros_like(tokens).bool(), LeftOut()
        for chosen, trains in ((training, True), (~training, False)):
            used[chosen], more = roles.used(tokens[chosen], norms[chosen], hook, training=trains)
            wanted[chosen] = roles.wanted(tokens[chosen], training=trains)
            left_out += more
        found[~training] = roles.dealt(range(int((~training).sum()))).to(torch.uint8)
        found[~used] = UNUSED
        for name, role in (("fit", FIT), ("held-out", HELD_OUT)):
            if not bool((found == role).any()):
                settings = roles.settings
                raise InputError(
                    f"drop_positions, max_norm_ratio: must leave {name} tokens, got 0 of {found.numel()} tokens "
                    f"with {settings.drop_positions} and {settings.max_norm_ratio:g}"
                )
        energy = norms.double().square()
        share = (energy[wanted & ~used].sum() / energy[wanted].sum()).item()
        return cls(cache, found, left_out, roles.typical_norm[hook], norms.max().item(), share)

    def numbers(self) -> dict[str, float]:
        """What a result reports about the tokens, by name."""
        return {
            "tokens/sae_training": self.count(SAE_TRAINING),
            "tokens/fit": self.count(FIT),
            "tokens/held_out": self.count(HELD_OUT),
            **self.left_out.numbers(),
            "tokens/high_norm_share_of_energy": self.high_norm_share,
            "tokens/median_norm": self.typical_norm,
            "tokens/largest_norm": self.largest_norm,
        }

    def count(self, role: int) -> int:
        """The number of tokens with this role."""
        return int((self.roles == role).sum())

    def shards(self) -> Iterator[tuple[ActivationShard, Tensor]]:
        """The shards in order, each with the roles of its tokens; memory: one shard."""
        for shard in self.cache.shards():
            yield shard, self.roles[shard.first_context : shard.first_context + len(shard.tokens)]

    def with_role(self, role: int) -> Tensor:
        """All activations with this role, [n, d], in memory: the training set of an SAE."""
        return torch.cat([shard.activations[own == role] for shard, own in self.shards()])

    def documents_with(self, role: int) -> Tensor:
        """The document of every token with this role, [n] int64, in the order of `with_role`."""
        documents = self.cache.column("documents")[:, None].expand(self.roles.shape)
        return documents[self.roles == role]

    def mean(self, role: int) -> Tensor:
        """Mean activation [d], float32, of the tokens with this role; memory: one shard."""
        total = torch.zeros(self.cache.d_in, dtype=torch.float64)
        for shard, own in self.shards():
            total += shard.activations[own == role].double().sum(0)
        return (total / self.count(role)).float()


@dataclass(frozen=True)
class MeasuredBatches:
    """The measured tokens at a site, readable any number of times; memory: one shard."""

    tokens: StoredTokens
    device: str = "cpu"

    def __iter__(self) -> Iterator[TokenBatch]:
        start = 0
        for shard, roles in self.tokens.shards():
            measured = (roles == FIT) | (roles == HELD_OUT)
            x = shard.activations[measured].to(self.device)
            yield TokenBatch(x, (roles[measured] == FIT).to(self.device), start)
            start += len(x)


def check_whole_contexts(contexts: int, split: str) -> None:
    """Raise InputError unless the settings allow splicing into whole held-out contexts."""
    if contexts < 2:
        raise InputError(f"contexts: must be at least 2 (intervals are by document), got {contexts}")
    if split == "tokens":
        raise InputError("split: must be documents or contexts to splice into whole contexts, got 'tokens'")


def _turns(documents: Tensor) -> Tensor:
    """[n] how many equal entries precede each entry of documents [n]."""
    order = documents.sort(stable=True).indices
    sizes = documents.unique(return_counts=True)[1]  # in the sorted order of the documents
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    turns = torch.empty_like(order)
    turns[order] = torch.arange(len(order)) - first
    return turns


@dataclass(frozen=True)
class WholeContexts:
    """Whole contexts of one role, all of them or a seeded sample, for uses that need every position of a context."""

    tokens: StoredTokens
    numbers: Tensor  # [m] int64, ascending
    role: int = HELD_OUT

    @classmethod
    def sample(
        cls,
        tokens: StoredTokens,
        count: int,
        *,
        seed: int,
        role: int = HELD_OUT,
        documents: Tensor | None = None,
        argument: str = "contexts",
    ) -> WholeContexts:
        """Draw `count` contexts with `seed` from as many documents as possible. A document gives a second context only
        once every document has given one: a second one adds little, and intervals are by document.

        Args:
            role: role of their tokens, HELD_OUT or FIT.
            documents: int64 of any shape, the documents whose contexts may be drawn; default all.
            argument: the setting that an error is about.

        Raises InputError if there are fewer, or if held-out and fit tokens share contexts.
        """
        own, of = (tokens.roles == role).any(1), tokens.cache.column("documents")
        other = FIT if role == HELD_OUT else HELD_OUT
        if bool((own & (tokens.roles == other).any(1)).any()):
            raise InputError("split: must be documents or contexts to splice into whole contexts, got tokens")
        if documents is not None:
            own &= torch.isin(of, documents)
        numbers = own.nonzero().flatten()
        if count > len(numbers):
            about = "held-out contexts" if role == HELD_OUT else f"fit contexts of {tokens.cache.context_length} tokens"
            raise InputError(f"{argument}: must be at most the {len(numbers)} {about}, got {count}")
        order = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]
        turn = _turns(of[order])
        return cls(tokens, order[turn.sort(stable=True).indices[:count]].sort().values, role)

    def documents_of(self, contexts: Tensor) -> Tensor:
        """[n] int64 the documents of contexts [n], which are given by number in the cache."""
        return self.tokens.cache.column("documents")[contexts]

    @property
    def n_documents(self) -> int:
        """The number of documents the contexts come from."""
        return len(self.documents_of(self.numbers).unique())

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[PlacesToSplice]:
        for shard in self.tokens.cache.shards():
            first, last = shard.first_context, shard.first_context + len(shard.tokens)
            inside = self.numbers[(self.numbers >= first) & (self.numbers < last)]
            for part in inside.split(CONTEXTS_PER_FORWARD) if len(inside) else ():
                rows = part - first
                replaced = self.tokens.roles[part] == self.role
                yield PlacesToSplice(part, shard.tokens[rows], shard.activations[rows], replaced)

    def in_memory(self) -> PlacesToSplice:
        """All contexts at once; memory: m L d numbers."""
        return PlacesToSplice(*(torch.cat(column) for column in zip(*self, strict=True)))
