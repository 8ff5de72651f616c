"""The drop-in: `accelerate(sae)` makes a SAELens object answer through this package's ops, and changes nothing else.

The object keeps its identity, parameters, hooks and configuration; only its class becomes a subclass of its own with a fast
encode, decode and forward. Every call first asks whether the fast path is sound for it; if not, SAELens' own code answers,
and `stats` tells why. Latents L = [..., d_sae] are dense where SAELens' methods return them; `encode_sparse`,
`decode_sparse` and `forward_fused` keep them sparse.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from darkmatter_ext.ops import unchecked
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_outer, find_support, sparse_decode, to_dense
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.architectures import Architecture, architecture_of, known_forwards, weight
from darkmatter_ext.saes.drop_in_state import Decoder, Pass, Ready, State, Stats, same_pass
from darkmatter_ext.saes.row_layout import lay_as_rows, lay_contiguous
from darkmatter_ext.saes.soundness import is_hooked, transforms_active, why_not_decoder, why_not_input, why_not_together
from darkmatter_ext.saes.stepping_aside import does_not_pay, looks_dense

if TYPE_CHECKING:
    from sae_lens import SAE

DECODE_DENSITY = 0.10  # active share of the latents above which SAELens' dense decode is the faster one
# Multiply-adds of a dense product that takes no longer than what goes around the ops: looks at weights, calls. Measured
# on two Zen 3 cores: benchmarks/README.md.
SMALL_DECODE, SMALL_ENCODE, SMALL_FORWARD = 1 << 21, 1 << 22, 1 << 20
FEW_LATENTS = (
    2048  # below, a dense encode is as fast whatever the tokens, and a dense decode up to four times SMALL_DECODE
)
SMALL = "small: SAELens' dense product is as fast"
TOO_MANY = "too many latents are active, or close to it, in most tokens (tried again after some calls)"
TOO_DENSE = f"more than {DECODE_DENSITY:.0%} of the latents are active"
_STATE = "_darkmatter_state"
_SAVES_MEMORY = "_darkmatter_saves_memory"


class _DenseGradDecode(torch.autograd.Function):
    """x_hat = acts W_dec + b_dec from the support of acts, with the dense gradient of acts that SAELens gives."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor, b_dec: Tensor, rows: Tensor, support: SparseActs) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(acts, W_dec)
        ctx.support = support
        return sparse_decode(support, rows, b_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        acts, W_dec = ctx.saved_tensors
        wants_acts, wants_weights, wants_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weights = None
        if wants_weights and (torch.is_grad_enabled() or transforms_active()):
            grad_weights = acts.reshape(-1, acts.shape[-1]).mT @ flat  # differentiable again, and may be batched
        elif wants_weights:
            grad_weights = decoder_outer(ctx.support, flat)
        return (
            grad @ W_dec.mT if wants_acts else None,
            grad_weights,
            flat.sum(0) if wants_bias else None,
            None,
            None,
        )


class AcceleratedSAE:
    """The methods an accelerated SAE puts before SAELens' own. Made by `accelerate`, never by hand."""

    _architecture: Architecture

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def _fast(self) -> State:
        state = self.__dict__.get(_STATE)
        if (
            state is None or state.owner() is not self
        ):  # built as type(sae)(cfg), or by copying the attributes of another
            state = self.__dict__[_STATE] = State(self, self._architecture)
        return state

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For copies and pickles: everything but the packed weights and counts, which an object has for itself."""
        rebuild, arguments, attributes, *rest = super().__reduce_ex__(protocol)
        assert isinstance(attributes, dict)
        attributes = {name: value for name, value in attributes.items() if name != _STATE}
        plain = _plain_class(type(self))
        if type(self) is _classes.get(plain):  # not importable by name
            rebuild, arguments = _new_accelerated, (plain,)
        return (rebuild, arguments, attributes, *rest)

    # SAELens' methods

    def encode(self, x: Tensor, latents: Tensor | Sequence[int] | None = None) -> Tensor:
        """Latent activations [..., d_sae] of x [..., d_in], as SAELens' encode.

        Args:
            x: activations, as SAELens takes them.
            latents: None, or [m] latent numbers: returns [..., m], equal to `encode(x)[..., latents]`, without the rest.

        Raises ValueError / TypeError for latents that are not whole numbers from 0 to d_sae - 1.
        """
        if latents is not None:
            return self._encode_some(x, latents)
        if torch.compiler.is_compiling():
            return super().encode(x)  # type: ignore[misc]
        state = self._fast
        ready = SMALL if self._is_small(x, SMALL_ENCODE, FEW_LATENTS) else self._look(state, x)
        if isinstance(ready, str):
            state.last_pass = None
            state.count("encode", ready)
            acts = super().encode(x)  # type: ignore[misc]
            if state.back_off.left and type(acts) is Tensor and not transforms_active():
                state.back_off.after_dense(acts)
            return acts
        acts = _dense_acts(self._pass(state, x, ready, "encode"))
        if self._architecture.hooks_acts_post and is_hooked(self._modules["hook_sae_acts_post"]):
            return self.hook_sae_acts_post(acts)
        return acts

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction of feature_acts [..., d_sae], as SAELens' decode, reading only the rows of active latents."""
        if torch.compiler.is_compiling():
            return super().decode(feature_acts)  # type: ignore[misc]
        state = self._fast
        decoder = (
            SMALL if self._is_small_decode(feature_acts) else self._look_at_decoder(state, feature_acts, dense=True)
        )
        support = None
        if not isinstance(decoder, str):
            support = unchecked.find_support(feature_acts.detach())
            if support.values.numel() > DECODE_DENSITY * feature_acts.numel():
                decoder = TOO_DENSE
        state.count("decode", decoder if isinstance(decoder, str) else "")
        if isinstance(decoder, str) or support is None:
            return super().decode(feature_acts)  # type: ignore[misc]
        bias = self._architecture.decoder_bias(self)
        scale = self._decoder_scale(decoder)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (feature_acts, self.W_dec, self.b_dec)):
            support = support if scale is None else support.scaled(scale.detach())
            acts = feature_acts if scale is None else feature_acts * scale
            x_hat = _DenseGradDecode.apply(acts, self.W_dec, bias, decoder.rows, support)
        else:
            x_hat = unchecked.sparse_decode(support if scale is None else support.scaled(scale), decoder.rows, bias)
        return self._after_decode(x_hat)

    def forward(self, x: Tensor) -> Tensor:
        """SAELens' forward; latents stay sparse in between unless a hook wants them dense."""
        if torch.compiler.is_compiling():
            return super().forward(x)  # type: ignore[misc]
        state = self._fast
        ready = SMALL if self._is_small(x, SMALL_FORWARD) else self._look(state, x, sparse=True)
        decoder = ready if isinstance(ready, str) else self._look_at_decoder(state, None)
        if isinstance(ready, str) or isinstance(decoder, str) or self._is_overridden():
            state.last_pass = None
            state.count("forward", decoder if isinstance(decoder, str) else "forward, encode or decode is overridden")
            return super().forward(x)  # type: ignore[misc]
        sae_out = self._reconstructed(self._pass(state, x, ready, "forward"), decoder)
        if _is_transcoder(self):
            skip = self._parameters.get("W_skip")
            return sae_out if skip is None else sae_out + x @ skip.T
        if self.use_error_term:
            with torch.no_grad():
                clean = sae_out.detach()
                if is_hooked(self.hook_sae_input) or is_hooked(self.hook_sae_recons):
                    clean = self._unhooked_forward(state, x, ready, decoder)
                sae_error = self.hook_sae_error(x - clean)
            sae_out = sae_out + sae_error
        return self.hook_sae_output(sae_out) if is_hooked(self._modules["hook_sae_output"]) else sae_out

    # For those who opt in

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """The active latents of x [..., d_in], as SparseActs of shape [..., d_sae]; differentiable.

        hook_sae_input runs. If hook_sae_acts_pre or _post is hooked, or the fast path is not sound, SAELens' encode gives
        the dense acts of which these are the nonzero entries.
        """
        state = self._fast
        ready = self._look(state, x, sparse=True)
        if isinstance(ready, str):
            state.count("encode_sparse", ready)
            return find_support(self.encode(x))
        found = self._pass(state, x, ready, "encode_sparse")
        return found.acts if found.dense is None else find_support(_dense_acts(found))

    def decode_sparse(self, acts: SparseActs) -> Tensor:
        """Reconstruction from SparseActs, as decode of their dense form; differentiable in acts.values.

        Raises TypeError / ValueError as `sparse_decode`.
        """
        if not isinstance(acts, SparseActs):
            raise TypeError(f"acts: must be SparseActs (encode_sparse gives them), got {type(acts).__name__}")
        state = self._fast
        decoder = self._look_at_decoder(state, acts.values)
        state.count("decode_sparse", decoder if isinstance(decoder, str) else "")
        if isinstance(decoder, str):
            return super().decode(to_dense(acts))  # type: ignore[misc]
        scale = self._decoder_scale(decoder)
        scaled = acts if scale is None else acts.scaled(scale)
        return self._after_decode(sparse_decode(scaled, self._rows(decoder), self._architecture.decoder_bias(self)))

    def forward_fused(self, x: Tensor) -> Tensor:
        """As forward; kept as a name for those who want to say that no dense latents shall exist.

        Memory beyond the output: the active latents and a few copies of x. Where a hook or an option wants dense latents,
        SAELens' forward answers, and `stats` says so.
        """
        return self.forward(x)

    # What decides

    def _is_small(self, x: Any, limit: int, latents: int = 0) -> bool:
        """Whether SAELens' dense encoder is done with x before the looks at the weights would be."""
        d_sae = self.cfg.d_sae
        small = isinstance(x, Tensor) and (x.numel() * d_sae < limit or d_sae < latents)
        return small and self._architecture.is_linear

    def _is_small_decode(self, acts: Any) -> bool:
        limit = SMALL_DECODE << 2 if self.cfg.d_sae < FEW_LATENTS else SMALL_DECODE
        return isinstance(acts, Tensor) and acts.numel() * self.cfg.d_in < limit

    def _look(self, state: State, x: Any, *, sparse: bool = False, any_density: bool = False) -> Ready | str:
        """What is ready for the encode of x, or why SAELens answers; `sparse`: no hook may want dense latents after it."""
        architecture = self._architecture
        weights = architecture.packed(self)
        vectors = tuple(weight(self, name) for name in architecture.vectors)
        reason = (
            why_not_input(x)
            or why_not_together(self, x, (*weights, *vectors))
            or architecture.why_not(self, x)
            or self._why_not_hooks(sparse)
            or (TOO_MANY if state.back_off.left and not any_density else "")
        )
        if reason:
            return reason
        if _SAVES_MEMORY in self.__dict__:
            self._lay_as_rows(state, weights[0])
        prepared = state.encoder.get(
            *weights, tokens=x.numel() // max(1, self.cfg.d_in), other=self._parameters.get("W_dec")
        )
        if isinstance(prepared, str):
            return prepared
        read = state.vectors.get(*vectors) if vectors else ()
        return read if isinstance(read, str) else Ready(prepared, read)

    def _lay_as_rows(self, state: State, W_enc: Tensor) -> None:
        """Let W_enc and its packed rows be one storage. Tried once for a storage: it may be somebody else's too."""
        if W_enc.is_contiguous() and self._parameters.get("W_enc") is W_enc and state.refused != W_enc.data_ptr():
            state.forget()
            state.refused = None if lay_as_rows(W_enc) else W_enc.data_ptr()

    def _why_not_hooks(self, sparse: bool) -> str:
        if is_hooked(self._modules["hook_sae_acts_pre"]):
            return "dense pre-activations are hooked (hook_sae_acts_pre)"
        hooked = sparse and is_hooked(self._modules["hook_sae_acts_post"])
        return "latents are hooked (hook_sae_acts_post)" if hooked else ""

    def _look_at_decoder(self, state: State, acts: Any, *, dense: bool = False) -> Decoder | str:
        """What is ready for a decode, or why SAELens answers; acts (values or dense) None where the encoder's look has been."""
        W_dec, b_dec = weight(self, "W_dec"), weight(self, "b_dec")
        reason = "" if acts is None else why_not_input(acts)
        reason = reason or why_not_decoder(self, acts, W_dec, b_dec, dense=dense)
        if (
            not reason
            and dense
            and acts is not None
            and not acts.is_meta
            and looks_dense(acts.detach(), DECODE_DENSITY)
        ):
            reason = TOO_DENSE
        if reason:
            return reason
        W_enc = self._parameters.get("W_enc")
        rows = state.decoder.get(W_dec, b_dec, other=W_enc)
        if isinstance(rows, str) or not self._architecture.rescales(self):
            return rows if isinstance(rows, str) else Decoder(rows, None)
        inverses = state.decoder_norms.get(W_dec, other=W_enc)
        return inverses if isinstance(inverses, str) else Decoder(rows, inverses)

    def _is_overridden(self) -> bool:
        attributes = self.__dict__
        forward = _plain_class(type(self)).forward  # type: ignore[attr-defined]
        return forward not in known_forwards() or "encode" in attributes or "decode" in attributes

    # The fast path

    def _pass(self, state: State, x: Tensor, ready: Ready, method: str) -> Pass:
        """The latents of x, for which `_look` has found all ready; reused where SAELens computes them a second time."""
        sae_in = self._input(x)
        settings = self._architecture.settings(self)
        clean = type(self._modules["hook_sae_acts_post"]) is nn.Identity  # SAELens' second pass, hooks disabled
        last, state.last_pass = state.last_pass, None
        wants_grad = torch.is_grad_enabled()
        if clean and not wants_grad and last is not None and same_pass(last, sae_in, ready, settings):
            state.count(method)
            return last[3]
        found = self._fresh_pass(state, sae_in, ready, method)
        if clean:
            state.has_second_passes = True
        elif state.has_second_passes and found.dense is None:  # dense acts are the caller's, who may edit them
            state.last_pass = sae_in.detach().clone(), ready, settings, found.detach()
        return found

    def _fresh_pass(self, state: State, sae_in: Tensor, ready: Ready, method: str = "") -> Pass:
        """As `_pass`, always computed; a part of another call is not counted (method "")."""
        acts, undecided = self._architecture.encode(self, sae_in, *ready)
        handed_over, tokens = undecided.numel(), acts.n_tokens
        state.back_off.after_trying(tokens, handed_over)
        dense = None
        if handed_over:
            rows = sae_in.reshape(tokens, sae_in.shape[-1])
            dense = self._architecture.dense(self, rows if handed_over == tokens else rows[undecided])
            state.back_off.was_dense(dense)
        if method:
            mostly = does_not_pay(tokens, handed_over)
            state.count(method, TOO_MANY if mostly else "", 0 if mostly else handed_over)
        return Pass(acts, undecided, dense)

    def _input(self, x: Tensor) -> Tensor:
        """process_sae_in, without its steps that do nothing."""
        cls = type(self)
        known = cls.process_sae_in is _sae_lens_input() and "process_sae_in" not in self.__dict__  # type: ignore[attr-defined]
        if not known or self.cfg.apply_b_dec_to_input is not True or is_hooked(self._modules["hook_sae_input"]):
            return self.process_sae_in(x)
        sae_in = self.reshape_fn_in(x if x.dtype is self.dtype else x.to(self.dtype))
        return self.run_time_activation_norm_fn_in(sae_in) - weight(self, "b_dec")

    def _rows(self, decoder: Decoder) -> Tensor:
        """W_dec itself where it wants a gradient, else its contiguous rows."""
        W_dec = weight(self, "W_dec")
        return W_dec if torch.is_grad_enabled() and W_dec.requires_grad else decoder.rows

    def _decoder_scale(self, decoder: Decoder) -> Tensor | None:
        """[F] what latents are multiplied with before decoding, differentiable, or None."""
        if decoder.inverse_norms is None:
            return None
        W_dec = weight(self, "W_dec")
        return 1 / W_dec.norm(dim=-1) if torch.is_grad_enabled() and W_dec.requires_grad else decoder.inverse_norms

    def _reconstructed(self, found: Pass, decoder: Decoder) -> Tensor:
        """x_hat of a pass, through the hooks after the decoder."""
        acts, undecided, dense = found
        bias, scale = self._architecture.decoder_bias(self), self._decoder_scale(decoder)
        if dense is None:
            scaled = acts if scale is None else acts.scaled(scale)
            return self._after_decode(unchecked.sparse_decode(scaled, self._rows(decoder), bias))
        W_dec = weight(self, "W_dec")
        x_hat = (dense if scale is None else dense * scale) @ W_dec
        x_hat = x_hat if bias is None else x_hat + bias
        if undecided.numel() < acts.n_tokens:
            scaled = acts if scale is None else acts.scaled(scale)
            others = unchecked.sparse_decode(scaled, self._rows(decoder), bias)
            x_hat = others.reshape(acts.n_tokens, others.shape[-1]).index_copy(0, undecided, x_hat)
        return self._after_decode(x_hat.reshape(*acts.batch_shape, W_dec.shape[1]))

    def _after_decode(self, x_hat: Tensor) -> Tensor:
        """What SAELens' decode does after W_dec and b_dec; transcoders only run the hook, their output is elsewhere."""
        if is_hooked(self._modules["hook_sae_recons"]):
            x_hat = self.hook_sae_recons(x_hat)
        if _is_transcoder(self):
            return x_hat
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def _unhooked_forward(self, state: State, x: Tensor, ready: Ready, decoder: Decoder) -> Tensor:
        from sae_lens.saes.sae import _disable_hooks

        with _disable_hooks(self):  # type: ignore[arg-type]
            return self._reconstructed(self._fresh_pass(state, self._input(x), ready), decoder)

    def _encode_some(self, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
        numbers = _latent_numbers(latents, self.cfg.d_sae).to(self.W_enc.device)
        state = self._fast
        ready = self._look(state, x, sparse=True, any_density=True)
        if isinstance(ready, str):
            state.count("encode(latents)", ready)
            return self.encode(x)[..., numbers]
        if self._architecture.selects_per_latent:
            state.count("encode(latents)")
            return to_dense(self._architecture.encode_some(self, self._input(x), numbers, ready.vectors))
        found = self._pass(state, x, ready, "encode(latents)")
        return found.acts.dense_columns(numbers) if found.dense is None else _dense_acts(found)[..., numbers]

    # What changes weights in ways no look can see

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fast.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the packed weights are made anew."""
        self._fast.forget()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; W_enc is stored contiguous again, for safetensors takes nothing else."""
        if _SAVES_MEMORY in self.__dict__ and "W_enc" in self._parameters:
            lay_contiguous(self.W_enc)
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """As SAELens'; the packed weights are made anew."""
        self._fast.forget()
        return super().fold_and_get_W_dec_norm()  # type: ignore[misc]

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """As SAELens'; the packed weights are made anew."""
        self._fast.forget()
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]

    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        """As SAELens'; the packed weights are made anew."""
        self._fast.forget()
        super().fold_activation_whitening(*args, **kwargs)  # type: ignore[misc]


def _dense_acts(found: Pass) -> Tensor:
    """Dense acts [..., F] of a pass."""
    acts, undecided, dense = found
    if dense is None:
        return unchecked.to_dense(acts)
    if undecided.numel() == acts.n_tokens:
        return dense.reshape(acts.shape)
    flat = to_dense(acts).reshape(acts.n_tokens, acts.d_sae)
    return flat.index_copy(0, undecided, dense).reshape(acts.shape)


def _latent_numbers(latents: Tensor | Sequence[int], d_sae: int) -> Tensor:
    numbers = latents.cpu() if isinstance(latents, Tensor) else torch.tensor(latents)
    if numbers.numel() == 0:
        numbers = numbers.long()
    if numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"latents: must be a list of whole numbers, got {numbers.dtype} of shape {list(numbers.shape)}")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < d_sae:
        raise InputError(f"latents: must be from 0 to {d_sae - 1}, got {int(numbers.min())} to {int(numbers.max())}")
    return numbers.long()


@functools.cache
def _sae_lens_input() -> Any:
    from sae_lens import SAE

    return SAE.process_sae_in


def _is_transcoder(sae: Any) -> bool:
    return sae._writes_elsewhere


# The public functions

_classes: dict[type, type] = {}  # SAELens class -> its accelerated subclass


def _plain_class(cls: type) -> type:
    """The SAELens class an accelerated class stands for."""
    return next(base for base in cls.__mro__ if not issubclass(base, AcceleratedSAE))


def _without_acceleration(cls: type) -> type:
    """The plain class; of a class made from an accelerated one since (torch's parametrize does), the same from a plain one."""
    plain = _plain_class(cls)
    if cls is _classes.get(plain):
        return plain
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_without_acceleration(base) if issubclass(base, AcceleratedSAE) else base for base in cls.__bases__)
    return types.new_class(cls.__name__, bases, exec_body=lambda n: n.update(members))


def _accelerated_class(plain: type) -> type:
    """The subclass of a SAELens class that `accelerate` gives its objects."""
    from sae_lens.saes.transcoder import Transcoder

    if plain not in _classes:
        # Loading through the class of an accelerated object gives plain objects, as loading through SAE does.
        plain_lookup = classmethod(lambda cls, architecture: plain.get_sae_class_for_architecture(architecture))
        members: dict[str, Any] = {
            "get_sae_class_for_architecture": plain_lookup,
            "__module__": plain.__module__,
            "_architecture": architecture_of(plain),
            "_writes_elsewhere": issubclass(plain, Transcoder),
        }
        _classes[plain] = types.new_class(
            plain.__name__, (AcceleratedSAE, plain), exec_body=lambda n: n.update(members)
        )
    return _classes[plain]


def _new_accelerated(plain: type) -> Any:
    cls = _accelerated_class(plain)
    return object.__new__(cls)


def accelerate(sae: SAE, *, save_memory: bool = False) -> SAE:
    """Make a SAELens SAE answer through this package's ops, in place.

    The same object, with the same parameters, hooks, configuration and results (pre-activations accumulated in float64
    instead of in the order of a dense product), several times faster on sparse latents. isinstance, state_dict, `.to`,
    deepcopy and save_model work as before. Calls the fast path is not sound for are answered by SAELens: see `stats`.

    Args:
        sae: topk, jumprelu, standard, gated, matching_pursuit, transcoder, skip_transcoder, jumprelu_transcoder or
            jumprelu_skip_transcoder.
        save_memory: store W_enc as the transposed view of contiguous rows, which the ops read in place: W_enc once less in
            memory. It is then not contiguous (`state_dict` and `deaccelerate` make it so again), and SAELens' own dense
            products of fewer than about 8 tokens take 1.2 to 1.6 times as long in float32. Not done while somebody else
            holds its storage or it has a gradient; let no fused optimiser have averages of it yet.

    Returns:
        sae itself, with `encode_sparse`, `decode_sparse`, `forward_fused` and `encode(x, latents=...)` besides.

    Raises:
        TypeError: not a SAELens SAE. ValueError: one that cannot be accelerated, with the reason.

    Weights are packed at the first call (cost: a few passes over W_enc; memory: W_enc once more, unless memory is saved,
    and its codes: F d bytes with AVX-512 VNNI, 2 F d with other AVX2 processors, none elsewhere). Which later edits of
    weights are noticed: `darkmatter_ext/packed_weights.py`; after any other call `refresh`.
    """
    from sae_lens import SAE

    if not isinstance(sae, SAE):
        raise TypeError(f"sae: must be a SAELens SAE, got {type(sae).__name__}")
    if not is_accelerated(sae):
        sae.__class__ = _accelerated_class(type(sae))
    if save_memory:
        vars(sae)[_SAVES_MEMORY] = True
    return sae


def deaccelerate(sae: SAE) -> SAE:
    """Give an accelerated SAE its SAELens class back, in place; any other is returned as it is."""
    if is_accelerated(sae):
        vars(sae).pop(_STATE, None)
        if vars(sae).pop(_SAVES_MEMORY, False) and "W_enc" in sae._parameters:
            lay_contiguous(sae.W_enc)
        sae.__class__ = _without_acceleration(type(sae))
    return sae


def is_accelerated(sae: object) -> bool:
    """Whether `accelerate` has been applied."""
    return isinstance(sae, AcceleratedSAE)


def _accelerated_state(sae: object) -> State:
    if not isinstance(sae, AcceleratedSAE):
        raise TypeError(f"sae: must be accelerated (darkmatter_ext.accelerate), got {type(sae).__name__}")
    return sae._fast


def refresh(sae: SAE) -> SAE:
    """Pack the weights anew at the next call: after edits through `.data` or numpy of single elements.

    Raises TypeError when sae is not accelerated.
    """
    _accelerated_state(sae).forget()
    return sae


def stats(sae: SAE) -> Stats:
    """How many calls of each method were fast, and why the others were not. Calls while compiling are not counted.

    Raises TypeError when sae is not accelerated.
    """
    return _accelerated_state(sae).stats()
