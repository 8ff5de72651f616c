"""What the report page lets people explore: held-out text, every token's error and latents, every latent's contexts.

It is made after a measurement, from as many whole documents as fit a budget of bytes. Their contexts are read and encoded
once more (a share of what the measurement itself reads), so the engine's sums and checkpoints are not involved.

Shapes: C contexts of L tokens, T latents kept per token, K latents kept per SAE, m contexts kept per latent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from darkmatter_ext.measurement.excerpt import token_texts
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.run import Inputs, Measurement
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.measurement.spliced_text import SplicedText, spliced_text
from darkmatter_ext.measurement.token_table import read_tokens
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    import pyarrow

TOKEN_LATENTS = 8  # T
LATENT_CONTEXTS = 8  # m
NEAREST = 5  # nearest latents, by cosine of their decoder rows
MOST_LATENTS = 8192  # upper limit of K: the cosines cost K^2 d
TEXT_SHARE = 0.75  # of the budget; the rest is for the latents
# Bytes a token takes in the page: its text and loss; per site the norm of x; per SAE three parts, L0, KL and T latents.
TOKEN_BYTES, SITE_BYTES, SAE_BYTES = 8, 4, 18 + 5 * TOKEN_LATENTS
LATENT_BYTES = 20 + 6 * LATENT_CONTEXTS + 6 * NEAREST
KEPT_BITS = 12  # of a float32's 23: four digits, and they compress well
PARTS = ("error", "linear", "nonlinear")


class Exploration(NamedTuple):
    """What a result keeps for the page."""

    about: dict[str, Any]  # JSON: the SAEs in the order of their numbers, and how much was kept
    arrays: dict[str, np.ndarray]  # `page/...`


class _Text(NamedTuple):
    """The contexts that are kept."""

    contexts: list[int]  # their numbers in the source, ascending
    tokens: Tensor  # [C, L] int64
    loss: Tensor | None  # [C, L]
    x: dict[str, Tensor]  # hook point -> [C, L, d]
    places: dict[str, Tensor]  # hook point -> [n] indices of its measured tokens in [C * L], ascending


def explored(inputs: Inputs, found: Measurement, stages: Stages) -> Exploration | None:
    """Held-out text with what was measured at its tokens; None if page_megabytes is 0, and in all processes but the first.

    Cost: one more reading and encoding of the kept tokens; K^2 d multiply-adds per SAE; `spliced_text`. Memory: the kept
    tokens' activations, 4 d bytes per token and site, and 20 bytes per active latent there.
    """
    budget = inputs.settings.page_megabytes * 1e6
    saes = [inputs.sae(sae["name"]) for sae in found.saes if not sae.get("variant")]
    if budget <= 0 or not saes or not inputs.processes.is_first:
        return None
    tables = {hook: read_tokens(site.per_token) for hook, site in found.sites.items()}
    room = budget * TEXT_SHARE / (TOKEN_BYTES + SITE_BYTES * len(tables) + SAE_BYTES * len(saes))
    length = inputs.source.context_length
    chosen = _contexts(next(iter(tables.values())), inputs.source.documents, max(1, int(room / length)))
    text, active = _read(inputs, saes, tables, chosen, stages)
    most = min(MOST_LATENTS, max(1, int(budget * (1 - TEXT_SHARE) / (LATENT_BYTES * len(saes)))))
    spliced = _spliced(inputs, saes, text, stages)
    arrays = _text_arrays(inputs, text, spliced)
    for number, (hook, table) in enumerate(tables.items()):
        arrays[f"page/site{number}/x"] = _spread(text, hook, _rows(table, text, "x"))
    about = []
    for number, (sae, triples) in enumerate(zip(saes, active, strict=True)):
        columns = {part: _rows(tables[sae.hook], text, f"{sae.name}/{part}") for part in (*PARTS, "l0")}
        latents = _latents(sae, found.sites[sae.hook], triples, columns["nonlinear"], text, most)
        own = {part: _spread(text, sae.hook, column) for part, column in columns.items()} | _strongest(triples, text)
        if not isinstance(spliced, str):
            own["kl"] = _rounded(spliced.kl[sae.name].numpy())
        arrays |= {f"page/sae{number}/{name}": array for name, array in (own | latents).items()}
        about.append(sae.listed | {"site": list(tables).index(sae.hook), "latents_kept": len(latents["latent/number"])})
    counts = {"contexts": len(chosen), "tokens": len(text.places[saes[0].hook])}
    counts["held_out"] = next(iter(found.sites.values())).n_held_out
    kl = {"absent": spliced} if isinstance(spliced, str) else {"contexts": spliced.contexts}
    return Exploration({"saes": about, **counts, "kl": kl}, arrays)


def _contexts(table: pyarrow.Table, documents: Tensor, most: int) -> list[int]:
    """At most `most` held-out contexts, evenly spread over the text: whole documents if they fit."""
    numbers = np.unique(table["context"].to_numpy())
    owners = documents.numpy()[numbers]
    names = np.unique(owners)
    step = -(-len(numbers) // most)
    return numbers[np.isin(owners, names[::step])][:most].tolist()


class _Active(NamedTuple):
    """The active latents of an SAE at the measured tokens, sorted by token."""

    places: np.ndarray  # [z] int64 in [C * L]
    latents: np.ndarray  # [z] int64
    values: np.ndarray  # [z] float32


def _read(
    inputs: Inputs, saes: Sequence[SiteSae], tables: dict[str, pyarrow.Table], chosen: list[int], stages: Stages
) -> tuple[_Text, list[_Active]]:
    """Read the contexts and encode their measured tokens with one SAE after another."""
    length, block = inputs.source.context_length, inputs.settings.measure.block_contexts
    places = {hook: torch.from_numpy(_places(table, chosen, length)) for hook, table in tables.items()}
    kept: dict[str, list[Tensor]] = {sae.reads: [] for sae in saes}
    tokens, losses = [], []
    with stages.stage("text and latents for the page", len(chosen)) as advance:
        for start in range(0, len(chosen), block):
            batch = inputs.source.read(chosen[start : start + block])
            tokens.append(batch.tokens)
            losses.append(batch.loss)
            for hook, rows in kept.items():
                rows.append(batch.activations[hook].cpu())
            advance(len(batch.numbers))
    x = {hook: torch.cat(rows) for hook, rows in kept.items()}
    loss = torch.cat([part for part in losses if part is not None]) if losses[0] is not None else None
    text = _Text(chosen, torch.cat(tokens), loss, x, places)
    return text, [_active_latents(inputs, sae, x[sae.reads].flatten(0, 1), places[sae.hook]) for sae in saes]


def _spliced(inputs: Inputs, saes: Sequence[SiteSae], text: _Text, stages: Stages) -> SplicedText | str:
    measured = {hook: torch.zeros(text.tokens.shape, dtype=torch.bool) for hook in text.places}
    for hook, places in text.places.items():
        measured[hook].view(-1)[places] = True
    return spliced_text(inputs, saes, text.tokens, text.x, measured, stages)


def _active_latents(inputs: Inputs, sae: SiteSae, x: Tensor, places: Tensor) -> _Active:
    """The active latents of an SAE, which is loaded once, at places [n] of x [C * L, d]."""
    encode = sae.own
    found = [
        _active(encode, x[some].to(inputs.processes.device, torch.float32), some)
        for some in places.split(inputs.settings.measure.batch_tokens)
    ]
    return _Active(*map(np.concatenate, zip(*found, strict=True)))


@torch.no_grad()
def _active(encode: Callable[[Tensor], Any], x: Tensor, places: Tensor) -> _Active:
    acts = encode(x).acts
    if acts.is_ragged:
        counts = acts.crow_indices.diff().cpu()
        rows, latents = places.repeat_interleave(counts), acts.col_indices
    else:
        rows, latents = places.repeat_interleave(acts.indices.shape[-1]), acts.indices.flatten()
    values = acts.values.flatten().float().cpu()
    kept = values > 0
    return _Active(rows[kept].numpy(), latents.cpu()[kept].numpy(), values[kept].numpy())


def _places(table: pyarrow.Table, chosen: list[int], length: int) -> np.ndarray:
    """[n] indices in [C * L] of the table's tokens in the chosen contexts; both are ascending."""
    contexts = table["context"].to_numpy()
    kept = np.isin(contexts, chosen)
    return np.searchsorted(chosen, contexts[kept]) * length + table["position"].to_numpy()[kept]


def _rows(table: pyarrow.Table, text: _Text, column: str) -> np.ndarray:
    """[n] a column of the table at the kept tokens."""
    return table[column].to_numpy()[np.isin(table["context"].to_numpy(), text.contexts)]


def _spread(text: _Text, hook: str, column: np.ndarray) -> np.ndarray:
    """[C, L] a column of the measured tokens, rounded; NaN (-1 for integers) at all other tokens."""
    whole = column.dtype.kind == "i"
    spread = np.full(text.tokens.numel(), -1 if whole else np.nan, np.int32 if whole else np.float32)
    spread[text.places[hook].numpy()] = column if whole else _rounded(column)
    return spread.reshape(text.tokens.shape)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 to KEPT_BITS bits of mantissa."""
    low = 23 - KEPT_BITS
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + (1 << (low - 1))) >> low) << low).astype(np.uint32).view(np.float32)


def _text_arrays(inputs: Inputs, text: _Text, spliced: SplicedText | str) -> dict[str, np.ndarray]:
    ids, numbers = text.tokens.unique(return_inverse=True)
    arrays = {
        "page/tokens": numbers.numpy().astype(np.int32),
        # JSON, because arrays of strings lose a trailing NUL.
        "page/vocabulary": np.frombuffer(json.dumps(token_texts(inputs.model, ids.tolist())).encode(), np.uint8),
        "page/contexts": np.array(text.contexts, np.int32),
        "page/documents": inputs.source.documents[text.contexts].numpy().astype(np.int32),
    }
    loss = text.loss if text.loss is not None or isinstance(spliced, str) else spliced.loss
    if loss is not None:
        arrays["page/loss"] = _rounded(loss.numpy())
    return arrays


def _ranks(keys: np.ndarray) -> np.ndarray:
    """The rank of each entry among those with the same key; `keys` [z] are sorted."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))


def _strongest(active: _Active, text: _Text) -> dict[str, np.ndarray]:
    """The T strongest latents of every token, strongest first: numbers [C, L, T] (-1 for none) and values."""
    order = np.lexsort((-active.values, active.places))
    places, rank = active.places[order], _ranks(active.places[order])
    kept = rank < TOKEN_LATENTS
    shape = (text.tokens.numel(), TOKEN_LATENTS)
    latents, values = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    latents[places[kept], rank[kept]] = active.latents[order][kept]
    values[places[kept], rank[kept]] = _rounded(active.values[order][kept])
    return {name: array.reshape(*text.tokens.shape, -1) for name, array in (("latents", latents), ("values", values))}


def _latents(
    sae: SiteSae, site: SiteMeasurement, active: _Active, nonlinear: np.ndarray, text: _Text, most: int
) -> dict[str, np.ndarray]:
    """The at most `most` latents that fire most often in the kept text, by number."""
    fired = np.bincount(active.latents, minlength=sae.d_sae)
    chosen = np.sort(np.argsort(-fired, kind="stable")[: min(most, np.count_nonzero(fired))])
    energy = np.zeros(text.tokens.numel())
    energy[text.places[sae.hook].numpy()] = nonlinear
    at = np.bincount(active.latents, weights=energy[active.places], minlength=sae.d_sae)
    sums = site.latents[sae.name]
    places, values = _top_contexts(active, chosen, text.tokens.shape[1])
    rows = sae.load().W_dec.detach()[torch.from_numpy(chosen)].flatten(1).float()
    norms = rows.norm(dim=1)
    nearest, cosines = _nearest(rows / norms.clamp(min=1e-12)[:, None], chosen)
    columns = {
        "number": chosen.astype(np.int32),
        "fired": fired[chosen].astype(np.int32),
        "rate": (sums.fired / max(1, site.n_fit + site.n_held_out)).cpu().numpy()[chosen],
        "mean_value": sums.mean_active_value.cpu().numpy()[chosen],
        "decoder_norm": norms.cpu().numpy(),
        "nonlinear_share": at[chosen] / max(energy.sum(), 1e-30),
        "places": places,
        "values": values,
        "nearest": nearest,
        "cosines": cosines,
    }
    return {f"latent/{name}": array if array.dtype.kind == "i" else _rounded(array) for name, array in columns.items()}


def _top_contexts(active: _Active, chosen: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The strongest token of each of the m strongest contexts: places [K, m] in [C * L] (-1 for none) and values."""
    row = np.full(int(active.latents.max(initial=0)) + 1, -1)
    row[chosen] = np.arange(len(chosen))
    kept = row[active.latents] >= 0
    rows, places, strength = row[active.latents[kept]], active.places[kept], active.values[kept]
    order = np.lexsort((-strength, places // length, rows))
    rows, places, strength = rows[order], places[order], strength[order]
    first = np.r_[True, (rows[1:] != rows[:-1]) | (places[1:] // length != places[:-1] // length)]
    rows, places, strength = rows[first], places[first], strength[first]
    order = np.lexsort((-strength, rows))
    rows, places, strength = rows[order], places[order], strength[order]
    rank = _ranks(rows) if len(rows) else rows
    best = rank < LATENT_CONTEXTS
    found, values = np.full((len(chosen), LATENT_CONTEXTS), -1, np.int32), np.zeros((len(chosen), LATENT_CONTEXTS))
    found[rows[best], rank[best]], values[rows[best], rank[best]] = places[best], strength[best]
    return found, values


def _nearest(rows: Tensor, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest kept latents by cosine of their unit decoder rows [K, d]: numbers [K, NEAREST] and cosines."""
    count = min(NEAREST, len(rows) - 1)
    numbers, cosines = np.full((len(rows), NEAREST), -1, np.int32), np.zeros((len(rows), NEAREST), np.float32)
    for start in range(0, len(rows) if count else 0, 1024):
        part = rows[start : start + 1024] @ rows.mT
        own = torch.arange(start, start + len(part), device=rows.device)
        part[torch.arange(len(part), device=rows.device), own] = -2.0
        best = part.topk(count, dim=1)
        numbers[start : start + len(part), :count] = chosen[best.indices.cpu().numpy()]
        cosines[start : start + len(part), :count] = best.values.cpu().numpy()
    return numbers, cosines
