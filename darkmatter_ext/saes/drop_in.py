"""The drop-in: `accelerate(sae)` makes an SAE answer through this package's ops, and changes nothing else.

This module has the public functions and the methods of accelerated SAELens objects (other libraries: `dictionaries`,
`sparse_coder`). Every call first checks whether the fast path is sound for it; if not, SAELens' own code answers and
`stats` reports why. Latents L = [..., d_sae] are dense where SAELens' methods return them; `encode_sparse`,
`decode_sparse` and `forward_fused` keep them sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from darkmatter_ext.ops import unchecked
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.decode import decoder_outer, find_support, sparse_decode, to_dense
from darkmatter_ext.runtime.html import html_table
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes import stepping_aside
from darkmatter_ext.saes.accelerated import Accelerated, Surface, make_accelerated, make_plain, plain_class
from darkmatter_ext.saes.architectures import Architecture, architecture_of, known_forwards
from darkmatter_ext.saes.dictionaries import dictionary_surface, is_dictionary
from darkmatter_ext.saes.drop_in_state import State, Stats
from darkmatter_ext.saes.looks import SAVES_MEMORY, look_at_decoder, look_at_decoder_after, look_at_encoder
from darkmatter_ext.saes.passes import (
    after_decode,
    decoder_rows,
    decoder_scale,
    dense_acts,
    encode_pass,
    encoder_input,
    reconstructed,
    unhooked_forward,
)
from darkmatter_ext.saes.row_layout import lay_contiguous
from darkmatter_ext.saes.soundness import is_hooked, transforms_active
from darkmatter_ext.saes.sparse_coder import is_sparse_coder, sparse_coder_surface
from darkmatter_ext.saes.stepping_aside import DECODE_DENSITY, SMALL, TOO_DENSE
from darkmatter_ext.saes.training_saes import is_training_sae, training_surface


class _DenseGradDecode(torch.autograd.Function):
    """x_hat = acts W_dec + b_dec from the support of acts, with the same dense gradient of acts as SAELens."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor, b_dec: Tensor, rows: Tensor, support: SparseActs) -> Tensor:
        ctx.save_for_backward(acts, W_dec)
        ctx.support = support
        return sparse_decode(support, rows, b_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        acts, W_dec = ctx.saved_tensors
        wants_acts, wants_weights, wants_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weights = None
        if wants_weights and (torch.is_grad_enabled() or transforms_active()):
            grad_weights = acts.reshape(-1, acts.shape[-1]).mT @ flat  # can be differentiated again and batched
        elif wants_weights:
            grad_weights = decoder_outer(ctx.support, flat)
        return (
            grad @ W_dec.mT if wants_acts else None,
            grad_weights,
            flat.sum(0) if wants_bias else None,
            None,
            None,
        )


class AcceleratedSAE(Accelerated):
    """Methods that override SAELens' own in an accelerated SAE. Created by `accelerate`, never by hand."""

    _architecture: Architecture

    def _repr_html_(self) -> str:
        """Summary of the SAE and of how its calls were answered, for notebooks."""
        cfg = self.cfg
        title = f"accelerated {cfg.architecture()}, {cfg.d_in} → {cfg.d_sae}, {cfg.dtype}, {cfg.device}"
        return html_table(title, (), (), str(self._fast.stats()).splitlines())

    # SAELens' methods

    def encode(self, x: Tensor, latents: Tensor | Sequence[int] | None = None) -> Tensor:
        """Latent activations [..., d_sae] of x [..., d_in], like SAELens' encode.

        Args:
            x: activations, as SAELens takes them.
            latents: None, or [m] latent numbers: then returns [..., m], equal to `encode(x)[..., latents]`, and skips the rest.

        Raises ValueError / TypeError for latents that are not whole numbers from 0 to d_sae - 1.
        """
        if latents is not None:
            return self._encode_some(x, latents)
        if torch.compiler.is_compiling():
            return super().encode(x)
        state = self._fast
        small = self._architecture.is_linear and stepping_aside.is_small_encode(
            x, self.cfg.d_sae, self._architecture.dense_cost
        )
        ready = SMALL if small else look_at_encoder(self, state, x)
        if isinstance(ready, str):
            state.last_pass = None
            state.count("encode", ready)
            acts = super().encode(x)
            if state.back_off.left and type(acts) is Tensor and not transforms_active():
                state.back_off.after_dense(acts)
            return acts
        acts = dense_acts(encode_pass(self, state, x, ready, "encode"))
        if self._architecture.hooks_acts_post and is_hooked(self._modules["hook_sae_acts_post"]):
            return self.hook_sae_acts_post(acts)
        return acts

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction from feature_acts [..., d_sae], like SAELens' decode, but reading only the rows of active latents."""
        if torch.compiler.is_compiling():
            return super().decode(feature_acts)
        state = self._fast
        small = stepping_aside.is_small_decode(feature_acts, self.cfg.d_sae, self.cfg.d_in)
        decoder = SMALL if small else look_at_decoder(self, state, feature_acts, dense=True)
        support = None
        if not isinstance(decoder, str):
            support = unchecked.find_support(feature_acts.detach())
            if support.values.numel() > DECODE_DENSITY * feature_acts.numel():
                decoder = TOO_DENSE
        state.count("decode", decoder if isinstance(decoder, str) else "")
        if isinstance(decoder, str) or support is None:
            return super().decode(feature_acts)
        bias = self._architecture.decoder_bias(self)
        scale = decoder_scale(self, decoder)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (feature_acts, self.W_dec, self.b_dec)):
            support = support if scale is None else support.scaled(scale.detach())
            acts = feature_acts if scale is None else feature_acts * scale
            x_hat = _DenseGradDecode.apply(acts, self.W_dec, bias, decoder.rows, support)
        else:
            x_hat = unchecked.sparse_decode(support if scale is None else support.scaled(scale), decoder.rows, bias)
        return after_decode(self, x_hat)

    def forward(self, x: Tensor) -> Tensor:
        """SAELens' forward. Latents stay sparse in between unless a hook needs them dense."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        state = self._fast
        architecture = self._architecture
        if architecture.is_linear and stepping_aside.is_small_forward(x, self.cfg.d_sae, architecture.dense_cost):
            state.last_pass = None
            state.count("forward", SMALL)
            return super().forward(x)  # its encodes are small too
        ready = look_at_encoder(self, state, x, sparse=True)
        decoder = ready if isinstance(ready, str) else look_at_decoder_after(self, state, ready)
        if isinstance(ready, str) or isinstance(decoder, str) or self._is_overridden():
            state.last_pass = None
            state.count("forward", decoder if isinstance(decoder, str) else "forward, encode or decode is overridden")
            with state.back_off.one_call():
                return super().forward(x)
        sae_out = reconstructed(self, encode_pass(self, state, x, ready, "forward"), decoder)
        if architecture.writes_elsewhere:
            return architecture.finish_forward(self, x, sae_out)
        if self.use_error_term:
            with torch.no_grad():
                clean = sae_out.detach()
                if is_hooked(self.hook_sae_input) or is_hooked(self.hook_sae_recons):
                    clean = unhooked_forward(self, state, x, ready, decoder)
                sae_error = self.hook_sae_error(x - clean)
            sae_out = sae_out + sae_error
        return self.hook_sae_output(sae_out) if is_hooked(self._modules["hook_sae_output"]) else sae_out

    # Opt-in methods

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """The active latents of x [..., d_in] as SparseActs of shape [..., d_sae]; differentiable.

        Runs hook_sae_input. If hook_sae_acts_pre or _post is hooked, or the fast path is not sound, returns the nonzero
        entries of the dense acts from SAELens' encode.
        """
        state = self._fast
        ready = look_at_encoder(self, state, x, sparse=True)
        if isinstance(ready, str):
            state.count("encode_sparse", ready)
            return find_support(self.encode(x))
        found = encode_pass(self, state, x, ready, "encode_sparse")
        return found.acts if found.dense is None else find_support(dense_acts(found))

    def decode_sparse(self, acts: SparseActs) -> Tensor:
        """Reconstruction from SparseActs, equal to decoding their dense form; differentiable in acts.values.

        Raises TypeError / ValueError as `sparse_decode`.
        """
        if not isinstance(acts, SparseActs):
            raise TypeError(f"acts: must be SparseActs (encode_sparse gives them), got {type(acts).__name__}")
        state = self._fast
        decoder = look_at_decoder(self, state, acts.values)
        state.count("decode_sparse", decoder if isinstance(decoder, str) else "")
        if isinstance(decoder, str):
            return super().decode(to_dense(acts))
        scale = decoder_scale(self, decoder)
        scaled = acts if scale is None else acts.scaled(scale)
        x_hat = sparse_decode(scaled, decoder_rows(self, decoder), self._architecture.decoder_bias(self))
        return after_decode(self, x_hat)

    def forward_fused(self, x: Tensor) -> Tensor:
        """Same as forward; the name states that no dense latents should be built.

        Memory beyond the output: the active latents and a few copies of x. If a hook or an option needs dense latents,
        SAELens' forward answers and `stats` reports it.
        """
        return self.forward(x)

    def _is_overridden(self) -> bool:
        attributes = self.__dict__
        forward = plain_class(type(self)).forward
        return forward not in known_forwards() or "encode" in attributes or "decode" in attributes

    def _encode_some(self, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
        numbers = _latent_numbers(latents, self.cfg.d_sae).to(self.W_enc.device)
        state = self._fast
        ready = look_at_encoder(self, state, x, sparse=True, any_density=True)
        if isinstance(ready, str):
            state.count("encode(latents)", ready)
            return self.encode(x)[..., numbers]
        if self._architecture.selects_per_latent:
            state.count("encode(latents)")
            return to_dense(self._architecture.encode_some(self, encoder_input(self, x), numbers, ready.vectors))
        found = encode_pass(self, state, x, ready, "encode(latents)")
        return found.acts.dense_columns(numbers) if found.dense is None else dense_acts(found)[..., numbers]

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Same as SAELens; W_enc is saved contiguous, because safetensors accepts nothing else."""
        super().process_state_dict_for_saving(state_dict)
        if SAVES_MEMORY in self.__dict__ and "W_enc" in state_dict:
            state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Same as SAELens; also repacks the weights."""
        self._fast.forget()
        return super().fold_and_get_W_dec_norm()

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Same as SAELens; also repacks the weights."""
        self._fast.forget()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        """Same as SAELens; also repacks the weights."""
        self._fast.forget()
        super().fold_activation_whitening(*args, **kwargs)


def _latent_numbers(latents: Tensor | Sequence[int], d_sae: int) -> Tensor:
    numbers = latents.cpu() if isinstance(latents, Tensor) else torch.tensor(latents)
    if numbers.numel() == 0:
        numbers = numbers.long()
    if numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"latents: must be a list of whole numbers, got {numbers.dtype} of shape {list(numbers.shape)}")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < d_sae:
        raise InputError(f"latents: must be from 0 to {d_sae - 1}, got {int(numbers.min())} to {int(numbers.max())}")
    return numbers.long()


def _sae_lens_surface(plain: type) -> tuple[type[Accelerated], dict[str, Any]]:
    # Loading through the class of an accelerated object gives plain objects, just like loading through SAE.
    plain_lookup = classmethod(lambda cls, architecture: plain.get_sae_class_for_architecture(architecture))
    return AcceleratedSAE, {
        "get_sae_class_for_architecture": plain_lookup,
        "_architecture": architecture_of(plain),
        "_library": "SAELens",
    }


# The public functions

_Module = TypeVar("_Module", bound=nn.Module)


def _surface_of(sae: object) -> Surface:
    """The surface for an object's library. Libraries other than SAELens are recognised by class names, not imported."""
    for belongs, surface in ((is_dictionary, dictionary_surface), (is_sparse_coder, sparse_coder_surface)):
        if belongs(type(sae)):
            return surface
    from sae_lens import SAE

    if is_training_sae(type(sae)):
        return training_surface
    if not isinstance(sae, SAE):
        libraries = "a SAELens SAE, a dictionary of dictionary_learning or a SparseCoder of sparsify"
        raise TypeError(f"sae: must be {libraries}, got {type(sae).__name__}")
    return _sae_lens_surface


def accelerate(sae: _Module, *, save_memory: bool = False) -> _Module:
    """Make an SAE of SAELens, sparsify or dictionary_learning answer through this package's ops, in place.

    The object stays the same, with the same parameters, hooks, configuration and results (pre-activations are accumulated
    in float64 instead of in the order of a dense product), but is several times faster on sparse latents. isinstance,
    state_dict, `.to`, deepcopy and save_model work as before. The library itself answers calls for which the fast path is
    not sound: see `stats`.

    Args:
        sae: from SAELens: topk, jumprelu, standard, gated, matching_pursuit, transcoder, skip_transcoder,
            jumprelu_transcoder or jumprelu_skip_transcoder. From dictionary_learning: AutoEncoder, AutoEncoderTopK,
            BatchTopKSAE or JumpReluAutoEncoder. From sparsify: SparseCoder. The last two libraries: without gradients.
            Of SAELens' training classes TopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE and
            JumpReLUTrainingSAE, `training_forward_pass` is accelerated: see `training_saes`.
        save_memory: SAELens only. Store W_enc as the transposed view of contiguous rows, which the ops read in place. This
            saves one copy of W_enc. W_enc is then not contiguous, nor is it in `state_dict` (`save_model` writes it
            contiguous, `deaccelerate` restores it), and SAELens' own dense products of fewer than about 8 tokens take 1.2
            to 1.6 times as long in float32. W_enc is not laid out this way, nor back again, while its storage is shared or
            it has a gradient. Do not use this once a fused optimiser holds averages of W_enc.

    Returns:
        sae itself; a SAELens object also gains `encode_sparse`, `decode_sparse`, `forward_fused` and
        `encode(x, latents=...)`.

    Raises:
        TypeError: sae is none of these. ValueError: it cannot be accelerated (the message says why), or save_memory is
        used with another library.

    Weights are packed at the first call. Cost: a few passes over W_enc. Memory: one more copy of W_enc, unless memory is
    saved or it is stored as rows, plus its codes: F d bytes with AVX-512 VNNI, 2 F d on other AVX2 processors, none
    elsewhere. `darkmatter_ext/saes/packed_weights.py` says which later edits of the weights are detected; after any other
    edit, call `refresh`.
    """
    if not is_accelerated(sae):
        make_accelerated(sae, _surface_of(sae))
    if save_memory:
        _save_memory(sae)
    return sae


def _save_memory(sae: Any) -> None:
    if not isinstance(sae, AcceleratedSAE):
        raise InputError(f"save_memory: must be False for a {plain_class(type(sae)).__name__}, got True")
    sae.__dict__[SAVES_MEMORY] = True


def deaccelerate(sae: _Module) -> _Module:
    """Give an accelerated SAE its library's class back, in place; any other object is returned unchanged."""
    if isinstance(sae, Accelerated):
        saves = sae.__dict__.pop(SAVES_MEMORY, False)
        make_plain(sae)  # afterwards no packed weights hold the storage of W_enc
        if saves and "W_enc" in sae._parameters:
            lay_contiguous(sae.W_enc)
    return sae


def is_accelerated(sae: object) -> bool:
    """Whether `accelerate` has been applied."""
    return isinstance(sae, Accelerated)


def _accelerated_state(sae: object) -> State:
    if not isinstance(sae, Accelerated):
        raise TypeError(f"sae: must be accelerated (darkmatter_ext.accelerate), got {type(sae).__name__}")
    return sae._fast


def refresh(sae: _Module) -> _Module:
    """Repack the weights at the next call. Needed after editing single elements through `.data` or numpy.

    Raises TypeError if sae is not accelerated.
    """
    _accelerated_state(sae).forget()
    return sae


def stats(sae: nn.Module) -> Stats:
    """How many calls of each method were fast, and why the others were not. Calls during compilation are not counted.

    Raises TypeError if sae is not accelerated.
    """
    return _accelerated_state(sae).stats()
