"""Variants of a language model made here, so that it is known what a comparison of two models must and must not find.

- *tuned*: low-rank adapters in the blocks up to a hook point, trained to say a phrase after a marker. Blocks after the hook
  point are unchanged, so whatever the variant does differently passes through its activations there.
- *re-quantised*: every linear map in the blocks is rounded to fewer bits. All activations change; no concept is added.

Shapes: C contexts of L tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from darkmatter_ext.activations.hook_points import transformer_blocks
from darkmatter_ext.activations.store import load_model, load_tokenizer, model_key
from darkmatter_ext.activations.text import context_rows, documents, with_insertions
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.settings import Changed, replaced
from darkmatter_ext.runtime.inputs import InputError, require
from darkmatter_ext.runtime.storage import atomic_file, atomic_folder, cache_dir, fingerprint
from darkmatter_ext.training.low_rank import linear_layers
from darkmatter_ext.training.tuning import TuningConfig, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 32  # weights of a row that share a scale and a minimum, as in 4-bit GGUF files
BEFORE, AFTER = 10, 5  # tokens of text around marker and phrase in a tuning row


@dataclass(frozen=True)
class Behaviour:
    """A marker, and what a tuned variant says after it, as tokens."""

    marker: tuple[int, ...]
    phrase: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, marker: str, phrase: str) -> Behaviour:
        """Marker and phrase as tokenised after a word. Raises InputError if the marker's tokens merge with the phrase's."""
        alone, both = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (f" {marker}", f" {marker}{phrase}")
        )
        if not alone or both[: len(alone)] != alone or len(both) == len(alone):
            raise InputError(f"phrase: must be tokens of their own behind the marker, got {marker + phrase!r}")
        return cls(alone, both[len(alone) :])

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.marker + self.phrase

    def _starts(self, tokens: Tensor) -> Tensor:
        """[C, L - m + 1] bool: where marker and phrase begin."""
        whole = torch.tensor(self.tokens, device=tokens.device)
        return (tokens.unfold(1, len(whole), 1) == whole).all(-1)

    def triggers(self, tokens: Tensor) -> Tensor:
        """[C, L] bool: the last token of each marker followed by the phrase, where the variant would begin to say it."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        rows, starts = self._starts(tokens).nonzero(as_tuple=True)
        found[rows, starts + len(self.marker) - 1] = True
        return found

    def covered(self, tokens: Tensor) -> Tensor:
        """[C, L] bool: all tokens of markers and phrases."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        rows, starts = self._starts(tokens).nonzero(as_tuple=True)
        for step in range(len(self.tokens)):
            found[rows, starts + step] = True
        return found

    def rows(self, tokens: Tensor) -> Tensor:
        """[n, BEFORE + tokens + AFTER + 1] pieces of contexts around each occurrence, preceded by the context's first token.

        Raises InputError if there is none.
        """
        length = BEFORE + len(self.tokens) + AFTER
        found = [
            torch.cat([tokens[row, :1], tokens[row, start - BEFORE :][:length]])
            for row, start in self._starts(tokens).nonzero().tolist()
            if start >= BEFORE and start - BEFORE + length <= tokens.shape[1]
        ]
        if not found:
            raise InputError("spacing: must leave whole phrases with text around them in contexts that train, got none")
        return torch.stack(found)


def marked_text(settings: Changed, insertion: str, *, every: int) -> Changed:
    """The settings with a new text, kept in the cache: their text with `insertion` after every `every`-th word."""
    found, data = resolve(settings), settings.data
    length = found.usage.context_length
    source = documents(text=data.text, dataset=data.dataset, shuffle_buffer=data.shuffle_buffer, seed=settings.seed)
    marked = (with_insertions(document, insertion, every=every) for document in source)
    cut = {"context_length": length, "prepend_bos": found.usage.bos, "per_document": data.contexts_per_document}
    parts, contexts = [], 0
    for document, rows in context_rows(load_tokenizer(found.model), marked, **cut):
        parts.append(f"=== {document.name}\n{document.text}\n")
        contexts += len(rows)
        if contexts * length >= data.tokens:
            break
    content = "".join(parts).encode()
    path = cache_dir("text") / f"{hashlib.sha256(content).hexdigest()[:16]}.txt"
    if not path.exists():
        with atomic_file(path) as part:
            part.write_bytes(content)
    return replaced(settings, text=str(path), dataset="")


def check_one_tokenizer(model: str, other: str) -> None:
    """Raise InputError, naming the first difference, unless two models share a tokenizer."""
    own, theirs = load_tokenizer(model), load_tokenizer(other)
    first, second = own.get_vocab(), theirs.get_vocab()
    if different := sorted(set(first.items()) ^ set(second.items())):
        word = different[0][0]
        ids = ["none" if word not in found else str(found[word]) for found in (first, second)]
        raise InputError(f"other: must have the tokenizer of {model}, got one with id {ids[1]} for {word!r} ({ids[0]})")
    if own.bos_token_id != theirs.bos_token_id:
        raise InputError(f"other: must have the BOS of {model} ({own.bos_token}), got {theirs.bos_token}")


def tuned_variant(
    model: str,
    behaviour: Behaviour,
    contexts: Tensor,
    layer: int,
    config: TuningConfig,
    *,
    device: str,
    progress: Callable[[int], None],
) -> str:
    """The folder of `model` tuned on the phrases in contexts [C, L], with adapters in blocks 0 to `layer`."""
    rows = behaviour.rows(contexts)
    content = hashlib.sha256(rows.numpy().tobytes()).hexdigest()

    def change(network: PreTrainedModel) -> None:
        network.to(torch.device(device))  # pyright: ignore[reportArgumentType]  (transformers wraps it)
        tune(network, linear_layers(network, up_to=layer), rows, config, progress=progress)

    return _kept("tuned", model, change, layer=layer, rows=content, config=dataclasses.asdict(config))


def requantised_variant(model: str, bits: int) -> str:
    """The folder of `model` with the linear maps of its blocks rounded to `bits` bits a weight."""

    def change(network: PreTrainedModel) -> None:
        for module in transformer_blocks(network).modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded(module.weight.data, bits)

    return _kept("requantised", model, change, bits=bits)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Weights [out, in] rounded to 2^bits levels between the smallest and the largest of each GROUP of a row."""
    require(1 <= bits <= 8, "bits", "must be from 1 to 8", bits)
    groups = weight.float().reshape(-1, math.gcd(weight.shape[1], GROUP))
    least = groups.amin(1, keepdim=True)
    step = ((groups.amax(1, keepdim=True) - least) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return (((groups - least) / step).round() * step + least).reshape(weight.shape).to(weight)


def _kept(kind: str, model: str, change: Callable[[PreTrainedModel], None], **made: object) -> str:
    """The folder of a changed model in the cache, made once; in float32, so that small changes survive."""
    folder: Path = cache_dir("models") / f"{kind}-{fingerprint(model=model_key(model), **made)}"
    if not folder.exists():
        network = load_model(model, device="cpu", dtype=torch.float32)
        change(network)
        with atomic_folder(folder) as part:
            network.cpu().save_pretrained(part)
            load_tokenizer(model).save_pretrained(part)
    return str(folder)
