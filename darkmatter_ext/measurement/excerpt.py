"""A line of held-out text with the squared norms of its tokens, for figures by token."""

from __future__ import annotations

import contextlib
from typing import Any

from darkmatter_ext.activations.store import load_tokenizer
from darkmatter_ext.measurement.run import Measurement
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.runtime.inputs import InputError

EXCERPT_TOKENS = 60  # one line of text that can still be read


def excerpt(found: Measurement) -> dict[str, Any]:
    """Per-token squared norms over a piece of held-out text, from the table of tokens.

    Empty when SAEs of several sites were measured: their errors are not on one scale.
    """
    if len(found.sites) > 1:
        return {}
    (site,) = found.sites.values()
    table = read_tokens(site.per_token)
    first = table["context"][0].as_py()
    rows = table.slice(0, min(EXCERPT_TOKENS, table["context"].to_pylist().count(first)))
    ids = rows["token"].to_pylist()
    tokenizer = None
    if found.config["model"] and min(ids) >= 0:
        with contextlib.suppress(
            InputError
        ):  # stored activations of a model that is not on this machine: ids are shown
            tokenizer = load_tokenizer(found.config["model"])
    return {
        "tokens": [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids],
        "squared_norm_x": rows["x"].to_pylist(),
        "squared_norms": {
            name: {part: rows[f"{name}/{part}"].to_pylist() for part in ("error", "nonlinear")} for name in site.saes
        },
    }
