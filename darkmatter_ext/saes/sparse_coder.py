"""The drop-in for sparsify's SparseCoder: a faster encode.

The library's decode already gathers the active rows and is as fast as this package's, and its forward is its own code
around encode and decode. Both are left unchanged, and so are gradients. The third output of encode, the dense
pre-activations used by the training losses, is computed when first read, in the library's own arithmetic.

The library is not imported: its class is recognised by name. Shapes: x [..., d], F latents, k active.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.ops.unchecked import Tried
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes import stepping_aside
from darkmatter_ext.saes.accelerated import Accelerated, class_named, plain_class, require_own_methods
from darkmatter_ext.saes.architectures import pack_encoder, select_topk, why_not_k, why_not_topk
from darkmatter_ext.saes.drop_in_state import State
from darkmatter_ext.saes.read_when_used import ReadWhenUsed
from darkmatter_ext.saes.soundness import why_not_alike, why_not_input, why_not_without_gradients
from darkmatter_ext.saes.stepping_aside import SMALL, TOO_MANY

_NAME = ("sparsify.sparse_coder", "SparseCoder")
_OUTPUT = ("top_acts", "top_indices", "pre_acts")
PRE_ACTS = "pre_acts was read, and takes the dense product anyway (tried again after some calls)"
STALE = "pre_acts: must be read before the encoder's weights are edited: it is computed when it is first read"


class Encoder:
    """What to pack for a SparseCoder."""

    decoder_is_columns = False

    def prepare(self, *weights: Tensor) -> Any:
        weight, bias = weights
        return pack_encoder(weight.mT, bias)

    def read(self, *vectors: Tensor) -> Any:
        return vectors


def is_sparse_coder(plain: type) -> bool:
    """Whether a class is sparsify's SparseCoder."""
    return class_named(plain, (_NAME,)) is not None


def sparse_coder_surface(plain: type) -> tuple[type[Accelerated], dict[str, Any]]:
    """Methods and members of an accelerated class. Raises ValueError, with the reason, if it cannot be accelerated."""
    require_own_methods(plain, _NAME[1], {"encode": ("x",)})
    if getattr(_output_class(plain), "_fields", None) != _OUTPUT:
        why = f"its encode does not give {', '.join(_OUTPUT)}: an unknown version"
        raise InputError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")
    return AcceleratedSparseCoder, {"_architecture": Encoder(), "_library": "sparsify"}


def _output_class(plain: type) -> Any:
    """sparsify's EncoderOutput, as the module of its encode imports it."""
    return getattr(sys.modules[plain.encode.__module__], "EncoderOutput", None)


class AcceleratedSparseCoder(Accelerated):
    """Methods that override the library's own in an accelerated SparseCoder. Created by `accelerate`, never by hand."""

    def encode(self, x: Tensor) -> Any:
        """top_acts [..., k], top_indices [..., k] and pre_acts [..., F] of x [..., d], like the library's encode.

        Reading pre_acts after the encoder's weights were edited raises RuntimeError.
        """
        if torch.compiler.is_compiling():
            return super().encode(x)
        state = self._fast
        small = stepping_aside.is_small_encode(x, self.num_latents, stepping_aside.TOPK_COST)
        ready = SMALL if small else self._look(state, x)
        if isinstance(ready, str):
            state.count("encode", ready)
            found = super().encode(x)
            for waits in (state.back_off, state.reads):
                waits.after_dense(found.top_acts[..., :0])  # k latents are never too many
            return found
        weight, bias = self.encoder.weight, self.encoder.bias
        sae_in = x.clone() if self.cfg.transcode else x - self.b_dec
        tried = select_topk(sae_in, weight.mT, bias, self.cfg.k, ready)
        acts, indices = self._with_handed_over(state, x, tried)
        pre_acts = ReadWhenUsed(
            (*acts.shape[:-1], weight.shape[0]),
            weight,
            _later(sae_in, weight, bias, acts.clone(), indices.clone(), state),
        )
        return _output_class(plain_class(type(self)))(acts, indices, pre_acts)

    def _look(self, state: State, x: Any) -> Any:
        """The packed encoder, or why the library answers; the cheapest checks come first."""
        layer = self._modules["encoder"]
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or bias is None or self._parameters.get("b_dec") is None:
            return "a weight is no parameter of the SAE"
        before = None if self.cfg.transcode else self.b_dec
        reason = why_not_input(x) or self._why_not_cfg(weight.shape[0])
        reason = reason or why_not_alike(
            (weight, bias) if before is None else (weight, bias, before), weight.dtype, x.device
        )
        reason = reason or self._why_not_x(x, weight) or why_not_without_gradients(x, weight, bias, before)
        reason = reason or (TOO_MANY if state.back_off.steps_aside() else PRE_ACTS if state.reads.steps_aside() else "")
        if reason:
            return reason
        tokens = x.numel() // max(1, x.shape[-1])
        prepared = state.encoder.get(weight, bias, tokens=tokens, other=self._parameters.get("W_dec"))
        return prepared if isinstance(prepared, str) else why_not_topk(prepared, self.cfg.k) or prepared

    def _why_not_cfg(self, n_latents: int) -> str:
        if self.cfg.activation != "topk":
            return f"activation {self.cfg.activation}"
        return why_not_k(self.cfg.k, n_latents)

    def _why_not_x(self, x: Tensor, weight: Tensor) -> str:
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
            return "x is not floating point of shape [..., d]"
        dtype = weight.dtype
        fits = x.dtype is dtype if self.cfg.transcode else torch.promote_types(x.dtype, dtype) is dtype
        return "" if fits else "mixed dtypes"

    def _with_handed_over(self, state: State, x: Tensor, tried: Tried) -> tuple[Tensor, Tensor]:
        """Values and indices [..., k]; the library computes those of tokens that the ops hand back."""
        acts, undecided = tried
        values, indices, tokens = acts.values, acts.stored_indices, acts.n_tokens
        none = None
        if undecided.numel():
            rows = x.reshape(tokens, x.shape[-1])[undecided]
            found = super().encode(rows)
            shape, none = values.shape, found.top_acts[:, :0]
            values = values.reshape(tokens, -1).index_copy(0, undecided, found.top_acts).reshape(shape)
            indices = indices.reshape(tokens, -1).index_copy(0, undecided, found.top_indices).reshape(shape)
        state.count_tried("encode", acts, x.shape[-1], none)
        return values, indices


def _later(
    sae_in: Tensor, weight: Tensor, bias: Tensor, acts: Tensor, indices: Tensor, state: State
) -> Callable[[], Tensor]:
    """A function that computes the dense pre-activations [..., F] from which acts and indices [..., k] came."""
    weight, bias = weight.detach(), bias.detach()  # keep their current storage, whatever happens to the parameters
    keeps_values, reads = state.encoder.seen(), state.reads

    def compute() -> Tensor:
        if not keeps_values():
            raise RuntimeError(STALE)
        reads.after_trying(1, sae_in.new_empty(1, 0))
        with torch.no_grad(), torch.autocast(sae_in.device.type, enabled=False):
            return torch.nn.functional.linear(sae_in, weight, bias).relu().scatter(-1, indices, acts)

    return compute
