"""The SAELens architectures that the drop-in supports: one class each, for what it packs, reads and computes.

No other module asks which architecture an SAE has. To add one, write a class here and add a line to `known_encoders`.
Shapes: sae_in [..., d_in] is what SAELens' process_sae_in gives; F = d_sae latents; acts [..., F].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_dot
from darkmatter_ext.ops.encode import PreparedEncoder, prepare_encoder, threshold_encode, topk_encode
from darkmatter_ext.ops.pursuit import prepare_dictionary, pursuit
from darkmatter_ext.ops.unchecked import Tried, try_threshold_encode, try_topk_encode
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.packed_weights import NO_KERNEL
from darkmatter_ext.saes.soundness import has_hooks, is_hooked
from darkmatter_ext.saes.stepping_aside import DENSE_SHARE, GATED_COST, RELU_COST, THRESHOLD_COST, TOPK_COST


class _RowsOf(torch.autograd.Function):
    """The packed rows [F, d], not copied, with the gradient of the W_enc [d, F] they were packed from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, W_enc: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        return None, grad.mT


class _ValueWithGradientOf(torch.autograd.Function):
    """The first argument's value, the second's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        return None, grad


def rows_of(rows: Tensor, W_enc: Tensor) -> Tensor:
    """Packed rows [F, d], not copied, with the gradient of the W_enc [d, F] they were packed from."""
    return _RowsOf.apply(rows, W_enc)


def value_with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """A more exact value of `source`, with the gradient of `source`."""
    return _ValueWithGradientOf.apply(value, source)


def weight(sae: Any, name: str) -> Tensor:
    """A parameter of a module; a plain one is found without the search in nn.Module.__getattr__."""
    found = sae._parameters.get(name)
    return getattr(sae, name) if found is None else found


_MOST_ODD = 64  # latents that are not finite: each costs one exact sum per token
_FEW_SHARE = 1 / 16  # of the latents: with so few places, exact sums of all cost a fraction of a dense product
FEW_PLACES = "k is more than an eighth of the latents that are alive and differ: no latent could be left out unseen"
COARSE_PRODUCTS = "torch multiplies float32 in less than float32 (matmul precision): no bound for what is screened so"


def pack_encoder(W_enc: Tensor, b_enc: Tensor, **options: Any) -> PreparedEncoder | str:
    try:
        prepared = prepare_encoder(W_enc, b_enc, share_rows=True, **options)
    except ValueError:
        return "the encoder's weights are not finite"
    if prepared.groups.numel() and int(prepared.groups[3]) > _MOST_ODD:
        return "many latents of the encoder are not finite"
    return prepared if prepared.can_screen else NO_KERNEL


class Architecture:
    """A linear encoder, selection and relu. The base class is ReLU: it selects what is above 0."""

    bias = "b_enc"
    vectors: tuple[str, ...] = ()  # read in every call, besides the packed weights
    selects_per_latent = True  # whether latents can be left out before selecting
    hooks_acts_post = True
    is_linear = True  # one product of x and the encoder
    dense_cost = RELU_COST  # of SAELens' dense encode
    writes_elsewhere = False  # for a transcoder, whose output is not a reconstruction of its input
    decoder_is_columns = False

    # What it reads

    def packed(self, sae: Any) -> tuple[Tensor, ...]:
        """The weights to pack."""
        return weight(sae, "W_enc"), weight(sae, self.bias)

    def prepare(self, *weights: Tensor) -> Any:
        """Packed weights, or why there are none."""
        return pack_encoder(*weights)

    def read(self, *vectors: Tensor) -> Any:
        """What every call needs from `vectors`, or why they cannot be used."""
        if all(bool(vector.isfinite().all()) for vector in vectors):
            return vectors
        return "threshold or gate is not finite"

    def settings(self, sae: Any) -> tuple[Any, ...]:
        """Settings that affect the result besides weights and vectors."""
        return ()

    def why_not(self, sae: Any, x: Tensor) -> str:
        """Why the steps before or after the pre-activations differ from what the ops compute."""
        activation = sae._modules.get("activation_fn")
        if type(activation) is not nn.ReLU:
            return f"activation function {type(activation).__name__}"
        return "the activation function is hooked" if has_hooks(activation) else ""

    def why_not_now(self, sae: Any, prepared: Any) -> str:
        """Why the packed weights do not help in this call."""
        return "" if prepared.screens else COARSE_PRODUCTS

    # What it computes

    def encode(self, sae: Any, sae_in: Tensor, prepared: Any, vectors: tuple[Tensor, ...]) -> Tried:
        """The active latents, computed by the ops."""
        W_enc = weight(sae, "W_enc")
        return try_threshold_encode(sae_in, W_enc, weight(sae, self.bias), zero_like(W_enc), prepared=prepared)

    def encode_some(self, sae: Any, sae_in: Tensor, numbers: Tensor, vectors: tuple[Tensor, ...]) -> SparseActs:
        """The active ones among the given latents [m], numbered by their place in this list."""
        threshold = vectors[0][numbers] if vectors else 0.0
        return threshold_encode(sae_in, sae.W_enc[:, numbers], sae.b_enc[numbers], threshold)

    def dense(self, sae: Any, sae_in: Tensor) -> Tensor:
        """Dense acts in SAELens' own arithmetic, without hooks, for tokens that were handed back."""
        return sae.activation_fn(sae_in @ sae.W_enc + sae.b_enc)

    # What follows the decoder

    def rescales(self, sae: Any) -> bool:
        """Whether latents are in units of their decoder norm, which encoding multiplies in and decoding divides out."""
        return False

    def decoder_bias(self, sae: Any) -> Tensor | None:
        return weight(sae, "b_dec")

    def finish_decode(self, sae: Any, x_hat: Tensor) -> Tensor:
        """The last steps of SAELens' decode."""
        return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(x_hat), sae.d_head)

    def finish_forward(self, sae: Any, x: Tensor, sae_out: Tensor) -> Tensor:
        """The last steps of SAELens' forward, apart from hooks and the error term."""
        return sae_out

    # For comparing answers: what a difference may come from

    def threshold(self, sae: Any, latents: Tensor) -> Tensor:
        """What the pre-activations of the given latents [...] must exceed, besides 0."""
        return torch.zeros(latents.shape, dtype=sae.dtype)

    def border(self, sae: Any, latents: Tensor, acts: Tensor) -> Tensor:
        """[m]: the value that decided whether latents [m] are active, for tokens with acts [m, F]."""
        return self.threshold(sae, latents)

    def magnification(self, sae: Any, latents: Tensor) -> Tensor:
        """The factors that multiply the products of latents [m]."""
        return torch.ones(latents.shape, dtype=sae.dtype)


_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def zero_like(like: Tensor) -> Tensor:
    """The number 0 as a tensor with the dtype and device of `like`, created once."""
    key = like.dtype, like.device
    if key not in _zeros:
        with torch.inference_mode(False):
            _zeros[key] = torch.zeros((), dtype=like.dtype, device=like.device)
    return _zeros[key]


class JumpRelu(Architecture):
    """Selects what is above a threshold per latent."""

    vectors = ("threshold",)
    dense_cost = THRESHOLD_COST

    def read(self, *vectors: Tensor) -> Any:
        finite = super().read(*vectors)
        # relu comes before the strict threshold, so a negative threshold keeps what relu keeps
        return finite if isinstance(finite, str) else (vectors[0].detach().clamp(min=0),)

    def encode(self, sae: Any, sae_in: Tensor, prepared: Any, vectors: tuple[Tensor, ...]) -> Tried:
        W_enc, b_enc = weight(sae, "W_enc"), weight(sae, "b_enc")
        return try_threshold_encode(sae_in, W_enc, b_enc, vectors[0], prepared=prepared)

    def threshold(self, sae: Any, latents: Tensor) -> Tensor:
        return sae.threshold.detach()[latents]

    def dense(self, sae: Any, sae_in: Tensor) -> Tensor:
        pre = sae_in @ sae.W_enc + sae.b_enc
        return sae.activation_fn(pre) * (pre > sae.threshold.detach()).to(sae.dtype)


class Transcoder(Architecture):
    """Writes to a different site than it reads, without further steps; a skip transcoder adds a linear map of its input."""

    writes_elsewhere = True

    def finish_decode(self, sae: Any, x_hat: Tensor) -> Tensor:
        return x_hat

    def finish_forward(self, sae: Any, x: Tensor, sae_out: Tensor) -> Tensor:
        skip = sae._parameters.get("W_skip")
        return sae_out if skip is None else sae_out + x @ skip.T


class JumpReluTranscoder(Transcoder, JumpRelu):
    """A transcoder with a threshold per latent."""


class Gated(Architecture):
    """The support where the gate is above 0, and magnitudes relu(<x, w_j> exp(r_mag_j) + b_mag_j) there."""

    bias = "b_gate"
    vectors = ("b_mag", "r_mag")
    dense_cost = GATED_COST
    selects_per_latent = False

    def encode(self, sae: Any, sae_in: Tensor, prepared: Any, vectors: tuple[Tensor, ...]) -> Tried:
        W_enc, b_gate = weight(sae, "W_enc"), weight(sae, "b_gate").detach()  # the gate has no gradient
        gate, undecided = try_threshold_encode(sae_in, W_enc, b_gate, zero_like(W_enc), prepared=prepared)
        latents = gate.stored_indices
        products = decoder_dot(sae_in.detach(), gate, prepared.weight)
        if gate.values.requires_grad:
            products = value_with_gradient_of(products, gate.values)
        magnitudes = (products * sae.r_mag.exp()[latents] + sae.b_mag[latents]).relu()
        acts = SparseActs(magnitudes, latents, gate.d_sae, gate.crow, gate.ragged_batch_shape)
        return Tried(acts, undecided)

    def dense(self, sae: Any, sae_in: Tensor) -> Tensor:
        gate = (sae_in @ sae.W_enc + sae.b_gate > 0).to(sae.dtype)
        return gate * sae.activation_fn(sae_in @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag)

    def magnification(self, sae: Any, latents: Tensor) -> Tensor:
        return sae.r_mag.exp()[latents]


def why_not_k(k: Any, d_sae: int) -> str:
    """Why the ops cannot choose the k largest of d_sae latents."""
    fits = type(k) is int and 0 <= k <= max(1, DENSE_SHARE * d_sae)
    return "" if fits else f"k is not from 0 to {DENSE_SHARE:.0%} of the latents"


def why_not_topk(prepared: PreparedEncoder, k: int) -> str:
    """Why the packed weights do not help to choose the k largest."""
    if not prepared.screens:
        return COARSE_PRODUCTS
    return "" if prepared.screens_topk(k) or prepared.n_places <= _FEW_SHARE * prepared.d_sae else FEW_PLACES


def select_topk(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, prepared: PreparedEncoder) -> Tried:
    """The k largest pre-activations of each token, then relu."""
    if prepared.screens_topk(k):
        return try_topk_encode(sae_in, W_enc, b_enc, k, prepared=prepared)
    acts = topk_encode(sae_in, W_enc, b_enc, k, prepared=prepared)  # exact sums of the few that are alive
    return Tried(acts, sae_in.new_empty(0, dtype=torch.int64))


class TopK(Architecture):
    """The k largest; with rescale_acts_by_decoder_norm, the k largest times the norm of their decoder row."""

    selects_per_latent = False
    dense_cost = TOPK_COST

    def rescales(self, sae: Any) -> bool:
        return sae.cfg.rescale_acts_by_decoder_norm

    def settings(self, sae: Any) -> tuple[Any, ...]:
        return sae.activation_fn.k, sae.cfg.rescale_acts_by_decoder_norm

    def why_not(self, sae: Any, x: Tensor) -> str:
        from sae_lens.saes.topk_sae import TopK as SaeLensTopK

        activation = sae._modules.get("activation_fn")
        if type(activation) is not SaeLensTopK or activation.use_sparse_activations:
            return f"activation function {type(activation).__name__}"
        if has_hooks(activation):
            return "the activation function is hooked"
        return why_not_k(activation.k, weight(sae, "W_enc").shape[1])

    def packed(self, sae: Any) -> tuple[Tensor, ...]:
        weights = super().packed(sae)
        return (*weights, weight(sae, "W_dec")) if self.rescales(sae) else weights

    def prepare(self, *weights: Tensor) -> Any:
        if len(weights) == 2:
            return pack_encoder(*weights)
        W_enc, b_enc, W_dec = weights
        if not W_enc.is_cpu:
            return "rescale_acts_by_decoder_norm has no kernel for this device"
        return pack_encoder(W_enc, b_enc, gain=W_dec.norm(dim=-1))

    def why_not_now(self, sae: Any, prepared: Any) -> str:
        return why_not_topk(prepared, sae._modules["activation_fn"].k)

    def encode(self, sae: Any, sae_in: Tensor, prepared: Any, vectors: tuple[Tensor, ...]) -> Tried:
        W_enc, b_enc = weight(sae, "W_enc"), weight(sae, "b_enc")
        if not self.rescales(sae):
            return self._selected(sae, sae_in, prepared)
        with torch.no_grad():
            tried = self._selected(sae, sae_in, prepared)
        W_dec = weight(sae, "W_dec")
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (sae_in, W_enc, b_enc, W_dec)):
            return tried
        acts, latents = tried.acts, tried.acts.stored_indices
        rows = rows_of(prepared.weight, W_enc)
        pre = decoder_dot(sae_in, acts, rows).reshape(latents.shape) + b_enc[latents]
        values = value_with_gradient_of(acts.values, pre.relu() * W_dec.norm(dim=-1)[latents])
        return Tried(SparseActs(values, latents, acts.d_sae), tried.undecided)

    def _selected(self, sae: Any, sae_in: Tensor, prepared: Any) -> Tried:
        k = sae._modules["activation_fn"].k
        return select_topk(sae_in, weight(sae, "W_enc"), weight(sae, "b_enc"), k, prepared)

    def dense(self, sae: Any, sae_in: Tensor) -> Tensor:
        pre = sae_in @ sae.W_enc + sae.b_enc
        return sae.activation_fn(pre * sae.W_dec.norm(dim=-1) if self.rescales(sae) else pre)

    def border(self, sae: Any, latents: Tensor, acts: Tensor) -> Tensor:
        return acts.masked_fill(acts == 0, float("inf")).min(-1).values


class MatchingPursuit(Architecture):
    """Chooses latents one by one, each with the largest product with what the others leave."""

    selects_per_latent = False
    hooks_acts_post = False  # SAELens runs no hook here
    is_linear = False

    def packed(self, sae: Any) -> tuple[Tensor, ...]:
        return (weight(sae, "W_dec"),)

    def prepare(self, *weights: Tensor) -> Any:
        try:
            return prepare_dictionary(*weights)
        except ValueError:
            return "the encoder's weights are not finite"

    def settings(self, sae: Any) -> tuple[Any, ...]:
        return sae.cfg.max_iterations, sae.cfg.residual_threshold, sae.cfg.stop_on_duplicate_support

    def why_not(self, sae: Any, x: Tensor) -> str:
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, sae.W_dec, sae.b_dec))
        if wants_grad:
            return "matching pursuit has no fast gradient (torch.no_grad() makes it fast)"
        if sae.dtype not in (torch.float32, torch.float64):
            return "a 16-bit matching pursuit depends on the order of its sums"
        if x.ndim < 2 + sae.hook_z_reshaping_mode:
            return "x of one dimension"
        if (sae.cfg.max_iterations or sae.cfg.d_in) > sae.cfg.d_sae:
            return "more iterations than latents"
        return "x is hooked" if is_hooked(sae.hook_sae_input) else super().why_not(sae, x)

    def why_not_now(self, sae: Any, prepared: Any) -> str:
        return ""

    def encode(self, sae: Any, sae_in: Tensor, prepared: Any, vectors: tuple[Tensor, ...]) -> Tried:
        finite = sae_in.isfinite().all(-1).reshape(-1)
        undecided = finite.logical_not().nonzero()[:, 0]
        acts = pursuit(
            sae_in.nan_to_num(0.0, 0.0, 0.0) if undecided.numel() else sae_in,
            prepared,
            sae.cfg.max_iterations or sae.cfg.d_in,
            method="matching",
            residual_threshold=max(0.0, sae.cfg.residual_threshold),
            stop_on_duplicate=sae.cfg.stop_on_duplicate_support,
        )
        return Tried(acts, undecided)

    def dense(self, sae: Any, sae_in: Tensor) -> Tensor:
        from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

        return _encode_matching_pursuit(sae_in, sae.W_dec, sae.cfg.residual_threshold, *self.settings(sae)[::2])

    def decoder_bias(self, sae: Any) -> Tensor | None:
        """SAELens adds b_dec only where it subtracted it."""
        return super().decoder_bias(sae) if sae.cfg.apply_b_dec_to_input else None


@functools.cache
def known_encoders() -> dict[Any, Architecture]:
    """Maps SAELens' encode functions to what they compute."""
    from sae_lens.saes import gated_sae, jumprelu_sae, matching_pursuit_sae, standard_sae, topk_sae, transcoder

    return {
        topk_sae.TopKSAE.encode: TopK(),
        standard_sae.StandardSAE.encode: Architecture(),
        transcoder.Transcoder.encode: Transcoder(),
        jumprelu_sae.JumpReLUSAE.encode: JumpRelu(),
        transcoder.JumpReLUTranscoder.encode: JumpReluTranscoder(),
        gated_sae.GatedSAE.encode: Gated(),
        matching_pursuit_sae.MatchingPursuitSAE.encode: MatchingPursuit(),
    }


@functools.cache
def known_decoders() -> frozenset[Any]:
    from sae_lens.saes import gated_sae, jumprelu_sae, matching_pursuit_sae, standard_sae, topk_sae, transcoder

    return frozenset(
        {
            topk_sae.TopKSAE.decode,
            standard_sae.StandardSAE.decode,
            transcoder.Transcoder.decode,
            jumprelu_sae.JumpReLUSAE.decode,
            gated_sae.GatedSAE.decode,
            matching_pursuit_sae.MatchingPursuitSAE.decode,
        }
    )


@functools.cache
def known_forwards() -> frozenset[Any]:
    from sae_lens.saes import sae, transcoder

    return frozenset({sae.SAE.forward, transcoder.Transcoder.forward, transcoder.SkipTranscoder.forward})


def architecture_of(plain: type) -> Architecture:
    """What the encode of a SAELens class computes. Raises ValueError, with the reason, if it cannot be accelerated."""
    from sae_lens.saes.temporal_sae import TemporalSAE
    from sae_lens.saes.transcoder import Transcoder as SaeLensTranscoder

    if issubclass(plain, TemporalSAE):
        why = "its codes depend on the tokens before, through attention, not on one token's latents"
    elif plain.encode not in known_encoders() or plain.decode not in known_decoders():
        why = "its encode or decode is not one of SAELens' own inference classes that are known here"
    elif known_encoders()[plain.encode].writes_elsewhere != issubclass(plain, SaeLensTranscoder):
        why = "the encode of a transcoder in an SAE, or the other way round"
    else:
        return known_encoders()[plain.encode]
    raise InputError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")
