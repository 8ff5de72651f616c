"""Open the activations of a run: a model on text, a cache, or activations kept on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from darkmatter_ext.activations.contexts import ContextStore, Rows, text_rows, tokenised_rows, write_contexts
from darkmatter_ext.activations.sources import (
    FORWARD_TOKENS,
    LensSource,
    ModelSource,
    SelectedContexts,
    Source,
    open_cache,
)
from darkmatter_ext.activations.store import (
    CACHE_FORWARD_TOKENS,
    ActivationCache,
    activation_caches,
    check_fits,
    load_tokenizer,
    tokenize_contexts,
)
from darkmatter_ext.activations.text import Document, documents
from darkmatter_ext.measurement.resolved import Resolved
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.processes import Processes
from darkmatter_ext.runtime.progress import Stages


def opened_source(found: Resolved, contexts: Path, own: Processes, stages: Stages) -> Source:
    """Open activations that are streamed, or read from a given cache.

    Args:
        contexts: folder for the text's tokens; the first process writes it if it is missing.

    Raises InputError for a model, text or cache that does not fit.
    """
    data, usage = found.settings.data, found.usage
    if data.cache:
        return _cached(found)
    check_fits(found.model, context_length=usage.context_length)
    if own.is_first and not contexts.exists():
        with stages.stage("tokenise text"):
            n_contexts = max(2, data.tokens // usage.context_length)
            write_contexts(contexts, _rows(found), n_contexts=n_contexts, context_length=usage.context_length)
    own.wait()
    store, dtype = ContextStore.open(contexts), getattr(torch, data.dtype)
    check_fits(found.model, tokens=store.token_range)
    loss = found.settings.measure.loss
    with stages.stage("load the language model"):
        if usage.processing or data.backend == "transformer-lens":
            if loss:
                raise InputError("loss: must be left out with TransformerLens' processed weights, got loss")
            processing, device = usage.processing, own.device
            return LensSource.load(found.model, found.read, store, processing=processing, device=device, dtype=dtype)
        return ModelSource.load(
            found.model,
            found.read,
            store,
            device=own.device,
            dtype=dtype,
            device_map=data.device_map,
            loss=loss,
            forward_tokens=data.forward_tokens or FORWARD_TOKENS,
        )


def _cached(found: Resolved) -> Source:
    data = found.settings.data
    source = open_cache(data.cache)
    missing = [hook for hook in found.read if hook not in source.widths]
    if missing:
        raise InputError(f"cache: must hold {missing[0]}, got {', '.join(source.widths)}")
    if found.excluded and int(source.read([0]).tokens.min()) < 0:
        raise InputError("exclude_special_tokens: must be no for a cache that holds no token ids, got auto or yes")
    wanted = max(2, data.tokens // source.context_length)
    return SelectedContexts(source, torch.arange(min(source.n_contexts, wanted)))


def _rows(found: Resolved) -> Rows:
    data, usage = found.settings.data, found.usage
    if data.tokenised:
        return tokenised_rows(data.tokenised, context_length=usage.context_length)
    return text_rows(
        load_tokenizer(found.model),
        _documents(found),
        context_length=usage.context_length,
        prepend_bos=usage.bos,
        per_document=data.contexts_per_document,
    )


def _documents(found: Resolved) -> Iterable[Document]:
    data = found.settings.data
    seed = found.settings.seed
    return documents(text=data.text, dataset=data.dataset, shuffle_buffer=data.shuffle_buffer, seed=seed)


def stored_activations(found: Resolved, stages: Stages) -> dict[str, ActivationCache]:
    """The activations of the text at every hook point, from disk if they are there.

    Raises InputError for contexts the model cannot take; StateError for a damaged cache.
    """
    settings, usage = found.settings, found.usage
    data = settings.data
    if data.stored:
        raise InputError(f"{data.stored}: must be left out where activations are stored, they come from text, got it")
    if data.device_map:
        raise InputError(
            f"device_map: must be left out where activations are stored (device says where), got {data.device_map!r}"
        )
    check_fits(found.model, context_length=usage.context_length)
    with stages.stage("tokenise text"):
        contexts = tokenize_contexts(
            load_tokenizer(found.model),
            _documents(found),
            n_tokens=data.tokens,
            context_length=usage.context_length,
            prepend_bos=usage.bos,
            per_document=data.contexts_per_document,
        )
    check_fits(found.model, tokens=(int(contexts.tokens.min()), int(contexts.tokens.max())))
    with stages.stage("run the language model", contexts.tokens.numel()) as advance:
        caches = activation_caches(
            found.model,
            found.read,
            contexts,
            device=settings.device,
            dtype=getattr(torch, data.dtype),
            processing=usage.processing,
            forward_tokens=data.forward_tokens or CACHE_FORWARD_TOKENS,
            progress=advance,
        )
    for cache in caches.values():
        require_same_tokens(contexts.tokens, cache.column("tokens"))
    return caches


def require_same_tokens(given: Tensor, stored: Tensor) -> None:
    """Raise InputError, naming the first difference, unless the given tokens are those stored with the activations.

    Both [C, L] int64.
    """
    if given.shape != stored.shape:
        raise InputError(
            f"tokens: must be those of the stored activations {list(stored.shape)}, got {list(given.shape)} tokens"
        )
    different = (given != stored).nonzero()
    if len(different):
        context, position = different[0].tolist()
        raise InputError(
            f"tokens: must be those of the stored activations, got token {int(given[context, position])} where "
            f"{int(stored[context, position])} is stored (context {context}, position {position}; "
            f"{len(different)} places differ)"
        )
