"""The role of every token, decided once: which train SAEs, which fit b*, which are held out, which are left out.

Language models give a few tokens (above all the first position, an attention sink) activations with tens to hundreds of
times the usual norm. One of them outweighs thousands of others in every squared sum, so they are left out by stated rules,
and a result reports how many each rule took.

Shapes: C contexts of L tokens, c of them in a batch; d width of a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import ContextBatch, Source
from darkmatter_ext.estimators.least_squares import train_mask
from darkmatter_ext.measurement.metadata import Positions
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.runtime.inputs import InputError

# NORM_FIT: tokens the norm tests are fitted on if every token is read only once.
UNUSED, SAE_TRAINING, FIT, HELD_OUT, NORM_FIT = range(5)
PILOT_CONTEXTS = 16  # read first: the typical norm and the shift of the sums come from them


def kept_positions(length: int, *, positions: Positions = (), first: int = 0) -> list[int]:
    """The positions of a context that a slice keeps, ascending, without those below `first`."""
    chosen = sorted(range(length)[slice(*positions)]) if positions else range(length)
    return [position for position in chosen if position >= first]


def training_contexts(documents: Tensor, settings: Measure, fraction: float) -> Tensor:
    """[C] bool: the contexts whose tokens train SAEs; documents stay whole if the split keeps them whole.

    `fraction` 0: none. Raises InputError if no context, or every context, would be chosen.
    """
    if fraction == 0:
        return torch.zeros(len(documents), dtype=torch.bool)
    whole = documents if settings.split == "documents" else torch.arange(len(documents))
    return train_mask(whole, fraction=fraction, seed=settings.seed)


@dataclass(frozen=True)
class LeftOut:
    """Counts of unused tokens, by the first rule that took each."""

    by_position: int = 0
    by_token: int = 0
    by_norm: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(
            self.by_position + other.by_position, self.by_token + other.by_token, self.by_norm + other.by_norm
        )

    def numbers(self) -> dict[str, float]:
        """What a result reports about them, by name."""
        return {
            "tokens/dropped_first_positions": self.by_position,
            "tokens/left_out_special": self.by_token,
            "tokens/left_out_high_norm": self.by_norm,
        }


@dataclass(frozen=True)
class TokenRoles:
    """The roles of the tokens of a source, and the rules that leave some out."""

    settings: Measure
    contexts: Tensor  # [C] FIT, NORM_FIT or HELD_OUT; with split "tokens" all FIT, and roles are dealt by token
    groups: Tensor  # [C] interval group of contexts with held-out tokens, 0 for the others
    kept: Tensor  # [L] bool: positions that are measured
    trained_on: Tensor  # [L] bool: positions that train SAEs
    excluded: tuple[int, ...]  # ids of tokens that are always left out
    typical_norm: dict[str, float] = field(compare=False)  # hook point -> median norm of the first contexts
    pilot: ContextBatch = field(repr=False, compare=False)  # the first contexts

    @classmethod
    def decide(
        cls,
        source: Source,
        settings: Measure,
        hooks: Sequence[str],
        *,
        positions: Positions = (),
        excluded: tuple[int, ...] = (),
        drop_last: bool = False,
    ) -> TokenRoles:
        """Decide the role of every token of a source.

        Args:
            hooks: the sites at which tokens are measured; each has its own typical norm.
            positions: leave out all positions but those of this slice.
            excluded: leave out tokens with these ids.
            drop_last: leave out the last position; it is also left out if the model's loss is recorded, as it has none.

        Raises InputError if a side of the split is empty, or a rule leaves nothing.
        """
        pilot = source.read(list(range(min(PILOT_CONTEXTS, source.n_contexts))))
        length, first = source.context_length, settings.drop_positions
        if not 0 <= first < length:
            raise InputError(f"drop_positions: must be from 0 to {length - 1} (context length {length}), got {first}")
        kept = torch.zeros(length, dtype=torch.bool)
        kept[kept_positions(length, positions=positions, first=first)] = True
        trained_on = kept.clone()
        if pilot.loss is not None or drop_last:
            kept[-1] = False
        contexts = _context_roles(source.documents, settings)
        groups = _context_groups(source.documents, contexts, settings)
        roles = cls(settings, contexts, groups, kept, trained_on, excluded, {}, pilot)
        for hook in hooks:
            roles.typical_norm[hook] = roles._typical(hook, positions)
        return roles

    def _typical(self, hook: str, positions: Positions) -> float:
        norms = _norms(self.pilot.activations[hook])
        usable = self.wanted(self.pilot.tokens)
        typical = norms[usable].median().item() if bool(usable.any()) else 0.0
        if not bool((usable & self._is_usual(norms, typical)).any()):
            settings, length = self.settings, norms.shape[1]
            cut = f" within {slice(*positions)}" if positions else ""
            special = f" and {len(self.excluded)} special tokens" if self.excluded else ""
            raise InputError(
                "drop_positions, max_norm_ratio: must leave tokens to measure, got "
                f"{settings.drop_positions} of contexts of {length}{cut} and {settings.max_norm_ratio:g}{special}"
            )
        return typical

    def wanted(self, tokens: Tensor, *, training: bool = False) -> Tensor:
        """Which of tokens [c, L] are measured (or train SAEs), judging by position and token id, bool [c, L]."""
        in_place = self.trained_on if training else self.kept
        return in_place & ~torch.isin(tokens, torch.tensor(self.excluded, dtype=tokens.dtype))

    def _is_usual(self, norms: Tensor, typical: float) -> Tensor:
        ratio = self.settings.max_norm_ratio
        return norms <= ratio * typical if ratio > 0 else torch.ones_like(norms, dtype=torch.bool)

    def used(self, tokens: Tensor, norms: Tensor, hook: str, *, training: bool = False) -> tuple[Tensor, LeftOut]:
        """Which of tokens [c, L] with norms [c, L] at a site all rules keep, bool [c, L]; and how many each rule takes."""
        in_place = (self.trained_on if training else self.kept).expand(tokens.shape)
        kept = self.wanted(tokens, training=training)
        used = kept & self._is_usual(norms, self.typical_norm[hook])
        counts = ((~in_place).sum(), (in_place & ~kept).sum(), (kept & ~used).sum())
        return used, LeftOut(*(int(count) for count in counts))

    def of(self, batch: ContextBatch, *hooks: str) -> tuple[Tensor, LeftOut]:
        """The role of every token of a batch at a site, [c, L], UNUSED for those left out; and how many each rule takes.

        `hooks`: those of the site; an unusual norm at any of them (read or written by a transcoder) leaves the token out.
        """
        used, left_out = self.used(batch.tokens, _norms(batch.activations[hooks[0]]), hooks[0])
        for hook in hooks[1:]:
            kept = used & self._is_usual(_norms(batch.activations[hook]), self.typical_norm[hook])
            left_out = dataclasses.replace(left_out, by_norm=left_out.by_norm + int((used & ~kept).sum()))
            used = kept
        return torch.where(used, self.dealt(batch.numbers), UNUSED), left_out

    def dealt(self, numbers: Sequence[int]) -> Tensor:
        """[c, L] the roles in contexts, by number, before any rule applies: the same in every process, reading and restart."""
        length = len(self.kept)
        if self.settings.split != "tokens":
            return self.contexts[list(numbers)][:, None].expand(-1, length)
        return torch.stack([self._dealt_by_token(number, length) for number in numbers])

    def _dealt_by_token(self, context: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + context)
        fit = torch.rand(length, generator=generator) < self.settings.fit_fraction
        return torch.where(fit, FIT, HELD_OUT)


def _norms(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1).cpu()


def _context_roles(documents: Tensor, settings: Measure) -> Tensor:
    if settings.split == "tokens":
        return torch.full((len(documents),), FIT)
    groups = documents if settings.split == "documents" else torch.arange(len(documents))
    try:
        fit = train_mask(groups, fraction=settings.fit_fraction, seed=settings.seed + 1)
        roles = torch.where(fit, FIT, HELD_OUT)
        if settings.passes == 1:
            rest = train_mask(groups[~fit], fraction=settings.norm_fit_fraction, seed=settings.seed + 2)
            roles[~fit] = torch.where(rest, NORM_FIT, HELD_OUT)
    except InputError:
        n = len(groups.unique())
        raise InputError(
            f"tokens: must leave {settings.split} on every side of the split, got {n} {settings.split}"
        ) from None
    return roles


def _context_groups(documents: Tensor, roles: Tensor, settings: Measure) -> Tensor:
    """Deal documents (or contexts, if documents are not kept whole) in a seeded order into groups of about equal size."""
    held_out = (roles == HELD_OUT) | (roles == FIT if settings.split == "tokens" else False)
    names = documents if settings.split == "documents" else torch.arange(len(documents))
    found, inverse, sizes = names[held_out].unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(settings.seed + 3))
    before = torch.empty_like(sizes)
    before[order] = sizes[order].cumsum(0) - sizes[order]
    middle = before + sizes / 2
    groups = torch.zeros(len(documents), dtype=torch.int64)
    groups[held_out] = (settings.interval_groups * middle / sizes.sum().clamp(min=1)).long()[inverse]
    return groups
