"""Activations of a language model at one site: contexts of tokens, the model run only as deep as needed, a cache.

Sites are named as TransformerLens and SAELens name them (`blocks.10.hook_resid_post`). The cache is a folder of
safetensors shards (`activations` [c, L, d], `norms` [c, L], `tokens` [c, L], `documents` [c]) and `meta.json`, readable
by anything.

Shapes: C contexts, L tokens a context (the first is BOS where the tokenizer has one), d model dimension.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from darkmatter_ext.embedded import EMBEDDED_MODEL, embedded_model_folder
from darkmatter_ext.storage import atomic_file, atomic_folder, cache_dir, fingerprint
from darkmatter_ext.text import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], None]  # called with the number of tokens done since the last call

CONTEXTS_PER_SHARD = 64
CONTEXTS_PER_FORWARD = 8  # 2048 tokens of 256: enough to fill two cores, small enough for the cache
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_post")


@dataclass(frozen=True)
class Contexts:
    """Tokenised text: every context comes from one document and has exactly L tokens."""

    tokens: Tensor  # [C, L] int64
    documents: Tensor  # [C] int64, number of the document
    text_sha256: str  # of the text used, in order


def parse_hook(hook: str) -> int:
    """The layer number of `blocks.N.hook_resid_post`, the kind of site this version can read.

    Raises ValueError for any other name.
    """
    match = _HOOK.fullmatch(hook)
    if match is None:
        raise ValueError(f"--hook: must be like blocks.10.hook_resid_post, got {hook!r}")
    return int(match.group(1))


def model_location(model: str) -> str:
    """A name transformers can load: the embedded model's folder, a local folder, or a hub id."""
    return str(embedded_model_folder()) if model == EMBEDDED_MODEL else model


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`. Raises ValueError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_location(model))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: must be a causal language model, got {model!r} ({_one_line(error)})") from None


def load_model(model: str, *, device: str, dtype: torch.dtype, n_layers: int | None = None) -> PreTrainedModel:
    """A causal language model, in eval mode, cut to its first `n_layers` blocks.

    Raises ValueError when it cannot be loaded, or has fewer blocks.
    """
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(model_location(model), dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: must be a causal language model, got {model!r} ({_one_line(error)})") from None
    blocks = transformer_blocks(network)
    if n_layers is not None:
        if n_layers > len(blocks):
            raise ValueError(f"--hook: {model} has blocks 0 to {len(blocks) - 1}, got block {n_layers - 1}")
        del blocks[n_layers:]
        network.config.num_hidden_layers = n_layers
    network.to(torch.device(device))  # type: ignore[arg-type]  (transformers wraps nn.Module.to)
    return network.eval()


def transformer_blocks(network: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks, found by its length (names differ: `model.layers`, `transformer.h`, ...).

    Raises ValueError when no module list has `config.num_hidden_layers` entries.
    """
    n_layers = network.config.num_hidden_layers  # type: ignore[union-attr]
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ValueError(f"--model: must have a list of {n_layers} blocks, got {type(network).__name__} without one")


def tokenize_contexts(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    n_tokens: int,
    context_length: int,
) -> Contexts:
    """Cut documents into contexts of `context_length` tokens (BOS included) until `n_tokens` are reached.

    A context never crosses documents; what is left at the end of a document is dropped, never padded.

    Raises ValueError when the documents hold fewer tokens than asked for.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context_length - len(bos)
    if body < 1:
        raise ValueError(f"--context-length: must be at least 2, got {context_length}")
    wanted = max(1, n_tokens // context_length)
    rows: list[list[int]] = []
    numbers: list[int] = []
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(document.text.encode())
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
        rows += pieces
        numbers += [number] * len(pieces)
        if len(rows) >= wanted:
            break
    if len(rows) < wanted:
        raise ValueError(
            f"--tokens: the text gives {len(rows)} whole contexts of {context_length} tokens, "
            f"{len(rows) * context_length} tokens in all, got a request for {n_tokens}"
        )
    return Contexts(torch.tensor(rows[:wanted]), torch.tensor(numbers[:wanted]), digest.hexdigest())


class _Captured(Exception):
    """Raised by the hook to leave the forward pass: nothing after the site is needed."""


def _site_activations(network: PreTrainedModel, layer: int, tokens: Tensor) -> Tensor:
    """Residual stream after block `layer`: [c, L, d] for tokens [c, L]."""
    captured: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _Captured

    handle = transformer_blocks(network)[layer].register_forward_hook(hook)
    try:
        network(tokens, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured[0]


@dataclass(frozen=True)
class ActivationShard:
    """Activations of some consecutive contexts."""

    first_context: int
    activations: Tensor  # [c, L, d]
    norms: Tensor  # [c, L] float32
    tokens: Tensor  # [c, L] int64


@dataclass(frozen=True)
class ActivationCache:
    """A folder of stored activations, read shard by shard."""

    folder: Path
    meta: dict[str, Any]

    @property
    def d_in(self) -> int:
        return self.meta["d_in"]

    @property
    def n_contexts(self) -> int:
        return self.meta["n_contexts"]

    @property
    def context_length(self) -> int:
        return self.meta["context_length"]

    def _load(self, shard: Path, names: Sequence[str]) -> list[Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, framework="pt") as file:
                return [file.get_tensor(name) for name in names]
        except (OSError, SafetensorError) as error:
            raise RuntimeError(f"activation cache: {shard} is damaged ({error}); delete {self.folder}") from None

    def shards(self) -> Iterator[ActivationShard]:
        """The shards in order; memory: one shard."""
        first = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            activations, norms, tokens = self._load(path, ("activations", "norms", "tokens"))
            yield ActivationShard(first, activations, norms, tokens)
            first += len(tokens)

    def column(self, name: str) -> Tensor:
        """A small quantity of all contexts: `norms` [C, L], `tokens` [C, L] or `documents` [C]."""
        return torch.cat([self._load(path, (name,))[0] for path in sorted(self.folder.glob("*.safetensors"))])


def _write_shard(folder: Path, number: int, activations: Tensor, tokens: Tensor, documents: Tensor) -> None:
    from safetensors.torch import save_file

    with atomic_file(folder / f"shard_{number:05d}.safetensors") as part:
        content = {
            "activations": activations,
            "norms": activations.float().norm(dim=-1),
            "tokens": tokens,
            "documents": documents,
        }
        save_file(content, part)


def activation_cache(
    model: str,
    hook: str,
    contexts: Contexts,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ActivationCache:
    """The activations of `contexts` at `hook`, computed once and kept in the cache folder.

    Args:
        model: the embedded model's name, a local folder, or a Hugging Face id.
        hook: `blocks.N.hook_resid_post`.
        contexts: see `tokenize_contexts`.
        device, dtype: of the forward pass; activations are stored in `dtype`.
        progress: called with the number of tokens done, as they are done.

    Raises:
        ValueError: model or hook that does not exist.
        RuntimeError: activations that are not finite, a damaged cache.

    Cost: one forward pass through blocks 0..N; C L d elements on disk. The folder's name is a fingerprint of
    everything the content depends on, and it appears only when complete.
    """
    layer = parse_hook(hook)
    token_sha256 = hashlib.sha256(contexts.tokens.numpy().tobytes()).hexdigest()
    key = fingerprint(model=model, hook=hook, tokens=token_sha256, dtype=str(dtype))
    folder = cache_dir("activations") / key
    if not (folder / "meta.json").exists():
        network = load_model(model, device=device, dtype=dtype, n_layers=layer + 1)
        n_contexts, context_length = contexts.tokens.shape
        meta = {
            "model": model,
            "hook": hook,
            "dtype": str(dtype).removeprefix("torch."),
            "n_contexts": n_contexts,
            "context_length": context_length,
            "d_in": network.config.hidden_size,
            "text_sha256": contexts.text_sha256,
            "tokens_sha256": token_sha256,
        }
        with atomic_folder(folder) as part:
            _fill_cache(part, network, layer, contexts, device, progress)
            (part / "meta.json").write_text(json.dumps(meta, indent=2))
    return ActivationCache(folder, json.loads((folder / "meta.json").read_text()))


@torch.inference_mode()
def _fill_cache(
    folder: Path, network: PreTrainedModel, layer: int, contexts: Contexts, device: str, progress: Progress | None
) -> None:
    for number, start in enumerate(range(0, len(contexts.tokens), CONTEXTS_PER_SHARD)):
        part = slice(start, start + CONTEXTS_PER_SHARD)
        tokens, parts = contexts.tokens[part], []
        for batch in tokens.split(CONTEXTS_PER_FORWARD):
            activations = _site_activations(network, layer, batch.to(device))
            if not bool(activations.isfinite().all()):
                raise RuntimeError(
                    f"activations: must be finite, got NaN or infinity from block {layer} in {network.dtype}"
                )
            parts.append(activations.cpu())
            if progress is not None:
                progress(batch.numel())
        _write_shard(folder, number, torch.cat(parts), tokens, contexts.documents[part])
