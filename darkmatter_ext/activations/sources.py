"""Where activations come from, behind one small interface: a model run on the fly, or a cache on disk.

A source is a numbered sequence of contexts. `read` returns the activations of any of them at all its hook points, from one
forward pass no deeper than needed. Because context 17 is the same in every process and after every restart, runs can be
divided among processes and resumed.

- `ModelSource`: a Hugging Face causal model, hooks on its own modules; optionally the model's loss at every token.
- `LensSource`: TransformerLens, for SAEs whose metadata asks for processed weights (centred, LayerNorm folded). Processing
  changes the activations, so without it the SAE would see inputs it was not trained on.
- `CacheSource`: our own safetensors caches, one per hook point.
- `DatasetSource`: a cached-activation dataset written by SAELens' CacheActivationsRunner.

Shapes: C contexts, c contexts in a batch, L tokens per context, d width of a hook point.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from darkmatter_ext.activations.contexts import ContextStore
from darkmatter_ext.activations.hook_points import capture, parse_hook_point
from darkmatter_ext.activations.store import (
    CONTEXTS_PER_FORWARD,
    WEIGHT_PROCESSING,
    ActivationCache,
    Forward,
    check_finite,
    load_lens,
    load_model,
    model_key,
    site_activations,
)
from darkmatter_ext.runtime.inputs import InputError, StateError, told
from darkmatter_ext.runtime.storage import atomic_file, cache_dir, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORWARD_TOKENS = 4096  # per forward pass: bounds the memory for attention and logits


class ContextBatch(NamedTuple):
    """Some contexts of a source."""

    numbers: list[int]  # of the contexts
    tokens: Tensor  # [c, L] int64, on the CPU
    activations: Mapping[str, Tensor]  # hook point -> [c, L, d]
    loss: Tensor | None = None  # [c, L] float32: -log p(next token), NaN at the last position


class Source(Protocol):
    """Where a measurement reads activations."""

    @property
    def widths(self) -> dict[str, int]:
        """Hook point -> d."""
        ...

    @property
    def n_contexts(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def identity(self) -> str:
        """A hash of the tokens: two sources of the same name with different text must not be mixed."""
        ...

    @property
    def documents(self) -> Tensor:
        """[C] int64: the document each context comes from (the context's own number if unknown)."""
        ...

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        ...

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        """The contexts with these numbers. Raises RuntimeError for NaN or infinity, or damaged files."""
        ...


@dataclass
class _StoredContexts:
    """Common part of sources that run a model: contexts come from a ContextStore, widths are seen on the first one."""

    hooks: tuple[str, ...]
    store: ContextStore

    @property
    def n_contexts(self) -> int:
        return self.store.n_contexts

    @property
    def context_length(self) -> int:
        return self.store.context_length

    @property
    def identity(self) -> str:
        return self.store.sha256

    @property
    def documents(self) -> Tensor:
        return self.store.documents

    @property
    def largest_token(self) -> int:
        return self.store.token_range[1]

    def __post_init__(self) -> None:
        self._widths: dict[str, int] = {}

    @property
    def widths(self) -> dict[str, int]:
        if not self._widths:
            self._widths = {hook: x.shape[-1] for hook, x in self.read([0]).activations.items()}
        return self._widths

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        raise NotImplementedError


@dataclass
class ModelSource(_StoredContexts):
    """A Hugging Face causal model on stored contexts, with hooks on its own modules; stops after the deepest hook.

    With `loss` the whole model runs, because the loss needs its output.
    """

    network: PreTrainedModel
    loss: bool = False
    forward_tokens: int = FORWARD_TOKENS

    @classmethod
    def load(
        cls,
        model: str,
        hooks: Sequence[str],
        store: ContextStore,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        device_map: str = "",
        loss: bool = False,
        forward_tokens: int = FORWARD_TOKENS,
    ) -> ModelSource:
        """Load the model no deeper than needed. `device_map` works as in transformers ("auto") and replaces `device`.

        Raises ValueError if the model cannot be loaded or has no such hook point.
        """
        depth = 1 + max(parse_hook_point(hook).layer for hook in hooks)
        network = load_model(model, device=device, dtype=dtype, n_layers=depth, cut=not loss, device_map=device_map)
        return cls(tuple(hooks), store, network, loss, forward_tokens)

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        tokens = self.store.tokens(numbers)
        parts = [self._forward(part) for part in tokens.split(max(1, self.forward_tokens // self.context_length))]
        found = {hook: torch.cat([activations[hook] for activations, _ in parts]) for hook in self.hooks}
        loss = torch.cat([part for _, part in parts if part is not None]) if self.loss else None
        return ContextBatch(list(numbers), tokens, found, loss)

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> tuple[Mapping[str, Tensor], Tensor | None]:
        inputs = tokens.to(self.network.device)
        if not self.loss:
            return site_activations(self.network, self.hooks, inputs), None
        outputs: list[Any] = []
        found = capture(
            self.network, self.hooks, lambda: outputs.append(self.network(inputs, use_cache=False).logits), stop=False
        )
        check_finite(found)
        return found, next_token_loss(outputs[0], inputs).cpu()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """[c, L] float32: -log p(tokens[:, i + 1]) at position i, in nats; NaN at the last. Converts one context at a time."""
    loss = torch.full(tokens.shape, torch.nan, device=logits.device)
    for row, (scores, ids) in enumerate(zip(logits, tokens, strict=True)):
        targets = ids[1:].to(scores.device)
        loss[row, :-1] = torch.nn.functional.cross_entropy(scores[:-1].float(), targets, reduction="none")
    return loss


def asked_processing(model_from_pretrained_kwargs: Mapping[str, Any] | None) -> dict[str, bool]:
    """The weight processing that an SAE's metadata asks for: the options of WEIGHT_PROCESSING that are on."""
    given = model_from_pretrained_kwargs or {}
    return {option: True for option in WEIGHT_PROCESSING if given.get(option)}


@dataclass
class LensSource(_StoredContexts):
    """TransformerLens on stored contexts, with weights processed as requested (see `asked_processing`)."""

    forward: Forward

    @classmethod
    def load(
        cls,
        model: str,
        hooks: Sequence[str],
        store: ContextStore,
        *,
        processing: Mapping[str, bool],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LensSource:
        """Load the model. Raises ValueError if TransformerLens cannot load it, or it has no such hook point."""
        return cls(tuple(hooks), store, load_lens(model, hooks, processing=processing, device=device, dtype=dtype))

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        tokens = self.store.tokens(numbers)
        return ContextBatch(list(numbers), tokens, self.forward(tokens))


_META = {"hook": str, "d_in": int, "n_contexts": int, "context_length": int, "tokens_sha256": str}


class _Shard(NamedTuple):
    path: Path
    first: int  # number of its first context
    length: int


@dataclass
class CacheSource:
    """Our own caches (`store.activation_caches`), one folder per hook point, all with the same contexts."""

    caches: dict[str, ActivationCache]

    @classmethod
    def open(cls, folders: Sequence[str | Path]) -> CacheSource:
        """Open caches. Raises ValueError if a folder is not a cache or they hold different contexts."""
        caches: dict[str, ActivationCache] = {}
        for folder in map(Path, folders):
            with told("cache", "must be a folder of activations", folder):
                cache = ActivationCache(folder, json.loads((folder / "meta.json").read_text()))
                for name, kind in _META.items():
                    if type(cache.meta[name]) is not kind:
                        raise TypeError(f"{name} must be {kind.__name__}, got {cache.meta[name]!r}")  # told in one line
                caches[cache.meta["hook"]] = cache
        if len({cache.meta["tokens_sha256"] for cache in caches.values()}) > 1:
            raise InputError(f"cache: must be of the same tokens, got different ones in {', '.join(map(str, folders))}")
        return cls(caches)

    def __post_init__(self) -> None:
        self._any = next(iter(self.caches.values()))
        self._shards = {hook: _shards(cache) for hook, cache in self.caches.items()}

    @property
    def widths(self) -> dict[str, int]:
        return {hook: cache.d_in for hook, cache in self.caches.items()}

    @property
    def n_contexts(self) -> int:
        return self._any.n_contexts

    @property
    def context_length(self) -> int:
        return self._any.context_length

    @property
    def identity(self) -> str:
        return self._any.meta["tokens_sha256"]

    @property
    def documents(self) -> Tensor:
        return self._any.column("documents")

    @property
    def largest_token(self) -> int:
        return int(self._any.column("tokens").max())

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        first = next(iter(self.caches))
        tokens = self._rows(first, "tokens", numbers)
        found = {hook: self._rows(hook, "activations", numbers) for hook in self.caches}
        check_finite(found)
        return ContextBatch(list(numbers), tokens, found)

    def _rows(self, hook: str, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of one tensor: reads runs of consecutive numbers within a shard at once, and nothing else."""
        from safetensors import SafetensorError, safe_open

        parts = []
        for shard, rows in _runs(self._shards[hook], numbers):
            try:
                with safe_open(shard.path, framework="pt") as file:
                    parts += [file.get_slice(name)[start:stop] for start, stop in rows]
            except (OSError, SafetensorError) as error:
                raise StateError(
                    f"activation cache: {shard.path} is damaged ({error}); delete {shard.path.parent}"
                ) from None
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def _shards(cache: ActivationCache) -> list[_Shard]:
    """The shards of a cache. Raises StateError unless the files hold what it states: whole contexts of its length and width."""
    from safetensors import SafetensorError, safe_open

    shards, first, folder = [], 0, cache.folder
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("tokens", "activations")}
        except (OSError, SafetensorError) as error:
            raise StateError(f"activation cache: {path} is damaged ({error}); delete {folder}") from None
        length = shapes["tokens"][0] if shapes["tokens"] else 0
        wanted = (length, cache.context_length)
        if shapes != {"tokens": wanted, "activations": (*wanted, cache.d_in)}:
            raise StateError(f"activation cache: {path} is damaged (shapes {shapes}); delete {folder}")
        shards.append(_Shard(path, first, length))
        first += length
    if first != cache.n_contexts:
        raise StateError(
            f"activation cache: {folder} is damaged ({first} of {cache.n_contexts} contexts are there); delete it"
        )
    return shards


def _runs(shards: Sequence[_Shard], numbers: Sequence[int]) -> list[tuple[_Shard, list[tuple[int, int]]]]:
    """The shards that hold `numbers`, in that order, with runs (start, stop) of rows; neighbours share a shard."""
    runs: list[tuple[_Shard, list[tuple[int, int]]]] = []
    firsts = [shard.first for shard in shards]
    for number in numbers:
        shard = shards[bisect.bisect_right(firsts, number) - 1]
        row = number - shard.first
        if not runs or runs[-1][0] is not shard:
            runs.append((shard, []))
        rows = runs[-1][1]
        if rows and rows[-1][1] == row:
            rows[-1] = (rows[-1][0], row + 1)
        else:
            rows.append((row, row + 1))
    return runs


@dataclass
class DatasetSource:
    """A dataset of cached activations as saved by SAELens' CacheActivationsRunner: one column per hook point, and `token_ids`.

    It does not say which document a context is from, so every context counts as its own document.
    """

    folder: Path

    def __post_init__(self) -> None:
        from datasets import load_from_disk

        with told("cache", "must be a SAELens dataset of activations", self.folder):
            self._dataset: Any = load_from_disk(str(self.folder)).with_format("torch")
            self._hooks = [name for name in self._dataset.column_names if name != "token_ids"]
            shapes = {hook: self._dataset[0][hook].shape for hook in self._hooks}
        self.context_length: int = next(iter(shapes.values()))[0]
        self.widths: dict[str, int] = {hook: shape[-1] for hook, shape in shapes.items()}

    @property
    def n_contexts(self) -> int:
        return len(self._dataset)

    @property
    def identity(self) -> str:
        return self._dataset._fingerprint

    @property
    def documents(self) -> Tensor:
        return torch.arange(self.n_contexts)

    @property
    def largest_token(self) -> int:
        if "token_ids" not in self._dataset.column_names:
            return -1
        ids = self._dataset.select_columns("token_ids")
        return max(int(rows["token_ids"].max()) for rows in ids.iter(batch_size=1024))

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        rows = self._dataset[list(numbers)]
        found = {hook: rows[hook] for hook in self._hooks}
        check_finite(found)
        tokens = rows.get("token_ids", torch.full((len(numbers), self.context_length), -1))
        return ContextBatch(list(numbers), tokens.long(), found)


@dataclass(frozen=True)
class SelectedContexts:
    """Some contexts of a source, numbered from 0, with the model's loss at their tokens if known."""

    source: Source
    chosen: Tensor  # [m] int64, numbers in the source
    losses: Tensor | None = None  # [m, L], see `next_token_loss`

    @property
    def widths(self) -> dict[str, int]:
        return self.source.widths

    @property
    def n_contexts(self) -> int:
        return len(self.chosen)

    @property
    def context_length(self) -> int:
        return self.source.context_length

    @property
    def identity(self) -> str:
        return fingerprint(source=self.source.identity, chosen=self.chosen.tolist())

    @property
    def documents(self) -> Tensor:
        return self.source.documents[self.chosen]

    @property
    def largest_token(self) -> int:
        return self.source.largest_token

    def read(self, numbers: Sequence[int]) -> ContextBatch:
        batch = self.source.read(self.chosen[list(numbers)].tolist())
        loss = batch.loss if self.losses is None else self.losses[list(numbers)]
        return batch._replace(numbers=list(numbers), loss=loss)


@torch.inference_mode()
def stored_losses(
    model: str, tokens: Tensor, *, device: str = "cpu", progress: Callable[[int], None] | None = None
) -> Tensor:
    """`next_token_loss` [C, L] of a model in float32 at tokens [C, L], computed once and stored in the cache folder.

    Raises ValueError for a model that cannot be loaded. Cost: one whole forward pass.
    """
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    path = cache_dir("losses") / f"{fingerprint(model=model_key(model), tokens=digest)}.safetensors"
    if not path.exists():
        network = load_model(model, device=device, dtype=torch.float32)
        parts = []
        for part in tokens.split(CONTEXTS_PER_FORWARD):
            inputs = part.to(device)
            parts.append(next_token_loss(network(inputs, use_cache=False).logits, inputs).cpu())
            if progress is not None:
                progress(part.numel())
        with atomic_file(path) as part:
            save_file({"loss": torch.cat(parts)}, part)
    return load_file(path)["loss"]


def open_cache(folders: Sequence[str | Path]) -> Source:
    """The source for `cache`: our caches (one per hook point), or one SAELens dataset.

    Raises ValueError if a folder is neither.
    """
    if len(folders) == 1 and (Path(folders[0]) / "dataset_info.json").exists():
        return DatasetSource(Path(folders[0]))
    return CacheSource.open(folders)
