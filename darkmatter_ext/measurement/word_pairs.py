"""Pairs of words in a relation ("France" and "Paris"), from a CSV file or the built-in 12 relations of 20 pairs.

Shapes: n pairs.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError, reason

BUILT_IN = Path(__file__).with_name("word_pairs.csv")
COLUMNS = ("relation", "a", "b")
FEWEST_PAIRS = 4  # in a relation: two on either side


class WordPairs(NamedTuple):
    """Pairs by relation."""

    relations: list[str]
    labels: Tensor  # [n] int64, number of the relation
    first: list[str]
    second: list[str]

    @property
    def words(self) -> list[str]:
        """Each word once."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def groups(self) -> Tensor:
        """[n] int64: pairs linked by shared words, however indirectly, have the same number; a group is never divided."""
        root: dict[str, str] = {word: word for word in self.words}

        def top(word: str) -> str:
            while root[word] != word:
                word = root[word]
            return word

        for a, b in zip(self.first, self.second, strict=True):
            root[top(a)] = top(b)
        numbers = {word: number for number, word in enumerate(root)}
        return torch.tensor([numbers[top(word)] for word in self.first])

    def halves(self, *, seed: int) -> Tensor:
        """[n] bool: about half of each relation's pairs, none of which shares a word with the other half."""
        groups, generator = self.groups(), torch.Generator().manual_seed(seed)
        chosen: dict[int, bool] = {}
        for relation in range(len(self.relations)):
            own = groups[self.labels == relation].unique()
            dealt = own[torch.randperm(len(own), generator=generator)]
            for turn, group in enumerate(dealt.tolist()):
                chosen.setdefault(group, turn % 2 == 0)
        return torch.tensor([chosen[group] for group in groups.tolist()])


def read_pairs(path: str = "") -> WordPairs:
    """The pairs in a CSV file with the columns relation, a and b; default: the built-in ones.

    Raises InputError for a file that cannot be read or has no such columns or no pairs, for fewer than two relations, and
    for a relation with fewer than FEWEST_PAIRS pairs without a common word.
    """
    try:
        with Path(path or BUILT_IN).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"pairs: must be a readable CSV file, got {path!r} ({reason(error)})") from None
    if [column for column in COLUMNS if column not in columns] or not rows:
        given = (
            "no pairs" if rows == [] and set(COLUMNS) <= set(columns) else f"the columns {', '.join(columns) or 'none'}"
        )
        raise InputError(f"pairs: must have rows with the columns relation, a and b, got {given} in {path!r}")
    for number, row in enumerate(rows, start=2):
        if not all((row[column] or "").strip() for column in COLUMNS):
            raise InputError(f"pairs: must have a relation and two words in every row, got none in line {number}")
    relations = list(dict.fromkeys(row["relation"].strip() for row in rows))
    if len(relations) < 2:
        raise InputError(f"pairs: must be of at least two relations, got {relations[0]!r} alone in {path!r}")
    labels = torch.tensor([relations.index(row["relation"].strip()) for row in rows])
    pairs = WordPairs(relations, labels, [row["a"].strip() for row in rows], [row["b"].strip() for row in rows])
    groups = pairs.groups()
    for number, relation in enumerate(relations):
        found = len(groups[labels == number].unique())
        if found < FEWEST_PAIRS:
            raise InputError(
                f"pairs: must have at least {FEWEST_PAIRS} pairs without a common word in each relation, got {found} in "
                f"{relation!r}"
            )
    return pairs
