"""The look at the start of every call: what is ready for the ops, or why SAELens answers (a str).

Checks run from the cheapest to the most expensive: whether it pays off (`stepping_aside`), the tensors at hand
(`soundness`), the architecture, hooks, and finally whether the weights are still those that were packed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from darkmatter_ext.saes.architectures import weight
from darkmatter_ext.saes.drop_in_state import Decoder, Ready, State
from darkmatter_ext.saes.row_layout import lay_as_rows
from darkmatter_ext.saes.soundness import is_hooked, why_not_decoder, why_not_input, why_not_together
from darkmatter_ext.saes.stepping_aside import DECODE_DENSITY, TOO_DENSE, TOO_MANY, looks_dense

SAVES_MEMORY = "_darkmatter_saves_memory"  # attribute of an SAE whose W_enc and packed rows should share storage


def look_at_encoder(sae: Any, state: State, x: Any, *, sparse: bool = False, any_density: bool = False) -> Ready | str:
    """What is ready for the encode of x, or why SAELens answers; `sparse`: no later hook may need dense latents."""
    if not any_density and state.back_off.steps_aside():
        return TOO_MANY  # first of all: such a call should cost what SAELens' own does
    architecture = sae._architecture
    weights = architecture.packed(sae)
    vectors = tuple(weight(sae, name) for name in architecture.vectors)
    reason = (
        why_not_input(x)
        or why_not_together(sae, x, (*weights, *vectors))
        or architecture.why_not(sae, x)
        or _why_not_hooks(sae, sparse)
    )
    if reason:
        return reason
    if SAVES_MEMORY in sae.__dict__:
        _lay_as_rows(sae, state, weights[0])
    tokens = x.numel() // max(1, sae.cfg.d_in)
    prepared = state.encoder.get(*weights, tokens=tokens, other=sae._parameters.get("W_dec"))
    reason = prepared if isinstance(prepared, str) else architecture.why_not_now(sae, prepared)
    if reason:
        return reason
    read = state.vectors.get(*vectors) if vectors else ()
    return read if isinstance(read, str) else Ready(prepared, read)


def _why_not_hooks(sae: Any, sparse: bool) -> str:
    if is_hooked(sae._modules["hook_sae_acts_pre"]):
        return "dense pre-activations are hooked (hook_sae_acts_pre)"
    hooked = sparse and is_hooked(sae._modules["hook_sae_acts_post"])
    return "latents are hooked (hook_sae_acts_post)" if hooked else ""


def _lay_as_rows(sae: Any, state: State, W_enc: Tensor) -> None:
    """Make W_enc and its packed rows share storage. Tried only once per storage, because others may hold it too."""
    if W_enc.is_contiguous() and sae._parameters.get("W_enc") is W_enc and state.refused != W_enc.data_ptr():
        state.forget()
        state.refused = None if lay_as_rows(W_enc) else W_enc.data_ptr()


def look_at_decoder(sae: Any, state: State, acts: Any, *, dense: bool = False) -> Decoder | str:
    """What is ready for a decode of acts (dense, or the values of sparse ones), or why SAELens answers."""
    if dense and state.back_off.expects_dense():
        return TOO_DENSE
    W_dec, b_dec = weight(sae, "W_dec"), weight(sae, "b_dec")
    reason = why_not_input(acts) or why_not_decoder(sae, W_dec, b_dec, acts, dense=dense)
    if not reason and dense and not acts.is_meta and looks_dense(acts.detach(), DECODE_DENSITY):
        reason = TOO_DENSE
    return reason or _decoder(sae, state, W_dec)


def look_at_decoder_after(sae: Any, state: State, ready: Ready) -> Decoder | str:
    """As `look_at_decoder`, for the latents of an encode whose look returned `ready`."""
    W_dec, b_dec = weight(sae, "W_dec"), weight(sae, "b_dec")
    reason = why_not_decoder(sae, W_dec, b_dec)
    if reason:
        return reason
    if not sae._architecture.rescales(sae):
        return _decoder(sae, state, W_dec)
    # The encoder is packed with the norms of W_dec, so its look has already found W_dec unchanged since then.
    last = state.decoder_of
    if last is not None and last[0] is ready.prepared:
        return last[1]
    decoder = _decoder(sae, state, W_dec)
    state.decoder_of = None if isinstance(decoder, str) else (ready.prepared, decoder)
    return decoder


def _decoder(sae: Any, state: State, W_dec: Tensor) -> Decoder | str:
    packed = state.rescaled_decoder if sae._architecture.rescales(sae) else state.decoder
    return packed.get(W_dec, other=sae._parameters.get("W_enc"))
