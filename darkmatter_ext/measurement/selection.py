"""Which tokens are measured, which train the SAE, and which are left out and why: by stated rules, always counted.

Language models give a few tokens (the first position above all, an attention sink) activations tens to hundreds of times
the usual norm. One of them outweighs thousands of others in every squared sum, so they are set aside by two rules, and
the result says how many each rule took and what it would have meant to keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import PlacesToSplice
from darkmatter_ext.activations.store import CONTEXTS_PER_FORWARD, ActivationCache
from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.measurement.decompose import TokenBatch
from darkmatter_ext.runtime.inputs import InputError

UNUSED, SAE_TRAINING, FIT, HELD_OUT = range(4)  # roles of a token
Positions = tuple[int | None, ...]  # arguments of slice; () stands for all positions


def kept_positions(length: int, *, positions: Positions = (), first: int = 0) -> list[int]:
    """The positions of a context that a slice keeps, ascending, those below `first` left out."""
    chosen = sorted(range(length)[slice(*positions)]) if positions else range(length)
    return [position for position in chosen if position >= first]


@dataclass(frozen=True)
class TokenSelection:
    """The role of each token of a cache, with the counts a result reports."""

    roles: Tensor  # [C, L] uint8
    dropped_positions: int  # tokens left out by position
    special_tokens: int  # tokens left out for what they are, of the others
    high_norm_tokens: int  # tokens left out by the norm rule
    high_norm_share: float  # their share of the sum of squared norms, of the tokens that passed the position rule
    median_norm: float  # of the tokens that passed the position rule
    largest_norm: float  # before any rule

    def count(self, role: int) -> int:
        return int((self.roles == role).sum())

    def numbers(self) -> dict[str, float]:
        """What a result reports, by name."""
        return {
            "tokens/sae_training": self.count(SAE_TRAINING),
            "tokens/fit": self.count(FIT),
            "tokens/held_out": self.count(HELD_OUT),
            "tokens/dropped_first_positions": self.dropped_positions,
            "tokens/left_out_special": self.special_tokens,
            "tokens/left_out_high_norm": self.high_norm_tokens,
            "tokens/high_norm_share_of_energy": self.high_norm_share,
            "tokens/median_norm": self.median_norm,
            "tokens/largest_norm": self.largest_norm,
        }


def select_tokens(
    cache: ActivationCache,
    *,
    drop_positions: int,
    max_norm_ratio: float,
    sae_fraction: float,
    fit_fraction: float,
    split: str,
    seed: int,
    positions: Positions = (),
    excluded_tokens: Sequence[int] = (),
) -> TokenSelection:
    """Assign every token a role.

    Args:
        drop_positions: leave out positions below this one (the paper: 200 of 1024).
        max_norm_ratio: leave out tokens whose norm is above this many medians; 0 switches the rule off.
        sae_fraction: share of the contexts whose tokens train the SAEs; the rest is measured. 0: all are measured.
        fit_fraction: share of the measured tokens (or contexts, documents) that b* is fitted on.
        split: what is never divided between fit and held-out: "documents", "contexts" or "tokens" (the paper).
        seed: of both random splits.
        positions: leave out all positions but those of this slice.
        excluded_tokens: leave out tokens with these ids.

    The SAE's training text is kept apart from the measured text by document for split="documents", else by context.

    Raises ValueError when a rule leaves nothing on a side.
    """
    if split not in ("documents", "contexts", "tokens"):
        raise InputError(f"split: must be documents, contexts or tokens, got {split!r}")
    norms, documents = cache.column("norms"), cache.column("documents")
    n_contexts, length = norms.shape
    if not 0 <= drop_positions < length:
        raise InputError(
            f"drop_positions: must be from 0 to {length - 1} (context length {length}), got {drop_positions}"
        )
    in_place = torch.zeros(length, dtype=torch.bool)
    in_place[kept_positions(length, positions=positions, first=drop_positions)] = True
    excluded = torch.isin(cache.column("tokens"), torch.tensor(excluded_tokens, dtype=torch.int64))
    usable = in_place & ~excluded
    median = norms[usable].median().item() if bool(usable.any()) else 0.0
    high = usable & (norms > max_norm_ratio * median) if max_norm_ratio > 0 else torch.zeros_like(usable)
    energy = norms.double().square()
    roles = torch.full((n_contexts, length), UNUSED, dtype=torch.uint8)
    whole = documents if split == "documents" else torch.arange(n_contexts)
    measured = (
        ~train_mask(whole, fraction=sae_fraction, seed=seed) if sae_fraction > 0 else torch.ones(n_contexts).bool()
    )
    roles[~measured] = SAE_TRAINING
    if split == "tokens":
        groups = torch.arange(int(measured.sum()) * length)
    else:
        groups = whole[measured].repeat_interleave(length)
    fit = train_mask(groups, fraction=fit_fraction, seed=seed + 1).view(-1, length)
    roles[measured] = torch.where(fit, FIT, HELD_OUT).to(torch.uint8)
    roles[~usable | high] = UNUSED
    for name, role in (("fit", FIT), ("held-out", HELD_OUT)):
        if not bool((roles == role).any()):
            raise InputError(
                f"drop_positions, max_norm_ratio: must leave {name} tokens, got 0 of {roles.numel()} tokens "
                f"with {drop_positions} and {max_norm_ratio:g}"
            )
    return TokenSelection(
        roles=roles,
        dropped_positions=n_contexts * int((~in_place).sum()),
        special_tokens=int((in_place & excluded).sum()),
        high_norm_tokens=int(high.sum()),
        high_norm_share=(energy[high].sum() / energy[usable].sum()).item(),
        median_norm=median,
        largest_norm=norms.max().item(),
    )


def check_whole_contexts(contexts: int, split: str) -> None:
    """What an experiment that splices into whole held-out contexts needs of its settings. Raises ValueError."""
    if contexts < 2:
        raise InputError(f"contexts: must be at least 2 (intervals are over contexts), got {contexts}")
    if split == "tokens":
        raise InputError("split: must be documents or contexts to splice into whole contexts, got 'tokens'")


@dataclass(frozen=True)
class MeasuredBatches:
    """The measured tokens of a cache as TokenBatches, readable any number of times; memory: one shard."""

    cache: ActivationCache
    roles: Tensor  # [C, L] uint8
    device: str = "cpu"

    def __iter__(self) -> Iterator[TokenBatch]:
        start = 0
        for shard in self.cache.shards():
            roles = self.roles[shard.first_context : shard.first_context + len(shard.tokens)]
            measured = (roles == FIT) | (roles == HELD_OUT)
            x = shard.activations[measured].to(self.device)
            yield TokenBatch(x, (roles[measured] == FIT).to(self.device), start)
            start += len(x)


@dataclass(frozen=True)
class HeldOutContexts:
    """Whole contexts that are held out, all of them or a seeded sample: for what needs every position of a context."""

    cache: ActivationCache
    roles: Tensor  # [C, L] uint8
    numbers: Tensor  # [m] int64, ascending

    @classmethod
    def sample(cls, cache: ActivationCache, roles: Tensor, count: int, *, seed: int) -> HeldOutContexts:
        """`count` held-out contexts drawn with `seed`.

        Raises ValueError when there are fewer, or when held-out and fit tokens share contexts.
        """
        held_out = (roles == HELD_OUT).any(1)
        if bool((held_out & (roles == FIT).any(1)).any()):
            raise InputError("split: must be documents or contexts to splice into whole contexts, got tokens")
        numbers = held_out.nonzero().flatten()
        if count > len(numbers):
            raise InputError(f"contexts: must be at most the {len(numbers)} held-out contexts, got {count}")
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
        return cls(cache, roles, numbers[order[:count]].sort().values)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[PlacesToSplice]:
        for shard in self.cache.shards():
            first, last = shard.first_context, shard.first_context + len(shard.tokens)
            inside = self.numbers[(self.numbers >= first) & (self.numbers < last)]
            for part in inside.split(CONTEXTS_PER_FORWARD) if len(inside) else ():
                rows = part - first
                held_out = self.roles[part] == HELD_OUT
                yield PlacesToSplice(part, shard.tokens[rows], shard.activations[rows], held_out)


def tokens_with_role(cache: ActivationCache, roles: Tensor, role: int) -> Tensor:
    """All activations with one role, [n, d], in memory: the training set of an SAE."""
    parts = []
    for shard in cache.shards():
        own = roles[shard.first_context : shard.first_context + len(shard.tokens)]
        parts.append(shard.activations[own == role])
    return torch.cat(parts)


def mean_activation(cache: ActivationCache, roles: Tensor, role: int) -> Tensor:
    """Mean activation [d], float32, of the tokens with one role; memory: one shard."""
    total = torch.zeros(cache.d_in, dtype=torch.float64)
    for shard in cache.shards():
        own = roles[shard.first_context : shard.first_context + len(shard.tokens)]
        total += shard.activations[own == role].double().sum(0)
    return (total / (roles == role).sum()).float()


def require_same_tokens(given: Tensor, stored: Tensor) -> None:
    """Raise ValueError, naming the first place, unless the tokens given are those stored with the activations.

    Both [C, L] int64.
    """
    if given.shape != stored.shape:
        raise InputError(
            f"tokens: must be those of the stored activations {list(stored.shape)}, got {list(given.shape)} tokens"
        )
    different = (given != stored).nonzero()
    if len(different):
        context, position = different[0].tolist()
        raise InputError(
            f"tokens: must be those of the stored activations, got token {int(given[context, position])} where "
            f"{int(stored[context, position])} is stored (context {context}, position {position}; "
            f"{len(different)} places differ)"
        )
