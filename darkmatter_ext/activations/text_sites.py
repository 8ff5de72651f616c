"""Activations of short texts, each run as its own context: at its last token, or at all its tokens.

Texts are padded on the right, so that in a causal model no token sees anything outside its own text.

Shapes: N texts, T kept tokens, d width of a site.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import parse_hook_point
from darkmatter_ext.activations.store import (
    Progress,
    check_fits,
    load_lens,
    load_model,
    load_tokenizer,
    model_key,
    site_activations,
)
from darkmatter_ext.activations.text import bos_id
from darkmatter_ext.runtime.inputs import InputError, require_one_of
from darkmatter_ext.runtime.storage import atomic_file, cache_dir, fingerprint

POOLS = ("last", "mean")
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TextSites:
    """Activations of the kept tokens of texts, in the order of the texts."""

    x: Mapping[str, Tensor]  # hook point -> [T, d]
    texts: Tensor  # [T] int64, the text of each token
    tokens: list[list[int]]  # of each text, including BOS

    def pooled(self, values: Tensor) -> Tensor:
        """Means [N, p] of values [T, p] over each text's kept tokens."""
        sums = values.new_zeros(len(self.tokens), values.shape[1]).index_add_(0, self.texts, values)
        return sums / torch.bincount(self.texts, minlength=len(self.tokens)).to(values)[:, None]

    def sink_notes(self, hook: str, ratio: float) -> list[str]:
        """A sentence for a result's notes if states have norms above `ratio` medians; 0: no norm is unusual.

        The first tokens of a context often hold a few huge numbers that drown out any difference between words or texts.
        """
        norms = self.x[hook].norm(dim=1)
        unusual = int((norms > ratio * norms.median()).sum()) if ratio else 0
        return [
            f"{hook}: {unusual} of {len(norms)} states of short texts have norms above {ratio:g} medians (attention sinks): "
            "what is said of them there is said of these. Longer texts before them help."
        ] if unusual else []  # fmt: skip


def tokenised_texts(model: str, texts: Sequence[str], *, bos: bool) -> list[list[int]]:
    """Token ids of each text, with BOS in front if requested. Raises InputError for a text without tokens."""
    tokenizer = load_tokenizer(model)
    first = bos_id(tokenizer) if bos else None
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InputError(f"texts: must have at least one token each, got {text!r}")
    return [([] if first is None else [first]) + row for row in rows]


def text_sites(
    model: str,
    hooks: Sequence[str],
    texts: Sequence[str],
    *,
    bos: bool,
    pool: str = "last",
    first: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    processing: Mapping[str, bool] | None = None,
    progress: Progress | None = None,
) -> TextSites:
    """The activations of texts at hook points, computed once and stored in the cache folder.

    Args:
        pool: "last": the last token of each text; "mean": all from position `first` on (the last one of shorter texts).
        processing: weight processing by TransformerLens (see `store.load_lens`).
        progress: called with the number of texts done.

    Raises InputError for a model, hook point or text that does not fit. Cost: one forward pass up to the deepest hook point.
    """
    from safetensors.torch import load_file, save_file

    require_one_of("pool", POOLS, pool)
    tokens = tokenised_texts(model, texts, bos=bos)
    check_fits(model, context_length=max(map(len, tokens)), tokens=(min(map(min, tokens)), max(map(max, tokens))))
    key = fingerprint(
        model=model_key(model), hooks=list(hooks), tokens=hashlib.sha256(json.dumps(tokens).encode()).hexdigest(), pool=pool,
        first=first if pool == "mean" else 0, dtype=str(dtype), processing=sorted(processing or {}),
    )  # fmt: skip
    path = cache_dir("texts") / f"{key}.safetensors"
    if not path.exists():
        if processing:
            forward = load_lens(model, hooks, processing=processing, device=device, dtype=dtype)
        else:
            depth = 1 + max(parse_hook_point(hook).layer for hook in hooks)
            network = load_model(model, device=device, dtype=dtype, n_layers=depth)
            forward = functools.partial(site_activations, network, list(hooks))
        starts = [len(row) - 1 if pool == "last" else min(first, len(row) - 1) for row in tokens]
        found: dict[int, dict[str, Tensor]] = {}
        for numbers in _batches(tokens):
            length = max(len(tokens[number]) for number in numbers)
            padded = torch.tensor([tokens[number] + [0] * (length - len(tokens[number])) for number in numbers])
            with torch.inference_mode():
                sites = forward(padded.to(device))
            for row, number in enumerate(numbers):
                part = slice(starts[number], len(tokens[number]))
                found[number] = {hook: x[row, part].float().cpu() for hook, x in sites.items()}
            if progress is not None:
                progress(len(numbers))
        content = {hook: torch.cat([found[number][hook] for number in range(len(texts))]) for hook in hooks}
        lengths = [len(row) - start for row, start in zip(tokens, starts, strict=True)]
        content["texts"] = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths))
        with atomic_file(path) as part:
            save_file(content, part)
    content = load_file(path)
    return TextSites({hook: content[hook] for hook in hooks}, content["texts"], tokens)


def _batches(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of texts of similar length, about BATCH_TOKENS at a time."""
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(tokens)), key=lambda number: len(tokens[number])):
        if batches[-1] and (len(batches[-1]) + 1) * len(tokens[number]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(number)
    return batches
