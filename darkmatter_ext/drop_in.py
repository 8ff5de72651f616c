"""The drop-in: `accelerate(sae)` makes a SAELens object answer through this package's ops, and changes nothing else.

The object keeps its identity, parameters, hooks and configuration; only its class becomes a subclass of its own with a fast
encode, decode and forward. Every call first asks whether the fast path is sound for it; if not, SAELens' own code answers,
and `stats` tells why. Latents L = [..., d_sae] are dense where SAELens' methods return them; `encode_sparse`,
`decode_sparse` and `forward_fused` keep them sparse.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from darkmatter_ext import ops
from darkmatter_ext.batched_pursuit import prepare_dictionary, pursuit
from darkmatter_ext.packed_weights import Packed
from darkmatter_ext.soundness import (
    DECODE_DENSITY,
    ENCODE_DENSITY,
    GATED,
    JUMPRELU,
    PURSUIT,
    TOPK,
    Kind,
    is_hooked,
    known_methods,
    transforms_active,
    why_not_activation,
    why_not_pursuit,
    why_not_tensors,
)
from darkmatter_ext.sparse import SparseActs

if TYPE_CHECKING:
    from sae_lens import SAE

PROBE_TOKENS = 4
_STATE = "_darkmatter_state"


@dataclass(frozen=True)
class Stats:
    """How the calls of an accelerated SAE were answered, by method."""

    fast: dict[str, int]
    fallback: dict[str, dict[str, int]]  # method -> reason -> calls

    def __str__(self) -> str:
        lines = [f"{method}: {count} fast" for method, count in self.fast.items()]
        for method, reasons in self.fallback.items():
            lines += [f"{method}: {count} by SAELens: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines) or "no calls"


@dataclass
class _State:
    """What an accelerated SAE carries besides its SAELens attributes. It belongs to one object: copies make their own."""

    owner: weakref.ref[Any]
    kind: Kind
    encoder: Packed[Any]  # PreparedEncoder or PreparedDictionary; None where the weights cannot be packed
    decoder: Packed[Tensor | None]
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)  # (method, reason or "")
    density: float | None = None  # active share of the latents, last seen
    has_second_passes: bool = False  # SAELens has asked for an error term: keep the last pass for it
    last_pass: tuple[Tensor, tuple, SparseActs] | None = None  # input, what else decided, result
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, sae: Any) -> _State:
        kind = _kind_of(_plain_class(type(sae)))
        prepare = prepare_dictionary if kind is PURSUIT else ops.prepare_encoder
        decoder = Packed(_decoder_rows, is_view=Tensor.is_contiguous)
        return cls(weakref.ref(sae), kind, Packed(lambda *weights: _or_none(prepare, *weights)), decoder)

    def __reduce__(self) -> tuple:
        return _no_state, ()  # a copy of an object's attributes leaves it out

    def count(self, method: str, reason: str = "") -> None:
        with self.lock:
            self.calls[method, reason] += 1

    def forget(self) -> None:
        self.encoder.forget()
        self.decoder.forget()
        self.last_pass = self.density = None


def _no_state() -> None:
    return None


def _or_none(prepare: Callable[..., Any], *weights: Tensor) -> Any:
    """Packed encoder weights; None where they hold NaN, or a dictionary Inf."""
    try:
        return prepare(*weights)
    except ValueError:
        return None


def _decoder_rows(W_dec: Tensor) -> Tensor | None:
    """Contiguous rows of W_dec (itself if it is); None where they are not finite, for 0 times Inf is NaN only if dense."""
    return W_dec.detach().contiguous() if bool(W_dec.isfinite().all()) else None


class _DenseGradDecode(torch.autograd.Function):
    """x_hat = acts W_dec + b_dec from the support of acts, with the dense gradient of acts that SAELens gives."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor, b_dec: Tensor, rows: Tensor, support: SparseActs) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(acts, W_dec)
        ctx.support = support
        return ops.sparse_decode(support, rows, b_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        acts, W_dec = ctx.saved_tensors
        wants_acts, wants_weights, wants_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weights = None
        if wants_weights and (torch.is_grad_enabled() or transforms_active()):
            grad_weights = acts.reshape(-1, acts.shape[-1]).mT @ flat  # differentiable again, and may be batched
        elif wants_weights:
            grad_weights = ops.decoder_outer(ctx.support, flat)
        return (
            grad @ W_dec.mT if wants_acts else None,
            grad_weights,
            flat.sum(0) if wants_bias else None,
            None,
            None,
        )


class _ValueWithGradientOf(torch.autograd.Function):
    """The first argument's value, the second's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


class AcceleratedSAE:
    """The methods an accelerated SAE puts before SAELens' own. Made by `accelerate`, never by hand."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def _fast(self) -> _State:
        state = self.__dict__.get(_STATE)
        if state is None or state.owner() is not self:  # built as type(sae)(cfg), or by copying the attributes of another
            state = self.__dict__[_STATE] = _State.of(self)
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
        reason = self._why_not_encode(x)
        self._fast.count("encode", reason)
        if reason:
            return self._dense_encode(x)
        acts = ops.to_dense(self._sparse_pass(x))
        return acts if self._fast.kind is PURSUIT else self.hook_sae_acts_post(acts)  # SAELens' pursuit runs no hook

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction of feature_acts [..., d_sae], as SAELens' decode, reading only the rows of active latents."""
        if torch.compiler.is_compiling():
            return super().decode(feature_acts)  # type: ignore[misc]
        reason = self._why_not_decode(feature_acts)
        support = None
        if not reason:
            support = ops.find_support(feature_acts.detach())
            if support.values.numel() > DECODE_DENSITY * feature_acts.numel():
                reason = f"more than {DECODE_DENSITY:.0%} of the latents are active"
        self._fast.count("decode", reason)
        if reason or support is None:
            return super().decode(feature_acts)  # type: ignore[misc]
        rows, bias = self._decoder_rows(), self._decoder_bias()
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (feature_acts, self.W_dec, self.b_dec))
        if wants_grad:
            x_hat = _DenseGradDecode.apply(feature_acts, self.W_dec, bias, rows, support)
        else:
            x_hat = ops.sparse_decode(support, rows, bias)
        return self._after_decode(x_hat)

    def forward(self, x: Tensor) -> Tensor:
        """SAELens' forward; latents stay sparse in between unless a hook wants them dense."""
        if torch.compiler.is_compiling():
            return super().forward(x)  # type: ignore[misc]
        reason = self._why_not_fused(x)
        self._fast.count("forward", reason)
        return super().forward(x) if reason else self._fused(x)  # type: ignore[misc]

    # For those who opt in

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """The active latents of x [..., d_in], as SparseActs of shape [..., d_sae]; differentiable.

        hook_sae_input runs. If hook_sae_acts_pre or _post is hooked, or the fast path is not sound, SAELens' encode gives
        the dense acts of which these are the nonzero entries.
        """
        reason = self._why_not_sparse(x)
        self._fast.count("encode_sparse", reason)
        return ops.find_support(self.encode(x)) if reason else self._sparse_pass(x)

    def decode_sparse(self, acts: SparseActs) -> Tensor:
        """Reconstruction from SparseActs, as decode of their dense form; differentiable in acts.values.

        Raises TypeError / ValueError as `sparse_decode`.
        """
        if not isinstance(acts, SparseActs):
            raise TypeError(f"acts: must be SparseActs (encode_sparse gives them), got {type(acts).__name__}")
        reason = self._why_not_decode(acts.values, sparse=True)
        self._fast.count("decode_sparse", reason)
        return super().decode(ops.to_dense(acts)) if reason else self._after_decode(self._sparse_decode(acts))  # type: ignore[misc]

    def forward_fused(self, x: Tensor) -> Tensor:
        """As forward; kept as a name for those who want to say that no dense latents shall exist.

        Memory beyond the output: the active latents and a few copies of x. Where a hook or an option wants dense latents,
        SAELens' forward answers, and `stats` says so.
        """
        return self.forward(x)

    # What decides

    def _why_not_encode(self, x: object, *, any_density: bool = False) -> str:
        kind = self._fast.kind
        weights = [getattr(self, name, None) for name in (*kind.packed, *kind.others)]
        reason = why_not_tensors(self, x, weights)
        if reason:
            return reason
        assert isinstance(x, Tensor)
        reason = why_not_activation(self, kind, x)
        if reason:
            return reason
        if kind is PURSUIT and (reason := why_not_pursuit(self, x)):
            return reason
        if self._fast.encoder.get(*self._encoder_weights()) is None:
            return "the encoder's weights are not finite"
        return "" if any_density else self._why_too_dense(x)

    def _why_not_sparse(self, x: object, *, any_density: bool = False) -> str:
        """Why no sparse latents may be made: a hook after them wants them dense."""
        hooked = "latents are hooked (hook_sae_acts_post)" if is_hooked(self.hook_sae_acts_post) else ""
        return self._why_not_encode(x, any_density=any_density) or hooked

    def _why_too_dense(self, x: Tensor) -> str:
        """Where most latents are active, a dense encode is the right one. Known from the last call, else probed."""
        state = self._fast
        if state.kind in (TOPK, PURSUIT) or x.numel() == 0:
            return ""
        if state.density is None:
            state.density = self._probed_density(x)
        return f"more than {ENCODE_DENSITY:.0%} of the latents are active" if state.density > ENCODE_DENSITY else ""

    @torch.no_grad()
    def _probed_density(self, x: Tensor) -> float:
        """Active share of the latents of a few tokens, without hooks or normalisation: a guess decides only the path."""
        rows = x.detach().reshape(-1, self.W_enc.shape[0])
        rows = rows[torch.linspace(0, len(rows) - 1, min(PROBE_TOKENS, len(rows))).long()].to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            rows = rows - self.b_dec
        threshold = self.threshold.clamp(min=0) if self._fast.kind is JUMPRELU else 0
        scores = rows @ self.W_enc + getattr(self, self._fast.kind.packed[1])
        return (scores > threshold).float().mean().item()

    def _why_not_decode(self, acts: object, *, sparse: bool = False) -> str:
        reason = why_not_tensors(self, acts, (self.W_dec, self.b_dec))
        if reason:
            return reason
        assert isinstance(acts, Tensor)
        if acts.dtype != self.W_dec.dtype:
            return "mixed dtypes"
        if not sparse and (acts.ndim < 1 or acts.shape[-1] != self.W_dec.shape[0]):
            return "shape of the latents"
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return "rescale_acts_by_decoder_norm"
        return "W_dec is not finite" if self._fast.decoder.get(self.W_dec) is None else ""

    def _why_not_fused(self, x: object) -> str:
        plain = _plain_class(type(self))
        if plain.forward not in known_methods()[2] or {"encode", "decode"} & self.__dict__.keys():
            return "forward, encode or decode is overridden"
        return self._why_not_sparse(x) or self._why_not_decode(self.W_dec, sparse=True)

    # The fast path

    def _sparse_pass(self, x: Tensor) -> SparseActs:
        """The active latents of x, which `_why_not_encode` let pass; reused where SAELens computes them a second time."""
        state = self._fast
        sae_in = self.process_sae_in(x)
        prepared = state.encoder.latest(*self._encoder_weights())
        deciding = (prepared, *self._deciding_values())
        clean = type(self.hook_sae_acts_post) is nn.Identity  # SAELens' second pass for the error term, hooks disabled
        last, state.last_pass = state.last_pass, None
        if clean and last is not None and _same_pass(last, sae_in, deciding):
            return last[2]
        acts = self._encode_on_ops(sae_in, prepared)
        if state.kind not in (TOPK, PURSUIT) and acts.n_tokens:
            state.density = acts.values.numel() / (acts.n_tokens * acts.d_sae)
        if clean:
            state.has_second_passes = True
        elif state.has_second_passes:
            copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in deciding)
            state.last_pass = sae_in.detach().clone(), copies, acts.detach()
        return acts

    def _encoder_weights(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self._fast.kind.packed)

    def _deciding_values(self) -> tuple[Any, ...]:
        """What besides the packed weights decides the result: k, thresholds, magnitude parameters."""
        if self._fast.kind is TOPK:
            return (self.activation_fn.k,)
        if self._fast.kind is PURSUIT:
            return self.cfg.max_iterations, self.cfg.residual_threshold, self.cfg.stop_on_duplicate_support
        return tuple(getattr(self, name).detach() for name in self._fast.kind.others)

    def _encode_on_ops(self, sae_in: Tensor, prepared: Any) -> SparseActs:
        kind = self._fast.kind
        if kind is PURSUIT:
            return pursuit(
                sae_in,
                prepared,
                self.cfg.max_iterations or self.cfg.d_in,
                method="matching",
                residual_threshold=max(0.0, self.cfg.residual_threshold),
                stop_on_duplicate=self.cfg.stop_on_duplicate_support,
            )
        if kind is TOPK:
            return ops.topk_encode(sae_in, self.W_enc, self.b_enc, self.activation_fn.k, prepared=prepared)
        if kind is GATED:
            return self._gated_on_ops(sae_in, prepared)
        # relu comes before the strict threshold, so a negative threshold keeps what relu keeps
        threshold = self.threshold.detach().clamp(min=0) if kind is JUMPRELU else 0.0
        return ops.threshold_encode(sae_in, self.W_enc, self.b_enc, threshold, prepared=prepared)

    def _gated_on_ops(self, sae_in: Tensor, prepared: ops.PreparedEncoder) -> SparseActs:
        """The gate's support, and the magnitudes there: relu(<x, w_j> exp(r_mag_j) + b_mag_j). The gate has no gradient."""
        gate = ops.threshold_encode(sae_in, self.W_enc, self.b_gate.detach(), 0.0, prepared=prepared)
        products = ops.decoder_dot(sae_in.detach(), gate, prepared.weight)
        if gate.values.requires_grad:
            products = _ValueWithGradientOf.apply(products, gate.values)
        magnitudes = (products * self.r_mag.exp()[gate.col_indices] + self.b_mag[gate.col_indices]).relu()
        return SparseActs.ragged(gate.crow_indices, gate.col_indices, magnitudes, gate.d_sae, gate.batch_shape)

    def _dense_encode(self, x: Tensor) -> Tensor:
        """SAELens' own encode; a look at some tokens of the result tells whether the next call can be sparse."""
        acts = super().encode(x)  # type: ignore[misc]
        if self._fast.density is not None and type(acts) is Tensor and acts.numel() and not transforms_active():
            rows = acts.detach().reshape(-1, acts.shape[-1])
            rows = rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()]
            self._fast.density = rows.count_nonzero().item() / rows.numel()
        return acts

    def _encode_some(self, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
        numbers = _latent_numbers(latents, self.cfg.d_sae).to(self.W_enc.device)
        kind = self._fast.kind
        reason = self._why_not_sparse(x, any_density=True)
        self._fast.count("encode(latents)", reason)
        if reason:
            return self.encode(x)[..., numbers]
        if kind in (TOPK, GATED, PURSUIT):
            return self._sparse_pass(x).dense_columns(numbers)
        threshold = self.threshold.detach().clamp(min=0)[numbers] if kind is JUMPRELU else 0.0
        some = ops.threshold_encode(self.process_sae_in(x), self.W_enc[:, numbers], self.b_enc[numbers], threshold)
        return ops.to_dense(some)

    def _sparse_decode(self, acts: SparseActs) -> Tensor:
        """W_dec itself where it wants a gradient, else its contiguous copy."""
        wants_grad = self.W_dec.requires_grad and torch.is_grad_enabled()
        return ops.sparse_decode(acts, self.W_dec if wants_grad else self._decoder_rows(), self._decoder_bias())

    def _decoder_bias(self) -> Tensor | None:
        """SAELens' matching pursuit adds b_dec only where it subtracted it."""
        return None if self._fast.kind is PURSUIT and not self.cfg.apply_b_dec_to_input else self.b_dec

    def _decoder_rows(self) -> Tensor:
        rows = self._fast.decoder.latest(self.W_dec)
        assert rows is not None  # _why_not_decode has looked
        return rows

    def _after_decode(self, x_hat: Tensor) -> Tensor:
        """What SAELens' decode does after W_dec and b_dec; transcoders only run the hook, their output is elsewhere."""
        x_hat = self.hook_sae_recons(x_hat)
        if _is_transcoder(self):
            return x_hat
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def _sparse_forward(self, x: Tensor) -> Tensor:
        return self._after_decode(self._sparse_decode(self._sparse_pass(x)))

    def _fused(self, x: Tensor) -> Tensor:
        sae_out = self._sparse_forward(x)
        if _is_transcoder(self):
            skip = self._parameters.get("W_skip")
            return sae_out if skip is None else sae_out + x @ skip.T
        if self.use_error_term:
            with torch.no_grad():
                clean = sae_out.detach()
                if is_hooked(self.hook_sae_input) or is_hooked(self.hook_sae_recons):
                    clean = self._unhooked_forward(x)
                sae_error = self.hook_sae_error(x - clean)
            sae_out = sae_out + sae_error
        return self.hook_sae_output(sae_out)

    def _unhooked_forward(self, x: Tensor) -> Tensor:
        from sae_lens.saes.sae import _disable_hooks

        with _disable_hooks(self):  # type: ignore[arg-type]
            return self._sparse_forward(x)

    # What changes weights in ways no look can see

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fast.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the packed weights are made anew."""
        self._fast.forget()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

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


def _same_pass(last: tuple[Tensor, tuple, SparseActs], sae_in: Tensor, deciding: tuple) -> bool:
    """Whether the last pass had this input (bit for bit) and these weights and settings."""
    if not torch.equal(last[0], sae_in) or len(last[1]) != len(deciding):
        return False
    return all(
        torch.equal(old, new) if isinstance(new, Tensor) else old is new or old == new
        for old, new in zip(last[1], deciding, strict=True)
    )


def _latent_numbers(latents: Tensor | Sequence[int], d_sae: int) -> Tensor:
    numbers = latents.cpu() if isinstance(latents, Tensor) else torch.tensor(latents)
    if numbers.numel() == 0:
        numbers = numbers.long()
    if numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"latents: must be a list of whole numbers, got {numbers.dtype} of shape {list(numbers.shape)}")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < d_sae:
        raise ValueError(f"latents: must be from 0 to {d_sae - 1}, got {int(numbers.min())} to {int(numbers.max())}")
    return numbers.long()


def _is_transcoder(sae: object) -> bool:
    from sae_lens.saes.transcoder import Transcoder

    return isinstance(sae, Transcoder)


# The public functions

_classes: dict[type, type] = {}  # SAELens class -> its accelerated subclass


def _plain_class(cls: type) -> type:
    """The SAELens class an accelerated class stands for."""
    return next(base for base in cls.__mro__ if not issubclass(base, AcceleratedSAE))


def _kind_of(plain: type) -> Kind:
    """What the encode of a SAELens class computes; raises ValueError, with the reason, where it cannot be accelerated."""
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.saes.temporal_sae import TemporalSAE

    encoders, decoders, _ = known_methods()
    if issubclass(plain, TrainingSAE):
        why = "a training class, whose weights change at every step and whose losses need dense pre-activations"
    elif issubclass(plain, TemporalSAE):
        why = "its codes depend on the tokens before, through attention, not on one token's latents"
    elif plain.encode not in encoders or plain.decode not in decoders:  # type: ignore[attr-defined]
        why = "its encode or decode is not one of SAELens' own inference classes that are known here"
    else:
        return encoders[plain.encode]  # type: ignore[attr-defined]
    raise ValueError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")


def _accelerated_class(plain: type) -> type:
    """The subclass of a SAELens class that `accelerate` gives its objects."""
    if plain not in _classes:
        # Loading through the class of an accelerated object gives plain objects, as loading through SAE does.
        plain_lookup = classmethod(lambda cls, architecture: plain.get_sae_class_for_architecture(architecture))
        members: dict[str, Any] = {"get_sae_class_for_architecture": plain_lookup, "__module__": plain.__module__}
        _classes[plain] = types.new_class(
            plain.__name__, (AcceleratedSAE, plain), exec_body=lambda n: n.update(members)
        )
    return _classes[plain]


def _new_accelerated(plain: type) -> Any:
    cls = _accelerated_class(plain)
    return cls.__new__(cls)


def accelerate(sae: SAE) -> SAE:
    """Make a SAELens SAE answer through this package's ops, in place.

    The same object, with the same parameters, hooks, configuration and results (pre-activations accumulated in float64
    instead of in the order of a dense product), several times faster on sparse latents. isinstance, state_dict, `.to`,
    deepcopy and save_model work as before. Calls the fast path is not sound for are answered by SAELens: see `stats`.

    Args:
        sae: topk, jumprelu, standard, gated, matching_pursuit, transcoder, skip_transcoder, jumprelu_transcoder or
            jumprelu_skip_transcoder.

    Returns:
        sae itself, with `encode_sparse`, `decode_sparse`, `forward_fused` and `encode(x, latents=...)` besides.

    Raises:
        TypeError: not a SAELens SAE. ValueError: one that cannot be accelerated, with the reason.

    Weights are packed at the first call (cost: one pass over W_enc; memory: W_enc once more and a quarter for its 8-bit
    codes). Which later edits of weights are noticed: `darkmatter_ext/packed_weights.py`; after any other call `refresh`.
    """
    from sae_lens import SAE

    if not isinstance(sae, SAE):
        raise TypeError(f"sae: must be a SAELens SAE, got {type(sae).__name__}")
    if is_accelerated(sae):
        return sae
    plain = type(sae)
    _kind_of(plain)
    sae.__class__ = _accelerated_class(plain)
    return sae


def deaccelerate(sae: SAE) -> SAE:
    """Give an accelerated SAE its SAELens class back, in place; any other is returned as it is."""
    if is_accelerated(sae):
        vars(sae).pop(_STATE, None)
        sae.__class__ = _plain_class(type(sae))
    return sae


def is_accelerated(sae: object) -> bool:
    """Whether `accelerate` has been applied."""
    return isinstance(sae, AcceleratedSAE)


def _accelerated_state(sae: object) -> _State:
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
    state = _accelerated_state(sae)
    with state.lock:
        calls = dict(state.calls)
    fast = {method: count for (method, reason), count in calls.items() if not reason}
    fallback: dict[str, dict[str, int]] = {}
    for (method, reason), count in calls.items():
        if reason:
            fallback.setdefault(method, {})[reason] = count
    return Stats(fast, fallback)
