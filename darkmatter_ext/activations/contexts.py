"""Contexts of tokens kept on disk: read by number, never all in memory.

A folder with `tokens.npy` [C, L] int32, `documents.npy` [C] int32 and `contexts.json`, readable with numpy alone. At 4
bytes per token it is a thousandth of the size of the activations. It makes runs resumable, because context number 17 is the
same text in every process and after every restart.

Shapes: C contexts, L tokens per context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from darkmatter_ext.activations.text import Document, context_rows
from darkmatter_ext.runtime.inputs import InputError, StateError, reason, told
from darkmatter_ext.runtime.storage import atomic_folder, parsed_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_COLUMNS = ("input_ids", "tokens")  # of pre-tokenised datasets: Hugging Face's name, SAELens' name
Rows = Iterator[tuple[int, list[int]]]  # (document number, exactly L tokens)


@dataclass(frozen=True)
class ContextStore:
    """Tokens on disk."""

    folder: Path
    n_contexts: int
    context_length: int
    sha256: str  # of the tokens

    @classmethod
    def open(cls, folder: Path) -> ContextStore:
        """Open a folder. Raises RuntimeError (one line) if it is damaged."""
        try:
            meta = parsed_json((folder / "contexts.json").read_text())
            store = cls(folder, meta["n_contexts"], meta["context_length"], meta["sha256"])
            store.tokens([0])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise StateError(f"contexts: {folder} is damaged ({reason(error)}); delete it") from None
        return store

    def tokens(self, numbers: Iterable[int]) -> Tensor:
        """[c, L] int64: the contexts with these numbers. Reopens the file, so mapped pages do not count as ours for long."""
        mapped = np.load(self.folder / "tokens.npy", mmap_mode="r")
        return torch.from_numpy(mapped[list(numbers)].astype(np.int64))

    @property
    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        mapped = np.load(self.folder / "tokens.npy", mmap_mode="r")
        return int(mapped.min()), int(mapped.max())

    @property
    def documents(self) -> Tensor:
        """[C] int64: the document each context was cut from."""
        return torch.from_numpy(np.load(self.folder / "documents.npy").astype(np.int64))


def text_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    context_length: int,
    prepend_bos: bool,
    per_document: int = 0,
) -> Rows:
    """Contexts from text, see `text.context_rows`."""
    pieces = context_rows(
        tokenizer, documents, context_length=context_length, prepend_bos=prepend_bos, per_document=per_document
    )
    for number, (_, rows) in enumerate(pieces):
        for row in rows:
            yield number, row


def tokenised_rows(name: str, *, context_length: int, split: str = "train") -> Rows:
    """Contexts from a pre-tokenised dataset: a folder saved by `datasets`, a hub id or a local path it can load.

    Rows are used unchanged, cut to `context_length`; shorter rows are skipped. No BOS is added: tokenisation decided that.

    Raises ValueError if the dataset cannot be loaded or has neither column `input_ids` nor `tokens`.
    """
    for number, row in enumerate(_dataset_rows(name, split)):
        column = next((column for column in TOKEN_COLUMNS if column in row), None)
        if column is None:
            raise InputError(
                f"tokenised: must have a column {' or '.join(TOKEN_COLUMNS)}, got {sorted(row)} in {name!r}"
            )
        ids = row[column]
        if len(ids) >= context_length:
            yield number, [int(token) for token in ids[:context_length]]


def _dataset_rows(name: str, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset, load_from_disk

    with told("tokenised", "must be a dataset that can be loaded", repr(name)):
        if (Path(name) / "state.json").exists():
            return load_from_disk(name)  # pyright: ignore[reportReturnType]  (a Dataset yields dicts)
        return load_dataset(name, split=split, streaming=True)


def write_contexts(folder: Path, rows: Rows, *, n_contexts: int, context_length: int) -> ContextStore:
    """Write the first `n_contexts` rows; the folder appears only when complete. Memory: one row.

    Raises ValueError if there are fewer rows.
    """
    digest = hashlib.sha256()
    with atomic_folder(folder) as part:
        tokens = np.lib.format.open_memmap(part / "tokens.npy", "w+", np.int32, (n_contexts, context_length))
        documents = np.lib.format.open_memmap(part / "documents.npy", "w+", np.int32, (n_contexts,))
        written = 0
        for document, row in rows:
            tokens[written], documents[written] = row, document
            digest.update(tokens[written].tobytes())
            written += 1
            if written == n_contexts:
                break
        if written < n_contexts:
            raise InputError(
                f"tokens: the text gives {written} whole contexts of {context_length} tokens, "
                f"{written * context_length} tokens in all, got a request for {n_contexts * context_length}"
            )
        tokens.flush()
        documents.flush()
        meta = {"n_contexts": n_contexts, "context_length": context_length, "sha256": digest.hexdigest()}
        (part / "contexts.json").write_text(json.dumps(meta))
    return ContextStore.open(folder)
