"""The drop-in for dictionary_learning's dictionaries: what each class computes, and faster encode, decode and forward.

The library is not imported: its classes are recognised by name. Gradients are left to the library, as are all calls that
return dense pre-activations. To support a new class, write a class here and add a line to KNOWN.

Shapes: d activation_dim, F dict_size latents; x [..., d]; acts [..., F] are dense, as in the library.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from darkmatter_ext.ops import unchecked
from darkmatter_ext.ops.unchecked import Tried, try_threshold_encode
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes import stepping_aside
from darkmatter_ext.saes.accelerated import Accelerated, class_named, require_own_methods
from darkmatter_ext.saes.architectures import (
    COARSE_PRODUCTS,
    pack_encoder,
    select_topk,
    why_not_k,
    why_not_topk,
    zero_like,
)
from darkmatter_ext.saes.drop_in_state import Decoder, Pass, Ready, State
from darkmatter_ext.saes.passes import dense_acts
from darkmatter_ext.saes.soundness import (
    has_hooks_everywhere,
    is_listened_to,
    transforms_active,
    why_not_alike,
    why_not_input,
    why_not_without_gradients,
)
from darkmatter_ext.saes.stepping_aside import DECODE_DENSITY, SMALL, TOO_DENSE, TOO_MANY, looks_dense

Options = dict[str, Any]  # arguments of a call besides the tensor


class Relu:
    """AutoEncoder, and what all classes share: two linear layers, relu, a bias subtracted before and added after."""

    bias = "bias"
    acts_name = "f"  # the argument of the library's decode
    encode_options: tuple[str, ...] = ()
    forward_options: tuple[str, ...] = ("output_features", "ghost_mask")
    decoder_is_columns = True
    dense_cost = stepping_aside.RELU_COST

    # What it reads

    def encoder(self, sae: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias, as the object stores them."""
        layer = sae._modules["encoder"]._parameters
        return layer["weight"], layer["bias"]

    def W_enc(self, weight: Tensor) -> Tensor:
        """The encoder's weight as [d, F]."""
        return weight.mT

    def decoder(self, sae: Any) -> Tensor:
        return sae._modules["decoder"]._parameters["weight"]

    def b_dec(self, sae: Any) -> Tensor:
        return sae._parameters[self.bias]

    def subtracts(self, sae: Any) -> bool:
        """Whether that bias is subtracted from x."""
        return True

    def vectors(self, sae: Any, options: Options) -> tuple[Tensor, ...]:
        """What every call reads besides the packed weights."""
        return ()

    def prepare(self, *weights: Tensor) -> Any:
        weight, bias = weights
        return pack_encoder(self.W_enc(weight), bias)

    def read(self, *vectors: Tensor) -> Any:
        """A threshold as the ops take it, or why it cannot be used."""
        (threshold,) = vectors
        # relu comes before the strict threshold, so a negative threshold keeps what relu keeps
        return (threshold.detach().clamp(min=0),) if bool(threshold.isfinite().all()) else "threshold is not finite"

    # Why a call is left to the library

    def why_not_encoder(self, sae: Any) -> str:
        """Why the encoder is not the product assumed here."""
        return why_not_linear(sae, "encoder", biased=True) or why_not_parameters(sae, self.bias)

    def why_not_decoder(self, sae: Any) -> str:
        return why_not_linear(sae, "decoder", biased=False) or why_not_parameters(sae, self.bias)

    def why_not_options(self, sae: Any, options: Options) -> str:
        """Why this call has no fast path."""
        dense = next((name for name, value in options.items() if value), None)
        return f"dense pre-activations are wanted ({dense})" if dense else ""

    def why_not_now(self, sae: Any, prepared: Any, options: Options) -> str:
        return "" if prepared.screens else COARSE_PRODUCTS

    # What it computes

    def encode(self, sae: Any, sae_in: Tensor, ready: Ready, options: Options) -> Tried:
        """The active latents, computed by the ops."""
        weight, bias = self.encoder(sae)
        W_enc = self.W_enc(weight)
        threshold = ready.vectors[0].to(weight.dtype) if ready.vectors else zero_like(weight)
        return try_threshold_encode(sae_in, W_enc, bias, threshold, prepared=ready.prepared)


class BatchTopK(Relu):
    """BatchTopKSAE: one threshold for all latents; choosing the k largest of a batch is for training."""

    bias = "b_dec"
    dense_cost = stepping_aside.THRESHOLD_COST
    acts_name = "x"
    encode_options = ("return_active", "use_threshold")
    forward_options = ("output_features",)

    def vectors(self, sae: Any, options: Options) -> tuple[Tensor, ...]:
        return (sae._buffers["threshold"],)

    def why_not_encoder(self, sae: Any) -> str:
        return super().why_not_encoder(sae) or why_not_scalar(sae, "threshold")

    def why_not_options(self, sae: Any, options: Options) -> str:
        if not options.get("use_threshold", True):
            return "the k largest of the whole batch are wanted (use_threshold=False)"
        return super().why_not_options(sae, {name: v for name, v in options.items() if name != "use_threshold"})


class TopK(Relu):
    """AutoEncoderTopK: the k largest or, on request, a threshold."""

    bias = "b_dec"
    acts_name = "x"
    encode_options = ("return_topk", "use_threshold")
    forward_options = ("output_features",)
    dense_cost = stepping_aside.TOPK_COST

    def vectors(self, sae: Any, options: Options) -> tuple[Tensor, ...]:
        return (sae._buffers["threshold"],) if options.get("use_threshold") else ()

    def why_not_encoder(self, sae: Any) -> str:
        reason = super().why_not_encoder(sae)
        return reason or why_not_scalar(sae, "k") or why_not_scalar(sae, "threshold")

    def why_not_options(self, sae: Any, options: Options) -> str:
        reason = super().why_not_options(sae, {name: v for name, v in options.items() if name != "use_threshold"})
        return reason or ("" if options.get("use_threshold") else why_not_k(_k(sae), sae.dict_size))

    def why_not_now(self, sae: Any, prepared: Any, options: Options) -> str:
        if options.get("use_threshold"):
            return super().why_not_now(sae, prepared, options)
        return why_not_topk(prepared, _k(sae))

    def encode(self, sae: Any, sae_in: Tensor, ready: Ready, options: Options) -> Tried:
        if options.get("use_threshold"):
            return super().encode(sae, sae_in, ready, options)
        weight, bias = self.encoder(sae)
        return select_topk(sae_in, self.W_enc(weight), bias, _k(sae), ready.prepared)


class JumpRelu(Relu):
    """JumpReluAutoEncoder: a threshold per latent, and weights stored as in SAELens."""

    bias = "b_dec"
    dense_cost = stepping_aside.THRESHOLD_COST
    encode_options = ("output_pre_jump",)
    forward_options = ("output_features",)
    decoder_is_columns = False

    def encoder(self, sae: Any) -> tuple[Tensor, Tensor]:
        return sae._parameters["W_enc"], sae._parameters["b_enc"]

    def W_enc(self, weight: Tensor) -> Tensor:
        return weight

    def decoder(self, sae: Any) -> Tensor:
        return sae._parameters["W_dec"]

    def subtracts(self, sae: Any) -> bool:
        return bool(sae.apply_b_dec_to_input)

    def vectors(self, sae: Any, options: Options) -> tuple[Tensor, ...]:
        return (sae._parameters["threshold"],)

    def why_not_encoder(self, sae: Any) -> str:
        reason = why_not_parameters(sae, "W_enc", "b_enc", "b_dec", "threshold")
        if reason or has_hooks_everywhere():
            return reason or "all modules are hooked, and with them the library's relu"
        if sae._parameters["threshold"].dtype is not sae._parameters["W_enc"].dtype:
            return "mixed dtypes"
        half = sae._parameters["W_enc"].dtype is torch.float16
        return "float16 may overflow to -inf, which the library's product with 0 makes NaN" if half else ""

    def why_not_decoder(self, sae: Any) -> str:
        return why_not_parameters(sae, "W_dec", "b_dec")


def _k(sae: Any) -> int:
    return int(sae._buffers["k"])


def why_not_parameters(sae: Any, *names: str) -> str:
    """Why a module's methods do not read its own parameters."""
    plain = all(sae._parameters.get(name) is not None for name in names)
    return "" if plain else "a weight is no parameter of the SAE"


def why_not_linear(sae: Any, name: str, *, biased: bool) -> str:
    """Why a layer is not a single product with its weight."""
    layer = sae._modules.get(name)
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return f"{name} is not a plain torch.nn.Linear"
    if is_listened_to(layer):
        return f"{name} is hooked"
    if layer._parameters.get("weight") is None or (layer._parameters.get("bias") is not None) is not biased:
        return f"{name} has another weight or bias than the library gives it"
    return ""


def why_not_scalar(sae: Any, name: str) -> str:
    """Why a buffer is not the single number assumed here."""
    buffer = sae._buffers.get(name)
    return "" if type(buffer) is Tensor and buffer.ndim == 0 else f"{name} is not a buffer of one number"


# What each class computes, by module and name
KNOWN: dict[tuple[str, str], Relu] = {
    ("dictionary_learning.dictionary", "AutoEncoder"): Relu(),
    ("dictionary_learning.dictionary", "JumpReluAutoEncoder"): JumpRelu(),
    ("dictionary_learning.trainers.top_k", "AutoEncoderTopK"): TopK(),
    ("dictionary_learning.trainers.batch_top_k", "BatchTopKSAE"): BatchTopK(),
}
_ANY = ("dictionary_learning.dictionary", "Dictionary")


def is_dictionary(plain: type) -> bool:
    """Whether a class is one of dictionary_learning's."""
    return class_named(plain, (_ANY,)) is not None


def dictionary_surface(plain: type) -> tuple[type[Accelerated], dict[str, Any]]:
    """Methods and members of an accelerated class. Raises ValueError, with the reason, if it cannot be accelerated."""
    found = class_named(plain, KNOWN)
    if found is None:
        known = ", ".join(name for _, name in KNOWN)
        why = f"of dictionary_learning {known} are known here"
        raise InputError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")
    architecture = KNOWN[found]
    parameters = {
        "encode": ("x", *architecture.encode_options),
        "decode": (architecture.acts_name,),
        "forward": ("x", *architecture.forward_options),
    }
    require_own_methods(plain, found[1], parameters)
    return AcceleratedDictionary, {"_architecture": architecture, "_library": "dictionary_learning"}


def _named(names: tuple[str, ...], given: tuple[Any, ...], named: Options) -> Options | None:
    """Arguments by name; None if the library has no such call and will raise itself."""
    if not given and not named:
        return {}
    options = dict(zip(names, given, strict=False)) | named
    return options if len(options) == len(given) + len(named) and options.keys() <= set(names) else None


_NO_SUCH_CALL = "not a call of the library's"


class AcceleratedDictionary(ABC, Accelerated):
    """Methods that override the library's own in an accelerated dictionary. Created by `accelerate`, never by hand.

    ABC comes first, as in the library's classes: Python changes an object's class only to one with the same layout.
    """

    _architecture: Relu

    def encode(self, x: Tensor, *given: Any, **named: Any) -> Any:
        """Latent activations [..., F] of x [..., d], like the library's encode, which answers calls that want other results."""
        if torch.compiler.is_compiling():
            return super().encode(x, *given, **named)
        state, architecture = self._fast, self._architecture
        small = stepping_aside.is_small_encode(x, self.dict_size, architecture.dense_cost)
        options = _named(architecture.encode_options, given, named)
        ready = SMALL if small else self._look_at_encoder(state, x, options)
        if isinstance(ready, str) or options is None:
            state.count("encode", ready if isinstance(ready, str) else _NO_SUCH_CALL)
            acts = super().encode(x, *given, **named)
            if state.back_off.left and type(acts) is Tensor and not transforms_active():
                state.back_off.after_dense(acts)
            return acts
        return dense_acts(self._encoded(state, x, ready, options, "encode"))

    def decode(self, *given: Any, **named: Any) -> Tensor:
        """Reconstruction [..., d] from acts [..., F], like the library's decode, but reads only the rows of active latents."""
        acts: Any = next(iter((*given, *named.values())), None)
        as_known = len(given) + len(named) == 1 and named.keys() <= {self._architecture.acts_name}
        if torch.compiler.is_compiling() or not as_known:
            return super().decode(*given, **named)
        state = self._fast
        small = stepping_aside.is_small_decode(acts, self.dict_size, self.activation_dim)
        decoder = SMALL if small else self._look_at_decoder(state, acts)
        if not isinstance(decoder, str):
            support = unchecked.find_support(acts.detach())
            if support.values.numel() <= DECODE_DENSITY * acts.numel():
                state.count("decode")
                return unchecked.sparse_decode(support, decoder.rows, self._architecture.b_dec(self))
            decoder = TOO_DENSE
        state.count("decode", decoder)
        return super().decode(acts)

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        """The library's forward, with latents kept sparse in between."""
        if torch.compiler.is_compiling():
            return super().forward(x, *given, **named)
        state = self._fast
        if stepping_aside.is_small_forward(x, self.dict_size, self._architecture.dense_cost):
            state.count("forward", SMALL)
            return super().forward(x, *given, **named)
        options = _named(self._architecture.forward_options, given, named)
        ready = self._why_not_forward(options) or self._look_at_encoder(state, x, {})
        decoder = ready if isinstance(ready, str) else self._look_at_decoder(state, None)
        if isinstance(ready, str) or isinstance(decoder, str) or options is None:
            state.count("forward", decoder if isinstance(decoder, str) else _NO_SUCH_CALL)
            with state.back_off.one_call():
                return super().forward(x, *given, **named)
        found = self._encoded(state, x, ready, {}, "forward")
        x_hat = self._decoded(found, decoder)
        return (x_hat, dense_acts(found)) if options.get("output_features") else x_hat

    def _why_not_forward(self, options: Options | None) -> str:
        if options is None:
            return _NO_SUCH_CALL
        if options.get("ghost_mask") is not None:
            return "a ghost mask wants dense pre-activations"
        return "encode or decode is overridden" if {"encode", "decode"} & self.__dict__.keys() else ""

    # Looks: what is ready for the ops, or why the library answers. As in `looks`, the cheapest checks come first.

    def _look_at_encoder(self, state: State, x: Any, options: Options | None) -> Ready | str:
        architecture = self._architecture
        if options is None:
            return _NO_SUCH_CALL
        if state.back_off.steps_aside():
            return TOO_MANY
        reason = why_not_input(x) or architecture.why_not_encoder(self) or architecture.why_not_options(self, options)
        if reason:
            return reason
        weights, vectors = architecture.encoder(self), architecture.vectors(self, options)
        before = architecture.b_dec(self) if architecture.subtracts(self) else None
        dtype = weights[0].dtype
        reason = (
            why_not_alike(weights if before is None else (*weights, before), dtype, x.device)
            or self._why_not_x(x, dtype, subtracts=before is not None)
            or why_not_without_gradients(x, *weights, before)
            or ("tensors on more than one device" if any(v.device != x.device for v in vectors) else "")
        )
        if reason:
            return reason
        tokens = x.numel() // max(1, x.shape[-1])
        layer = self._modules.get("decoder")
        other = self._parameters.get("W_dec") if layer is None else layer._parameters.get("weight")
        prepared = state.encoder.get(*weights, tokens=tokens, other=other)
        reason = prepared if isinstance(prepared, str) else architecture.why_not_now(self, prepared, options)
        if reason:
            return reason
        read = state.vectors.get(*vectors) if vectors else ()
        return read if isinstance(read, str) else Ready(prepared, read)

    def _why_not_x(self, x: Tensor, dtype: torch.dtype, *, subtracts: bool) -> str:
        d = self._architecture.W_enc(self._architecture.encoder(self)[0]).shape[0]
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != d:
            return "x is not floating point of shape [..., d]"
        fits = torch.promote_types(x.dtype, dtype) is dtype if subtracts else x.dtype is dtype
        return "" if fits else "mixed dtypes"

    def _look_at_decoder(self, state: State, acts: Any) -> Decoder | str:
        """For dense acts; acts is None if they come from an encode whose look found everything ready."""
        architecture = self._architecture
        if acts is not None and state.back_off.expects_dense():
            return TOO_DENSE
        reason = ("" if acts is None else why_not_input(acts)) or architecture.why_not_decoder(self)
        if reason:
            return reason
        W_dec, b_dec = architecture.decoder(self), architecture.b_dec(self)
        weight, dtype = architecture.encoder(self)[0], W_dec.dtype
        reason = why_not_alike((W_dec, b_dec), dtype, (W_dec if acts is None else acts).device)
        reason = reason or why_not_without_gradients(acts, W_dec, b_dec)
        if not reason:
            of_encode = "" if weight.dtype is dtype else "mixed dtypes"
            reason = of_encode if acts is None else self._why_not_acts(acts, W_dec)
        return reason or state.decoder.get(W_dec, other=weight)

    def _why_not_acts(self, acts: Tensor, W_dec: Tensor) -> str:
        if acts.dtype is not W_dec.dtype:
            return "mixed dtypes"
        if acts.ndim < 1 or acts.shape[-1] != W_dec.shape[1 if self._architecture.decoder_is_columns else 0]:
            return "shape of the latents"
        return TOO_DENSE if not acts.is_meta and looks_dense(acts.detach(), DECODE_DENSITY) else ""

    # Passes. The library's own code answers tokens that the ops hand back, within the same call.

    def _encoded(self, state: State, x: Tensor, ready: Ready, options: Options, method: str) -> Pass:
        architecture = self._architecture
        sae_in = x - architecture.b_dec(self) if architecture.subtracts(self) else x
        acts, undecided = architecture.encode(self, sae_in, ready, options)
        handed_over, tokens, dense = undecided.numel(), acts.n_tokens, None
        if handed_over:
            rows = x.reshape(tokens, x.shape[-1])
            dense = super().encode(rows if handed_over == tokens else rows[undecided], **options)
        state.count_tried(method, acts, x.shape[-1], dense)
        return Pass(acts, undecided, dense)

    def _decoded(self, found: Pass, decoder: Decoder) -> Tensor:
        acts, undecided, dense = found
        bias = self._architecture.b_dec(self)
        if dense is None:
            return unchecked.sparse_decode(acts, decoder.rows, bias)
        x_hat = super().decode(dense)
        if undecided.numel() < acts.n_tokens:
            others = unchecked.sparse_decode(acts, decoder.rows, bias)
            x_hat = others.reshape(acts.n_tokens, others.shape[-1]).index_copy(0, undecided, x_hat)
        return x_hat.reshape(*acts.batch_shape, x_hat.shape[-1])
