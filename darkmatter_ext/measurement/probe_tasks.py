"""Binary tasks on texts, for probes: from a CSV file, or built from the documentation that every installation has.

A task consists of texts with labels. Each text belongs to a document, which is never divided between training and test
side. If a task has two domains, a probe fitted on one can be tested on the other (covariate shift).

Shapes: n rows of a task.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darkmatter_ext.activations.text import Document, Paragraph, installed_paragraphs
from darkmatter_ext.runtime.inputs import InputError, reason

WORDS = 32  # in a built-in text
PER_DOCUMENT = 8  # built-in texts per document
FEWEST_OF_A_LABEL = 50  # a built-in task with fewer rows of a label is left out
FEWEST_OF_A_DOMAIN = 8  # rows of each label in a domain; with fewer, no shift is measured
SHIFTED_FROM, SHIFTED_TO = ("numpy", "scipy"), ("torch", "pandas")  # libraries that are the domains of built-in tasks
COLUMNS = ("prompt", "target", "task", "document", "domain")  # columns of a file; the first two are required
_NUMBER, _QUOTATION = re.compile(r"\d"), re.compile(r"([`'\"])\w[^`'\"]*\1")
_PARAMETER = re.compile(r"\b[a-z]+_[a-z_]+\b")
_AMERICAN = re.compile(
    r"\b(?:un|re|non|pre|sub|super|auto)?(?:behavior|color|center|neighbor|label(?=ed|ing)|model(?=ed|ing)|favor|analyz|"
    r"(?:capital|custom|discret|factor|final|general|initial|local|material|maxim|minim|normal|optim|organ|parallel|"
    r"parametr|parameter|polar|quant|random|recogn|regular|serial|special|synchron|token|util|vector|visual)iz(?=e|i|a))",
    re.IGNORECASE,
)
_BRITISH = {"behavior": "behaviour", "color": "colour", "center": "centre", "neighbor": "neighbour",
            "label": "labell", "model": "modell", "favor": "favour", "analyz": "analys"}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Texts with labels."""

    name: str
    texts: tuple[str, ...]
    labels: Tensor  # [n] int64 in {0, 1}
    documents: Tensor  # [n] int64
    domains: Tensor  # [n] int64: 0 and 1, the two of a shift; -1 if in neither

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def shifts(self) -> bool:
        """Whether both domains have enough rows of both labels."""
        counts = [int(((self.domains == domain) & (self.labels == kind)).sum()) for domain in (0, 1) for kind in (0, 1)]
        return min(counts) >= FEWEST_OF_A_DOMAIN


def _task(name: str, rows: Sequence[tuple[str, int, str, int]]) -> Task:
    """A task from rows (text, label, document, domain)."""
    texts, labels, documents, domains = zip(*rows, strict=True)
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    return Task(
        name, texts, torch.tensor(labels), torch.tensor([numbers[own] for own in documents]), torch.tensor(domains)
    )


def read_tasks(path: str) -> list[Task]:
    """The tasks in a CSV file with the columns `prompt` (a text) and `target` (one of two values; the greater is 1).

    Optional columns: `task` (a name; default the file's), `document` (rows of one document are never divided; default one
    per row) and `domain` (0 or 1: the domains of a shift).

    Raises InputError for a file that cannot be read or lacks these columns, a text without words, or a task that does not
    have exactly two values.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"tasks: must be a readable CSV file, got {path!r} ({reason(error)})") from None
    missing = [column for column in COLUMNS[:2] if column not in columns]
    if missing or not rows:
        given = f"the columns {', '.join(columns) or 'none'}" if missing else "no rows"
        raise InputError(f"tasks: must have rows with the columns prompt and target, got {given} in {path!r}")
    by_task: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        if not (row["prompt"] or "").strip() or not (row["target"] or "").strip():
            raise InputError(
                f"tasks: must have a prompt and a target in every row, got none in line {number} of {path!r}"
            )
        by_task.setdefault(row.get("task") or Path(path).stem, []).append(row | {"line": str(number)})
    return [_of_file(name, own) for name, own in by_task.items()]


def _of_file(name: str, rows: Sequence[dict[str, str]]) -> Task:
    values = sorted({row["target"].strip() for row in rows})
    if len(values) != 2:
        raise InputError(
            f"tasks: must have two values of target in every task, got {', '.join(values[:5])} in {name!r}"
        )
    own = []
    for row in rows:
        domain = (row.get("domain") or "-1").strip()
        if domain not in ("0", "1", "-1"):
            raise InputError(f"tasks: must have the domain 0, 1 or none, got {domain!r} in line {row['line']}")
        document = row.get("document") or row["line"]
        own.append((row["prompt"], values.index(row["target"].strip()), document, int(domain)))
    return _task(name, own)


# ---- built-in tasks


def british(text: str) -> str:
    """A text in which listed words that have two spellings get the British one."""

    def rewrite(match: re.Match[str]) -> str:
        word = match.group(0)
        for american, other in _BRITISH.items():
            if word.lower().endswith(american):
                kept = word[: len(word) - len(american)]
                return kept + (other.capitalize() if word[len(kept)].isupper() else other)
        return word[:-1] + "s"

    return _AMERICAN.sub(rewrite, text)


def shuffled_words(text: str, *, seed: int) -> str:
    """The words of a text in random order."""
    words = text.split()
    random.Random(f"{seed} {text}").shuffle(words)
    return " ".join(words)


def built_in_tasks(rows: int, *, seed: int, without: Iterable[Document] = ()) -> tuple[list[Task], list[str]]:
    """Tasks of at most `rows` texts, half with each label, from documents that are not in `without`.

    "library NAME": from this library or another; "class": the text documents a class, not a function; "number",
    "quotation", "parameter": the text contains one; "spelling": rewritten in British spelling; "shuffled": words shuffled.

    Returns the tasks, and a note for each task with too few rows.
    """
    found = installed_paragraphs(rows // 2, per_document=PER_DOCUMENT, words=WORDS, seed=seed, without=without)
    return tasks_of(list(found), rows, seed=seed)


def tasks_of(paragraphs: Sequence[Paragraph], rows: int, *, seed: int) -> tuple[list[Task], list[str]]:
    """`built_in_tasks` from given paragraphs."""
    labels: dict[str, Callable[[Paragraph], bool | None]] = {
        f"library {library}": lambda own, library=library: own.library == library
        for library in dict.fromkeys(own.library for own in paragraphs)
    }
    labels |= {
        "class": lambda own: None if own.kind == "module" else own.kind == "class",
        "number": lambda own: _NUMBER.search(own.text) is not None,
        "quotation": lambda own: _QUOTATION.search(own.text) is not None,
        "parameter": lambda own: _PARAMETER.search(own.text) is not None,
    }
    found, notes = [], []
    every = {
        name: [(own.text, int(label), own) for own in paragraphs if (label := of(own)) is not None]
        for name, of in labels.items()
    }
    every["spelling"] = _rewritten([own for own in paragraphs if _AMERICAN.search(own.text)], british, seed)
    every["shuffled"] = _rewritten(paragraphs, lambda text: shuffled_words(text, seed=seed), seed)
    for name, own in every.items():
        drawn = _balanced(own, rows, random.Random(f"{seed} {name}"))
        if len(drawn) < 2 * FEWEST_OF_A_LABEL:
            notes.append(f"Task {name!r} is left out: {len(drawn) // 2} texts of its rarer label.")
            continue
        by_library = name.startswith("library ")  # the label is the domain: no shift
        found.append(_task(name, [(text, y, of.document, -1 if by_library else _domain(of)) for text, y, of in drawn]))
    return found, notes


def _domain(paragraph: Paragraph) -> int:
    return 0 if paragraph.library in SHIFTED_FROM else 1 if paragraph.library in SHIFTED_TO else -1


def _rewritten(
    paragraphs: Sequence[Paragraph], rewrite: Callable[[str], str], seed: int
) -> list[tuple[str, int, Paragraph]]:
    """Each paragraph either unchanged (0) or rewritten (1), never both."""
    coin = random.Random(seed)
    drawn = [(own, coin.randrange(2)) for own in paragraphs]
    return [(rewrite(own.text) if label else own.text, label, own) for own, label in drawn]


def _balanced(
    rows: Sequence[tuple[str, int, Paragraph]], count: int, generator: random.Random
) -> list[tuple[str, int, Paragraph]]:
    """Equally many rows of each label, at most `count` in total, in random order."""
    sides = [[row for row in rows if row[1] == label] for label in (0, 1)]
    size = min(count // 2, *map(len, sides))
    drawn = [row for side in sides for row in generator.sample(side, size)]
    generator.shuffle(drawn)
    return drawn
