"""A line of held-out text with the squared norms of its tokens, for figures by token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.measurement.run import Measurement
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.runtime.inputs import InputError

EXCERPT_TOKENS = 60  # as much text as one line can show legibly


def excerpt(found: Measurement) -> dict[str, Any]:
    """Per-token squared norms over a piece of held-out text, from the table of tokens.

    Empty if SAEs of several sites were measured: their errors are not on the same scale.
    """
    if len(found.sites) > 1:
        return {}
    (site,) = found.sites.values()
    table = read_tokens(site.per_token)
    first = table["context"][0].as_py()
    rows = table.slice(0, min(EXCERPT_TOKENS, table["context"].to_pylist().count(first)))
    return {
        "tokens": token_texts(found.config["model"], rows["token"].to_pylist()),
        "squared_norm_x": rows["x"].to_pylist(),
        "squared_norms": {
            name: {part: rows[f"{name}/{part}"].to_pylist() for part in ("error", "nonlinear")} for name in site.saes
        },
    }


def token_texts(model: str, ids: Sequence[int]) -> list[str]:
    """Each token as it appears in a text, including a leading space; its id if there is no tokenizer.

    That happens for stored activations of a model that is not on this machine, and for unknown token ids (-1).
    """
    tokenizer = None
    if model and min(ids, default=-1) >= 0:
        with contextlib.suppress(InputError):
            tokenizer = load_tokenizer(model)
    if tokenizer is None:
        return [str(token) for token in ids]
    texts = []
    for token in ids:
        text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        # SentencePiece drops the leading space of a single token.
        begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
        texts.append(f" {text}" if begins_word and not text.startswith(" ") else text)
    return texts
