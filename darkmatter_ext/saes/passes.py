"""From x to latents and on to x_hat on the ops, for calls whose look found everything ready.

Tokens that the ops hand back are computed with SAELens' dense arithmetic, within the same call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from darkmatter_ext.ops import unchecked
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.saes.architectures import weight
from darkmatter_ext.saes.drop_in_state import Decoder, Pass, Ready, State, same_pass
from darkmatter_ext.saes.soundness import is_hooked


def encode_pass(sae: Any, state: State, x: Tensor, ready: Ready, method: str) -> Pass:
    """The latents of x; reused when SAELens computes them a second time."""
    sae_in = encoder_input(sae, x)
    settings = sae._architecture.settings(sae)
    clean = type(sae._modules["hook_sae_acts_post"]) is nn.Identity  # SAELens' second pass, hooks disabled
    last, state.last_pass = state.last_pass, None
    wants_grad = torch.is_grad_enabled()
    if clean and not wants_grad and last is not None and same_pass(last, sae_in, ready, settings):
        state.count(method)
        return last[3]
    found = _fresh_pass(sae, state, sae_in, ready, method)
    if clean:
        state.has_second_passes = True
    elif state.has_second_passes and found.dense is None:  # dense acts belong to the caller, who may edit them
        state.last_pass = sae_in.detach().clone(), ready, settings, found.detach()
    return found


def _fresh_pass(sae: Any, state: State, sae_in: Tensor, ready: Ready, method: str = "") -> Pass:
    """As `encode_pass`, always computed. Part of another call (method ""), it neither counts nor affects later calls."""
    acts, undecided = sae._architecture.encode(sae, sae_in, *ready)
    handed_over, tokens = undecided.numel(), acts.n_tokens
    dense = None
    if handed_over:
        rows = sae_in.reshape(tokens, sae_in.shape[-1])
        dense = sae._architecture.dense(sae, rows if handed_over == tokens else rows[undecided])
    if method:
        state.count_tried(method, acts, sae_in.shape[-1], dense)
    return Pass(acts, undecided, dense)


def unhooked_forward(sae: Any, state: State, x: Tensor, ready: Ready, decoder: Decoder) -> Tensor:
    """x_hat of x without the hooks, from which the error term is measured."""
    from sae_lens.saes.sae import _disable_hooks

    with _disable_hooks(sae):
        return reconstructed(sae, _fresh_pass(sae, state, encoder_input(sae, x), ready), decoder)


@functools.cache
def _sae_lens_input() -> Any:
    from sae_lens import SAE

    return SAE.process_sae_in


def encoder_input(sae: Any, x: Tensor) -> Tensor:
    """process_sae_in without the steps that do nothing."""
    known = type(sae).process_sae_in is _sae_lens_input() and "process_sae_in" not in sae.__dict__
    if not known or sae.cfg.apply_b_dec_to_input is not True or is_hooked(sae._modules["hook_sae_input"]):
        return sae.process_sae_in(x)
    sae_in = sae.reshape_fn_in(x if x.dtype is sae.dtype else x.to(sae.dtype))
    return sae.run_time_activation_norm_fn_in(sae_in) - weight(sae, "b_dec")


def dense_acts(found: Pass) -> Tensor:
    """Dense acts [..., F] of a pass."""
    acts, undecided, dense = found
    if dense is None:
        return unchecked.to_dense(acts)
    if undecided.numel() == acts.n_tokens:
        return dense.reshape(acts.shape)
    flat = unchecked.to_dense(acts).reshape(acts.n_tokens, acts.d_sae)
    return flat.index_copy(0, undecided, dense).reshape(acts.shape)


def decoder_rows(sae: Any, decoder: Decoder) -> Tensor:
    """W_dec itself if it requires a gradient, otherwise its contiguous rows."""
    W_dec = weight(sae, "W_dec")
    return W_dec if torch.is_grad_enabled() and W_dec.requires_grad else decoder.rows


def decoder_scale(sae: Any, decoder: Decoder) -> Tensor | None:
    """[F]: factors that multiply the latents before decoding, differentiable; or None."""
    if decoder.inverse_norms is None:
        return None
    W_dec = weight(sae, "W_dec")
    return 1 / W_dec.norm(dim=-1) if torch.is_grad_enabled() and W_dec.requires_grad else decoder.inverse_norms


def reconstructed(sae: Any, found: Pass, decoder: Decoder) -> Tensor:
    """x_hat of a pass, through the hooks after the decoder."""
    acts, undecided, dense = found
    bias, scale = sae._architecture.decoder_bias(sae), decoder_scale(sae, decoder)
    if dense is None:
        return after_decode(sae, _decoded(sae, acts, decoder, bias, scale))
    W_dec = weight(sae, "W_dec")
    x_hat = (dense if scale is None else dense * scale) @ W_dec
    x_hat = x_hat if bias is None else x_hat + bias
    if undecided.numel() < acts.n_tokens:
        others = _decoded(sae, acts, decoder, bias, scale)
        x_hat = others.reshape(acts.n_tokens, others.shape[-1]).index_copy(0, undecided, x_hat)
    return after_decode(sae, x_hat.reshape(*acts.batch_shape, W_dec.shape[1]))


def _decoded(sae: Any, acts: SparseActs, decoder: Decoder, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    scaled = acts if scale is None else acts.scaled(scale)
    return unchecked.sparse_decode(scaled, decoder_rows(sae, decoder), bias)


def after_decode(sae: Any, x_hat: Tensor) -> Tensor:
    """The steps of SAELens' decode after W_dec and b_dec."""
    if is_hooked(sae._modules["hook_sae_recons"]):
        x_hat = sae.hook_sae_recons(x_hat)
    return sae._architecture.finish_decode(sae, x_hat)
