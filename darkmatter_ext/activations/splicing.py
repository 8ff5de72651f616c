"""Run a language model on from given activations at one site: how a change there affects its predictions, per token.

Nothing before the site depends on what is spliced in, so the blocks up to the site are skipped and the rest run from
the stored activations. Logits [tokens, vocabulary] are computed a few hundred tokens at a time and never kept.

Shapes: c contexts in a batch, L tokens per context, d model dimension, V vocabulary, n measured tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkmatter_ext.activations.hook_points import block_that_ends_at
from darkmatter_ext.activations.store import load_model, transformer_blocks
from darkmatter_ext.runtime.inputs import InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

Splice = Callable[[Tensor], Tensor]  # activations [n, d] -> what replaces them [n, d]
Change = Callable[[], AbstractContextManager[None]]  # a context in which the model is changed, e.g. by an adapter
Splices = Mapping[str, Splice]

LOGITS_BYTES = 64 << 20  # of one [tokens, V] float32 array; four of them are alive at a time
# How far stored activations may be from the model's own, relative to their norm: other kernels and thread counts stay
# below 1e-5 in float32, another token or another model gives about 1.
MATCH_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PROBE_TOKENS = 8


class PlacesToSplice(NamedTuple):
    """Some whole contexts, and which of their tokens to replace."""

    numbers: Tensor  # [c] int64, of the contexts in the cache
    tokens: Tensor  # [c, L] int64
    x: Tensor  # [c, L, d]
    replaced: Tensor  # [c, L] bool


class SplicedModel:
    """A causal language model from one site on. Its weights are frozen; `hidden` and `logits` pass gradients.

    Raises ValueError if the model's logits are not a function of its body's last hidden state.
    """

    def __init__(self, network: PreTrainedModel, layer: int) -> None:
        self.network = network.eval().requires_grad_(False)
        self.layer = layer
        self._blocks = transformer_blocks(network)
        self._gives_tuple = False  # whether a block returns (hidden, ...), learned from the first pass
        self.passes_over_blocks = True
        self._check_on_a_few_tokens()

    @classmethod
    def load(cls, model: str, hook: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SplicedModel:
        """The whole model `model` (see `store.load_model`) with the site `hook`, which must be the output of a block."""
        layer = block_that_ends_at(hook)
        if layer is None:
            raise InputError(f"hook: must be the output of a block to splice into the model, got {hook}")
        return cls(load_model(model, device=device, dtype=dtype), layer)

    @torch.inference_mode()
    def activation(self, tokens: Tensor) -> Tensor:
        """The model's own activations [c, L, d] at the site, for tokens [c, L]."""
        captured: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._gives_tuple = isinstance(output, tuple)
            captured.append(output[0] if isinstance(output, tuple) else output)

        handle = self._blocks[self.layer].register_forward_hook(hook)
        try:
            self._body(tokens)
        finally:
            handle.remove()
        return captured[0]

    def hidden(self, tokens: Tensor, activation: Tensor) -> Tensor:
        """The body's last hidden state [c, L, d], with `activation` [c, L, d] in place of the site's own."""
        with self._supplying(activation.to(self.network.dtype)):
            return self._body(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., d]."""
        head = self.network.get_output_embeddings()
        if head is None:
            raise InputError(f"model: must have an unembedding, got {type(self.network).__name__}")
        logits = head(hidden)
        cap = getattr(self.network.config, "final_logit_softcapping", None)  # Gemma 2 and 3
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _body(self, tokens: Tensor) -> Tensor:
        return self.network.base_model(tokens, use_cache=False).last_hidden_state

    @contextmanager
    def _supplying(self, activation: Tensor) -> Iterator[None]:
        """Make block `layer` return `activation`, and the blocks before it return their input."""
        wrap = (lambda hidden: (hidden,)) if self._gives_tuple else (lambda hidden: hidden)
        first = 0 if self.passes_over_blocks else self.layer
        changed = list(self._blocks[first : self.layer + 1])
        for block in changed[:-1]:
            block.forward = lambda hidden, *_, **__: wrap(hidden)
        changed[-1].forward = lambda *_, **__: wrap(activation)
        try:
            yield
        finally:
            for block in changed:
                del block.forward  # uncovers the class's own

    @torch.inference_mode()
    def _check_on_a_few_tokens(self) -> None:
        """Compare with the plain model once; if skipping blocks changes the answer, run them all."""
        tokens = torch.arange(_PROBE_TOKENS, device=self.network.device)[None]
        plain, own = self.network(tokens, use_cache=False).logits, self.activation(tokens)
        for self.passes_over_blocks in (True, False):
            if torch.allclose(self.logits(self.hidden(tokens, own)), plain, rtol=1e-3, atol=1e-3):
                return
        raise InputError(
            "model: must have logits that depend on its last hidden state alone, "
            f"got {type(self.network).__name__}, which has not"
        )

    def check_activations(self, tokens: Tensor, activation: Tensor) -> None:
        """Raise ValueError unless `activation` [c, L, d] is what this model has at the site for tokens [c, L].

        Cost: one forward pass. Catches another model, another site and shifted contexts, which the token ids cannot show.
        """
        own = self.activation(tokens.to(self.network.device)).float()
        given = activation.to(own.device, torch.float32)
        distance = (own - given).norm(dim=-1) / own.norm(dim=-1)
        if not bool((distance <= MATCH_TOLERANCE[self.network.dtype]).all()):
            context, position = divmod(int(distance.nan_to_num(torch.inf).argmax()), tokens.shape[1])
            raise InputError(
                "activations: must be those of the model at the site for the same tokens, got one at relative "
                f"distance {distance[context, position].item():.2g} (context {context}, position {position})"
            )


@dataclass(frozen=True)
class TokenLosses:
    """What the model predicts at n measured tokens, unchanged and with each splice."""

    cross_entropy: Tensor  # [n] nats, of the next token, by the unchanged model
    spliced: dict[str, Tensor]  # name -> [n] cross-entropy with the splice
    kl: dict[str, Tensor]  # name -> [n] KL(unchanged model || with the splice), nats


def splice_losses(
    model: SplicedModel,
    tokens: Tensor,
    activation: Tensor,
    replaced: Tensor,
    splices: Mapping[str, Splice],
    changes: Mapping[str, Change] | None = None,
) -> TokenLosses:
    """Cross-entropy and KL at the replaced tokens of some contexts, for every splice.

    Args:
        tokens: [c, L] int64.
        activation: the model's own, [c, L, d], as stored.
        replaced: [c, L] bool: where activations are replaced, all at once.
        splices: name -> function from the activations at the replaced places [m, d] to others [m, d].
        changes: name of a splice -> how the blocks after the site are changed while it runs; losses are still compared
            with those of the unchanged model.

    Returns:
        TokenLosses at the n replaced places that have a next token (all but the last position), in row order.

    Raises ValueError for a splice that changes the shape or gives NaN or infinity.

    Cost: one pass through the blocks after the site and n V d multiply-adds, for the unchanged model and for each splice.
    Memory: (1 + splices) n d numbers and four times LOGITS_BYTES.
    """
    tokens, replaced = tokens.to(model.network.device), replaced.to(model.network.device)
    activation = activation.to(model.network.device)
    measured = replaced.clone()
    measured[:, -1] = False
    targets = tokens.roll(-1, dims=1)[measured]
    with torch.inference_mode():
        original = model.hidden(tokens, activation)[measured]
    hidden, changes = {}, changes or {}
    for name, splice in splices.items():
        given = activation[replaced]
        changed = splice(given)
        if changed.shape != given.shape or not bool(changed.isfinite().all()):
            raise InputError(
                f"splices: {name!r} must give finite activations {list(given.shape)}, got {list(changed.shape)}"
                + ("" if changed.shape != given.shape else " with NaN or infinity")
            )
        spliced = activation.clone()
        spliced[replaced] = changed.to(spliced.dtype)
        with torch.inference_mode(), changes.get(name, nullcontext)():
            hidden[name] = model.hidden(tokens, spliced)[measured]
    return _compare_logits(model, original, hidden, targets)


@torch.inference_mode()
def _compare_logits(
    model: SplicedModel, original: Tensor, hidden: Mapping[str, Tensor], targets: Tensor
) -> TokenLosses:
    """Losses from last hidden states [n, d], a chunk of tokens at a time."""
    chunk = max(1, LOGITS_BYTES // (4 * model.network.config.vocab_size))
    parts = []
    for at in range(0, len(targets), chunk):
        part = slice(at, at + chunk)
        target = targets[part]
        reference = model.logits(original[part]).float()
        log_p = functional.log_softmax(reference, dim=-1)
        p = log_p.exp()
        spliced, kl = {}, {}
        for name, states in hidden.items():
            log_q = functional.log_softmax(model.logits(states[part]).float(), dim=-1)
            spliced[name] = -log_q.gather(1, target[:, None])[:, 0]
            # KL = p . (log p - log q), at least 0; float32 leaves about -1e-7 if the two are equal.
            kl[name] = torch.linalg.vecdot(p, log_q.neg_().add_(log_p)).clamp(min=0)
        parts.append(TokenLosses(-log_p.gather(1, target[:, None])[:, 0], spliced, kl))
    return concatenated(parts) if parts else _no_tokens(hidden)


def _no_tokens(names: Mapping[str, Tensor]) -> TokenLosses:
    return TokenLosses(
        torch.empty(0), {name: torch.empty(0) for name in names}, {name: torch.empty(0) for name in names}
    )


def concatenated(parts: list[TokenLosses]) -> TokenLosses:
    """The losses of several batches one after the other, on the CPU. Raises ValueError for none."""
    if not parts:
        raise InputError("parts: must hold at least one batch, got none")

    def joined(field: str) -> dict[str, Tensor]:
        return {
            name: torch.cat([getattr(part, field)[name] for part in parts]).cpu() for name in getattr(parts[0], field)
        }

    cross_entropy = torch.cat([part.cross_entropy for part in parts]).cpu()
    return TokenLosses(cross_entropy, **{f.name: joined(f.name) for f in dataclasses.fields(TokenLosses)[1:]})


@dataclass(frozen=True)
class SplicedTokens:
    """Every measured token of some contexts: its position, its id, and its losses."""

    context: Tensor  # [n] int64, number within the activation cache
    position: Tensor  # [n]
    token: Tensor  # [n] token id
    next_token: Tensor  # [n] token id for which the cross-entropy is computed
    losses: TokenLosses

    def columns(self) -> dict[str, np.ndarray]:
        """The per-token columns of a result: losses in float32, named `ce`, `NAME.ce`, `NAME.kl`."""
        tensors = {name: getattr(self, name).int() for name in ("context", "position", "token", "next_token")}
        tensors["ce"] = self.losses.cross_entropy
        for name in self.losses.spliced:
            tensors |= {f"{name}.ce": self.losses.spliced[name], f"{name}.kl": self.losses.kl[name]}
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def splice_contexts(
    model: SplicedModel,
    contexts: Iterable[PlacesToSplice],
    splices: Splices | Callable[[PlacesToSplice], Splices],
    *,
    changes: Mapping[str, Change] | None = None,
    progress: Callable[[int], None] | None = None,
) -> SplicedTokens:
    """Run every splice over some contexts, replacing all their places at once.

    `splices` can be a function that builds them for each batch of contexts, for splices that need more than x. `changes`: as
    for `splice_losses`; `progress` is called with the number of contexts done. Raises ValueError if the stored activations
    are not the model's own for the stored tokens (checked on the first context). Cost and memory: see `splice_losses`.
    """
    losses, places = [], []
    for batch in contexts:
        model.check_activations(batch.tokens[:1], batch.x[:1])
        own = splices(batch) if callable(splices) else splices
        losses.append(splice_losses(model, batch.tokens, batch.x, batch.replaced, own, changes))
        measured = batch.replaced.clone()
        measured[:, -1] = False
        row, position = measured.nonzero(as_tuple=True)
        following = batch.tokens.roll(-1, dims=1)[measured]
        places.append((batch.numbers[row], position, batch.tokens[measured], following))
        if progress is not None:
            progress(len(batch.tokens))
    context, position, token, next_token = (torch.cat(column) for column in zip(*places, strict=True))
    return SplicedTokens(context, position, token, next_token, concatenated(losses))
