"""Text to measure on: the English documentation that every installation already has, a text file, or a dataset.

A *document* is one string; contexts never cross documents, and splits can be made by document.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkmatter_ext.runtime.inputs import InputError, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Packages whose docstrings serve as text: the dependencies of this package with much English prose.
DOCUMENTED_PACKAGES = (
    "numpy",
    "torch",
    "matplotlib",
    "pandas",
    "datasets",
    "transformers",
    "networkx",
    "sympy",
    "scipy",
)
# A document needs some length to hold whole contexts: about 256 tokens of 4.5 characters.
MINIMUM_DOCUMENT_CHARACTERS = 1200
_KINDS: dict[type[ast.AST], str] = {ast.Module: "module", ast.ClassDef: "class"}
_DOCUMENT_MARK = re.compile(r"^=== .*$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One text, with the name of its origin."""

    name: str
    text: str


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running English: long enough, nearly all letters and spaces, no doctest, no table."""
    if len(paragraph) < 120 or ">>>" in paragraph:
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return letters > 0.85 * len(paragraph) and paragraph.count(" ") > 0.12 * len(paragraph)


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """For each docstring of a source file, what it documents (module, class or function), and the docstring.

    The file is read without importing it: importing a whole library has side effects."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield _KINDS.get(type(node), "function"), docstring


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in ("site-packages", "dist-packages", "tests", "test") for part in parts):
            yield path


def _libraries() -> list[tuple[str, Path]]:
    site = Path(sysconfig.get_path("purelib"))
    return [(name, site / name) for name in DOCUMENTED_PACKAGES if (site / name).is_dir()]


def _installed_sources() -> Iterator[tuple[str, list[str]]]:
    """(name, texts) for each topic of the language reference, each stdlib module and each module of the packages."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield f"pydoc/{name}", [topics.topics[name]]
    for library, root in [("stdlib", Path(sysconfig.get_path("stdlib"))), *_libraries()]:
        for path in _source_files(root):
            yield f"{library}/{path.relative_to(root)}", [text for _, text in _docstrings(path)]


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text that are prose, with white space collapsed to single blanks."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if is_prose(paragraph):
            yield paragraph


def installed_versions() -> dict[str, str]:
    """Versions of everything whose documentation `installed_documents` reads."""
    found = {"python": platform.python_version()}
    for name in DOCUMENTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a module folder may have another name
            found[name] = importlib.metadata.version(name)
    return found


def installed_documents() -> Iterator[Document]:
    """The documentation on this machine: prose paragraphs only, each once, one document per module or topic.

    A generator in a fixed order, so that callers who need little text read few files. The text depends on the
    installed versions; results record its sha256.
    """
    seen: set[str] = set()
    for name, texts in _installed_sources():
        kept: list[str] = []
        for text in texts:
            for paragraph in _paragraphs(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= MINIMUM_DOCUMENT_CHARACTERS:
            yield Document(name, document)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an installed library's docstrings."""

    library: str
    document: str  # the module
    kind: str  # what it documents: module, class or function
    text: str


def installed_paragraphs(
    count: int, *, per_document: int, words: int, seed: int, without: Iterable[Document] = ()
) -> Iterator[Paragraph]:
    """Paragraphs of each documented library, cut after `words` words, with modules in a seeded order.

    Args:
        count: at most this many per library.
        per_document: at most this many per module.
        without: documents whose names and paragraphs are left out.
    """
    names, seen = set(), set()
    for document in without:
        names.add(document.name)
        seen.update(document.text.split("\n\n"))
    for library, root in _libraries():
        files, left = list(_source_files(root)), count
        random.Random(f"{seed} {library}").shuffle(files)
        for path in files:
            document = f"{library}/{path.relative_to(root)}"
            if left <= 0:
                break
            if document in names:
                continue
            found = [(kind, own) for kind, text in _docstrings(path) for own in _paragraphs(text) if own not in seen]
            random.Random(f"{seed} {document}").shuffle(found)
            for kind, own in found[: min(left, per_document)]:
                seen.add(own)
                left -= 1
                yield Paragraph(library, document, kind, " ".join(own.split()[:words]))


def file_documents(path: Path) -> Iterator[Document]:
    """The documents of a UTF-8 text file: split at lines that start with `=== `, otherwise the whole file as one.

    Raises ValueError if the file does not exist, is not UTF-8 text, or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text: must be UTF-8 text, got {path} (byte {error.start} is not)") from None
    except OSError as error:
        raise InputError(f"text: must be a readable file, got {path} ({error.strerror})") from None
    if "\0" in content:
        raise InputError(f"text: must be text, got {path} (it holds NUL bytes)")
    pieces = [piece.strip() for piece in _DOCUMENT_MARK.split(content)]
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        raise InputError(f"text: must hold some text, got {path} (empty)")
    for number, piece in enumerate(pieces):
        yield Document(f"{path.name}#{number}", piece)


def dataset_documents(
    name: str, *, split: str = "train", column: str = "text", shuffle_buffer: int = 0, seed: int = 0
) -> Iterator[Document]:
    """The `column` of a Hugging Face dataset, streamed; `name` is a hub id or a local path that `datasets` can load.

    With `shuffle_buffer` > 0, rows come in the order of `datasets`' buffered shuffle with `seed`.

    Raises ValueError if the dataset cannot be loaded or has no such column.
    """
    from datasets import load_dataset

    with told("dataset", "must be a dataset that can be loaded", repr(name)):
        rows = load_dataset(name, split=split, streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else rows
    for number, row in enumerate(rows):
        if column not in row:
            raise InputError(f"dataset: {name!r} must have a column {column!r}, got {sorted(row)}")
        yield Document(f"{name}#{number}", row[column])


def documents(*, text: str = "", dataset: str = "", shuffle_buffer: int = 0, seed: int = 0) -> Iterable[Document]:
    """The documents of a file `text`, of a `dataset` (shuffled or not), or the installed documentation.

    Raises ValueError if both are given.
    """
    if text and dataset:
        raise InputError(f"text: give one of text and dataset, got {text!r} and {dataset!r}")
    if text:
        return file_documents(Path(text))
    if dataset:
        return dataset_documents(dataset, shuffle_buffer=shuffle_buffer, seed=seed)
    return installed_documents()


def with_insertions(document: Document, insertion: str, *, every: int) -> Document:
    """The same document with `insertion` after every `every`-th word, starting in the middle of the first stretch."""
    words = document.text.split(" ")
    for place in range(every // 2, len(words), every):
        words[place] += insertion
    return Document(document.name, " ".join(words))


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token in front of a context: BOS, or EOS if the tokenizer has no BOS, as in TransformerLens and SAELens."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if found is None else int(found)  # pyright: ignore[reportArgumentType]  (of a tokenizer's many types)


def bos_note(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool) -> str:
    """A description of what precedes every context."""
    if not prepend_bos:
        return "without BOS"
    if tokenizer.bos_token_id is not None:
        return "with BOS"
    found = "without BOS (the tokenizer has neither BOS nor EOS)"
    return found if bos_id(tokenizer) is None else "with EOS in front (the tokenizer has no BOS)"


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of BOS, EOS, PAD, SEP and decoder start, ascending: what SAELens leaves out for `exclude_special_tokens`.

    Chat-template tokens have no such role and are kept.
    """
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
    ids = (getattr(tokenizer, role, None) for role in roles)
    return tuple(sorted({int(token) for token in ids if token is not None}))


def context_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    context_length: int,
    prepend_bos: bool = True,
    per_document: int = 0,
) -> Iterator[tuple[Document, list[list[int]]]]:
    """Each document with its contexts of exactly `context_length` tokens, BOS included.

    A context never crosses documents; the rest at the end of a document is dropped, never padded.

    Args:
        prepend_bos: start every context with BOS, see `bos_id`.
        per_document: take at most this many contexts per document; 0: all.

    Raises ValueError if a context has no room for a token besides BOS.
    """
    first = bos_id(tokenizer) if prepend_bos else None
    bos = [] if first is None else [first]
    body = context_length - len(bos)
    if body < 1:
        raise InputError(f"context_length: must be at least {len(bos) + 1}, got {context_length}")
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
        yield document, pieces[: per_document or None]
