"""Detection-style interpretability: can one tell from an explanation which texts activate a latent?

As in EleutherAI's automated interpretability (Paulo et al., 2410.13928), a judge explains a latent from texts it is active
on, then says for other texts, active or not, whether they fit. Accuracy is reported per decile of activation, because a
latent can be clear at its strongest and noise below that. Explained and judged texts come from different documents;
otherwise a latent that marks one document would be explained by that document's rare words and judged by them too.

`WordListJudge` needs neither a model nor a network: it explains a latent by the tokens it peaks on. Language-model judges
are in `judges.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from darkmatter_ext.estimators.intervals import Interval, bootstrap
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import HELD_OUT
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.runtime.inputs import InputError

DECILES = 10


@dataclass(frozen=True)
class Snippet:
    """A run of consecutive tokens of a text, with one latent's activation on each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class Snippets:
    """Where the snippets of held-out text are, as rows among the held-out tokens in cache order."""

    rows: Tensor  # [w, length] int64
    documents: list[int]  # [w]
    tokens: list[list[str]]  # [w][length]

    @classmethod
    def cut(cls, stored: StoredTokens, length: int, decode: Callable[[int], str]) -> Snippets:
        """All runs of `length` consecutive held-out tokens that start at a multiple of `length`.

        Raises ValueError if there is none.
        """
        cache, held_out = stored.cache, stored.roles == HELD_OUT
        row = held_out.flatten().long().cumsum(0).view_as(held_out) - 1
        usable = cache.context_length // length * length
        whole = held_out[:, :usable].unflatten(1, (-1, length)).all(-1)  # [C, L / length]
        context, place = whole.nonzero(as_tuple=True)
        if len(context) == 0:
            raise InputError(f"context_length: must hold {length} held-out tokens in a row to judge latents, got none")
        rows = row[:, :usable].unflatten(1, (-1, length))[context, place]
        ids = cache.column("tokens")[:, :usable].unflatten(1, (-1, length))[context, place]
        names = {token: decode(token) for token in ids.unique().tolist()}
        documents = cache.column("documents")[context].tolist()
        return cls(rows, documents, [[names[token] for token in own] for own in ids.tolist()])

    def firing(self, acts: SparseActs) -> Tensor:
        """The number of snippets on which each latent is active, [F]."""
        own = torch.full((acts.n_tokens,), -1)
        own[self.rows.flatten()] = torch.arange(len(self.rows)).repeat_interleave(self.rows.shape[1])
        window, active = own[acts.token_numbers().cpu()], acts.values.reshape(-1).cpu() != 0
        kept = active & (window >= 0)
        pairs = (window[kept] * acts.d_sae + acts.col_indices.cpu()[kept]).unique()
        return torch.bincount(pairs % acts.d_sae, minlength=acts.d_sae)


class Judge(Protocol):
    """Explains latents and detects them in texts."""

    def explain(self, active: Sequence[Snippet]) -> str:
        """What the latent that is active on these snippets stands for."""
        ...

    def detect(self, explanation: str, snippets: Sequence[Snippet]) -> list[bool | None]:
        """Whether each snippet fits; None if no answer was obtained. Must not look at activations."""
        ...


@dataclass(frozen=True)
class DetectionSettings:
    """How much the judge is shown and asked."""

    latents: int = 32  # sampled among those with enough active snippets
    snippet_length: int = 16  # tokens
    explained: int = 20  # strongest snippets shown for the explanation
    per_decile: int = 3  # judged snippets of each decile of activation
    inactive: int = 15  # judged snippets on which the latent is silent
    seed: int = 0


class WordListJudge:
    """Deterministic, offline: the explanation is a list of tokens, and a snippet fits if it holds one of them.

    The tokens are those the latent peaks on, the most frequent first, until they cover `coverage` of the snippets shown.
    """

    def __init__(self, coverage: float = 0.8, most: int = 8) -> None:
        self.coverage, self.most = coverage, most

    def explain(self, active: Sequence[Snippet]) -> str:
        peaks = Counter(
            snippet.tokens[max(range(len(snippet.tokens)), key=snippet.activations.__getitem__)].strip().lower()
            for snippet in active
        )
        words, covered = [], 0
        for word, count in sorted(peaks.items(), key=lambda item: (-item[1], item[0])):
            if covered >= self.coverage * len(active) or len(words) == self.most:
                break
            words.append(word)
            covered += count
        return json.dumps(words, ensure_ascii=False)

    def detect(self, explanation: str, snippets: Sequence[Snippet]) -> list[bool | None]:
        words = set(json.loads(explanation))
        return [any(token.strip().lower() in words for token in snippet.tokens) for snippet in snippets]


@dataclass(frozen=True)
class LatentScore:
    """How well a latent's explanation separates texts."""

    latent: int
    explanation: str
    hits: list[float]  # per decile, weakest first: share of judged active snippets said to fit; NaN if none was judged
    rejections: float  # share of judged silent snippets said not to fit
    unanswered: int
    documents: int  # documents in which it is active

    @property
    def accuracies(self) -> list[float]:
        """Balanced accuracy per decile: mean of hits and rejections."""
        return [(hit + self.rejections) / 2 for hit in self.hits]

    @property
    def accuracy(self) -> float:
        """Mean balanced accuracy over the deciles that were judged; NaN if none was."""
        known = [accuracy for accuracy in self.accuracies if not math.isnan(accuracy)]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class _Windows:
    """Snippets of held-out text and each sampled latent's activations on them."""

    tokens: list[tuple[str, ...]]
    activations: Tensor  # [w, length, m]
    explained: Tensor  # [w] bool: windows that explanations may use; the others are judged
    documents: Tensor  # [w]

    def snippet(self, window: int, column: int) -> Snippet:
        return Snippet(self.tokens[window], tuple(self.activations[window, :, column].tolist()))


def score_latents(
    tokens: Sequence[Sequence[str]],
    documents: Sequence[int],
    activations: Callable[[list[int]], Tensor],
    firing: Tensor,
    judge: Judge,
    settings: DetectionSettings,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[LatentScore]:
    """Explain and judge a sample of latents.

    Args:
        tokens: w snippets of `snippet_length` tokens.
        documents: the document of each snippet; a whole document is used either for explaining or for judging.
        activations: latents [m] -> their activations [w, snippet_length, m].
        firing: [F] number of snippets on which each latent is active (to leave out latents with too few).
        judge, settings: see `Judge` and `DetectionSettings`.
        progress: called with 1 after every latent.

    Raises InputError if no latent is active on enough snippets, or all snippets come from one document.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    # Half of the snippets are used for explaining: with fewer than this, some deciles would have no judged snippet. A
    # latent that is active nearly everywhere has too few silent ones.
    enough = (firing >= 4 * DECILES) & (firing <= len(tokens) - 4 * settings.inactive)
    usable = enough.nonzero().flatten()
    if len(usable) == 0:
        raise InputError(
            f"tokens: no latent is active on enough snippets to be judged (at least {4 * DECILES} of {len(tokens)})"
        )
    latents = usable[torch.randperm(len(usable), generator=generator)[: settings.latents]].sort().values.tolist()
    owner = torch.tensor(documents)
    names = owner.unique()
    if len(names) < 2:
        raise InputError(
            "tokens: must be of at least 2 documents, to explain latents by one and judge them by another, got 1"
        )
    half = names[torch.randperm(len(names), generator=generator)[: len(names) // 2]]
    windows = _Windows([tuple(own) for own in tokens], activations(latents), torch.isin(owner, half), owner)
    scores = []
    for column, latent in enumerate(latents):
        scores.append(_score(windows, column, latent, judge, settings, generator))
        if progress is not None:
            progress(1)
    return scores


def _score(
    windows: _Windows, column: int, latent: int, judge: Judge, settings: DetectionSettings, generator: torch.Generator
) -> LatentScore:
    peak = windows.activations[:, :, column].amax(1)  # [w]
    shown = (windows.explained & (peak > 0)).nonzero().flatten()
    shown = shown[peak[shown].sort(descending=True, stable=True).indices][: settings.explained]
    explanation = judge.explain([windows.snippet(int(w), column) for w in shown])

    def sample(candidates: Tensor, count: int) -> list[int]:
        return candidates[torch.randperm(len(candidates), generator=generator)[:count]].tolist()

    judged = ~windows.explained
    active = (judged & (peak > 0)).nonzero().flatten()
    active = active[peak[active].sort(stable=True).indices]
    deciles = [sample(part, settings.per_decile) for part in active.tensor_split(DECILES)]
    silent = sample((judged & (peak == 0)).nonzero().flatten(), settings.inactive)
    order = sample(torch.tensor([w for part in deciles for w in part] + silent, dtype=torch.int64), len(judged))
    answers = dict(zip(order, judge.detect(explanation, [windows.snippet(w, column) for w in order]), strict=True))

    def share(chosen: list[int], expected: bool) -> float:
        known = [answers[w] == expected for w in chosen if answers[w] is not None]
        return sum(known) / len(known) if known else float("nan")

    unanswered = sum(answer is None for answer in answers.values())
    hits = [share(part, True) for part in deciles]
    in_documents = len(windows.documents[peak > 0].unique())
    return LatentScore(latent, explanation, hits, share(silent, False), unanswered, in_documents)


def accuracy_by_decile(scores: Sequence[LatentScore], *, seed: int) -> list[Interval]:
    """Mean balanced accuracy of each decile, then of all, with intervals from resampling latents.

    Latents without an answer in a decile are left out of it. Raises ValueError if there is no latent.
    """
    values = torch.tensor([score.accuracies for score in scores], dtype=torch.float64).view(len(scores), -1)
    known = ~values.isnan()
    sums = torch.cat([values.nan_to_num(0.0), known.double()], dim=1)

    def means(total: Tensor) -> Tensor:
        value, count = total[..., :DECILES], total[..., DECILES:]
        return torch.cat([value / count, value.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)], dim=-1)

    return bootstrap(sums, means, seed=seed)
