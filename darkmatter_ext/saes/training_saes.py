"""The drop-in for SAELens' training classes: `training_forward_pass` at the cost of the latents that are active.

TopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE and JumpReLUTrainingSAE give the same losses, latents
and gradients as SAELens (pre-activations accumulated in float64), so its own SAETrainer runs unchanged. Encoder
weights are repacked in every step. Only what dead latents do is dense, for their losses. Outside a step,
`encode`, `decode` and `forward` are SAELens' own.

What a step returns: `feature_acts` and `hidden_pre` behave like the dense tensors [N, F] they stand for, and are computed
when first read; `feature_acts.bool()`, which the trainer uses to count firings, is a sparse COO tensor, like SAELens' own
with use_sparse_activations.

Shapes: x [N, d], F latents, z stored entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.batch_topk import EncoderRows, batch_topk
from darkmatter_ext.ops.decode import decoder_dot, sparse_decode, to_dense
from darkmatter_ext.ops.ragged import by_spans, token_sums
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes import stepping_aside
from darkmatter_ext.saes.accelerated import Accelerated, plain_class
from darkmatter_ext.saes.architectures import pack_encoder, rows_of, value_with_gradient_of, weight, why_not_k
from darkmatter_ext.saes.drop_in_state import State
from darkmatter_ext.saes.read_when_used import ReadWhenUsed
from darkmatter_ext.saes.soundness import (
    has_hooks,
    is_hooked,
    why_not_decoder,
    why_not_input,
    why_not_together,
)
from darkmatter_ext.saes.stepping_aside import SMALL, TOO_MANY
from darkmatter_ext.saes.straight_through import gate, jump

STALE = "hidden_pre: must be read before the weights are edited: it is computed when it is first read"
_NO_AUX = ("constant_norm_rescale", "layer_norm")  # SAELens rejects an auxiliary loss with these
_SPARSE_SHARE = 8  # if fewer than one in this many dead latents takes part in their loss, their decode is sparse
# Methods that a class must inherit from SAELens: a step of its own would not be the one known here.
_METHODS = (
    "training_forward_pass", "encode_with_hidden_pre", "decode", "calculate_aux_loss", "calculate_topk_aux_loss",
    "update_topk_threshold", "_iterable_decode", "calculate_matryoshka_aux_loss", "process_sae_in",
)  # fmt: skip


class LatentsWhenUsed(ReadWhenUsed):
    """Dense latents [N, F], built from the active ones when read; before that, `bool()` gives a sparse COO tensor."""

    acts: SparseActs

    @classmethod
    def of(cls, acts: SparseActs) -> LatentsWhenUsed:
        def compute() -> Tensor:
            with torch.enable_grad():
                return to_dense(acts)

        self = cls(acts.shape, acts.values, compute)
        self.acts = acts
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func is torch.Tensor.bool and isinstance(first, LatentsWhenUsed) and first._value is None:
            return as_coo(first.acts.detach()).bool()
        return super().__torch_function__(func, types, args, kwargs)


def as_coo(acts: SparseActs) -> Tensor:
    """Acts [N, F] as torch's sparse COO tensor, without stored zeros; differentiable in the values."""
    values = acts.values.reshape(-1)
    stored = values.detach() != 0
    places = torch.stack([acts.token_numbers()[stored], acts.col_indices[stored]])
    return torch.sparse_coo_tensor(places, values[stored], acts.shape, is_coalesced=False).coalesce()


class Step(NamedTuple):
    """What the losses of a step are computed from."""

    sae: Any
    x: Tensor  # [N, d] as it came
    sae_in: Tensor  # [N, d] as the encoder sees it
    rows: Tensor  # [F, d], with the gradient of W_enc
    norms: Tensor | None  # [F] of the decoder rows, if latents are in units of them

    def pre(self, acts: SparseActs) -> Tensor:
        """Pre-activations of the stored entries, differentiable, before any norm; same shape as acts.values."""
        latents = acts.stored_indices
        products = decoder_dot(self.sae_in, acts, self.rows).reshape(latents.shape)
        return products + weight(self.sae, "b_enc")[latents]

    def dense_pre(self, latents: Tensor) -> Tensor:
        """[N, m] pre-activations of the given latents [m], as in SAELens' `hidden_pre`."""
        pre = self.sae_in @ self.rows[latents].mT + weight(self.sae, "b_enc")[latents]
        return pre if self.norms is None else pre * self.norms[latents]

    def decoded(self, acts: SparseActs) -> Tensor:
        """acts W_dec, without b_dec."""
        return sparse_decode(self.unscaled(acts), weight(self.sae, "W_dec"))

    def unscaled(self, acts: SparseActs) -> SparseActs:
        return acts if self.norms is None else acts.scaled(1 / self.norms)

    def finished(self, x_hat: Tensor) -> Tensor:
        """The last steps of SAELens' decode."""
        return self.sae.reshape_fn_out(self.sae.run_time_activation_norm_fn_out(x_hat), self.sae.d_head)

    def mse(self, x_hat: Tensor) -> Tensor:
        return self.sae.mse_loss_fn(x_hat, self.x).sum(dim=-1).mean()


class TopK:
    """The k largest of each token, with an auxiliary loss for dead latents."""

    decoder_is_columns = False
    counts_norms = True  # has rescale_acts_by_decoder_norm

    def prepare(self, *weights: Tensor) -> Any:
        return weights  # packed by the step itself

    def read(self, *vectors: Tensor) -> Any:
        return vectors

    def why_not(self, sae: Any) -> str:
        """Why the ops do not cover its settings."""
        from sae_lens.saes import batchtopk_sae, topk_sae

        activation = sae._modules.get("activation_fn")
        if type(activation) not in (topk_sae.TopK, batchtopk_sae.BatchTopK):
            return f"activation function {type(activation).__name__}"
        if has_hooks(activation):
            return "the activation function is hooked"
        if sae.cfg.normalize_activations in _NO_AUX:
            return "activations are normalised at run time"
        return why_not_k(math.ceil(activation.k), sae.cfg.d_sae)

    def chosen(self, sae: Any, state: State, sae_in: Tensor, encoder: EncoderRows) -> SparseActs | str:
        """The active latents, without a gradient, or why SAELens answers."""
        return encoder.topk(sae_in, sae._modules["activation_fn"].k)

    def acts(self, step: Step, chosen: SparseActs) -> SparseActs:
        """The chosen acts, with the same gradient as in SAELens."""
        values = step.pre(chosen).relu()
        if step.norms is not None:
            values = values * step.norms[chosen.stored_indices]
        return replace(chosen, values=value_with_gradient_of(chosen.values, values))

    def latents(self, sae: Any, acts: SparseActs) -> Tensor:
        """The latents as a step returns them."""
        sparse = getattr(sae._modules["activation_fn"], "use_sparse_activations", False)
        return as_coo(acts) if sparse else LatentsWhenUsed.of(acts)

    def reconstructions(self, step: Step, acts: SparseActs) -> tuple[Tensor, list[Tensor]]:
        """Sae(x) before SAELens' last steps, and the reconstructions of prefixes with their own losses."""
        return step.decoded(acts) + weight(step.sae, "b_dec"), []

    def aux_losses(
        self, step: Step, acts: SparseActs, sae_out: Tensor, partial: Sequence[Tensor], given: Any
    ) -> dict[str, Tensor]:
        """SAELens' calculate_aux_loss."""
        dead = _dead(given)
        loss = step.x.new_tensor(0.0) if dead is None else self._of_dead(step, sae_out, partial, dead)
        return {"auxiliary_reconstruction_loss": loss}

    def _of_dead(self, step: Step, sae_out: Tensor, partial: Sequence[Tensor], dead: Tensor) -> Tensor:
        own = _dead_loss(step, (step.x - sae_out).detach(), dead)
        return step.sae.cfg.aux_loss_coefficient * own

    def finish(self, sae: Any, output: Any, step: Step, acts: SparseActs, partial: Sequence[Tensor]) -> None:
        """What a subclass adds after the base class's step."""


def _dead(given: Any) -> Tensor | None:
    """Numbers [m] of the dead latents, or None if there are none."""
    mask = given.dead_neuron_mask
    if mask is None:
        return None
    dead = mask.nonzero().flatten()
    return dead if dead.numel() else None


def _dead_loss(step: Step, residual: Tensor, dead: Tensor) -> Tensor:
    """How badly dead latents [m], the best d / 2 at each token, explain the residual [N, d]; scaled down if they are few."""
    k_aux = step.x.shape[-1] // 2
    k, pre = min(k_aux, len(dead)), step.dense_pre(dead)
    W_dec = weight(step.sae, "W_dec")[dead]
    top = pre.topk(k, sorted=False)
    values = top.values if step.norms is None else top.values * (1 / step.norms[dead])[top.indices]
    if _SPARSE_SHARE * k < len(dead):
        found = sparse_decode(SparseActs(values, top.indices, len(dead)), W_dec)
    else:
        found = torch.zeros_like(pre).scatter(-1, top.indices, values) @ W_dec
    found = step.sae.reshape_fn_out(found, step.sae.d_head)
    return min(len(dead) / k_aux, 1.0) * (found - residual).pow(2).sum(dim=-1).mean()


class BatchTopK(TopK):
    """The N k largest of the batch, and a running mean of the smallest of them."""

    def chosen(self, sae: Any, state: State, sae_in: Tensor, encoder: EncoderRows) -> SparseActs | str:
        guess = state.guess
        found = batch_topk(sae_in, encoder, sae._modules["activation_fn"].k, guess.value, guess.spare)
        guess.after(found)
        return found.acts

    def finish(self, sae: Any, output: Any, step: Step, acts: SparseActs, partial: Sequence[Tensor]) -> None:
        positive = acts.values.detach()
        positive = positive[positive > 0]
        if positive.numel():
            rate, before = sae.cfg.topk_threshold_lr, sae.topk_threshold
            sae.topk_threshold = (1 - rate) * before + rate * positive.min().to(before.dtype)
        output.metrics["topk_threshold"] = sae.topk_threshold


class Matryoshka(BatchTopK):
    """Every prefix of the latents also reconstructs x."""

    def reconstructions(self, step: Step, acts: SparseActs) -> tuple[Tensor, list[Tensor]]:
        widths = step.sae.cfg.matryoshka_widths
        parts = step.decoded(by_spans(acts, widths)).unflatten(0, (len(step.x), len(widths)))
        *partial, whole = (parts.cumsum(1) + weight(step.sae, "b_dec")).unbind(1)
        return whole, [step.sae.run_time_activation_norm_fn_out(own) for own in partial]

    def _of_dead(self, step: Step, sae_out: Tensor, partial: Sequence[Tensor], dead: Tensor) -> Tensor:
        if not step.sae.cfg.use_matryoshka_aux_loss:
            return super()._of_dead(step, sae_out, partial, dead)
        widths, losses = step.sae.cfg.matryoshka_widths, []
        ends = torch.searchsorted(dead, torch.tensor(widths, device=dead.device)).tolist()
        for start, end, x_hat in zip([0, *ends], ends, [*partial, sae_out], strict=False):
            if end > start:
                losses.append(_dead_loss(step, (step.x - x_hat).detach(), dead[start:end]))
        return step.sae.cfg.aux_loss_coefficient * torch.stack(losses).sum()

    def finish(self, sae: Any, output: Any, step: Step, acts: SparseActs, partial: Sequence[Tensor]) -> None:
        super().finish(sae, output, step, acts, partial)
        for width, x_hat in zip(sae.cfg.matryoshka_widths, partial, strict=False):
            loss = step.mse(x_hat)
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + loss


class JumpRelu(TopK):
    """Latents above a threshold each, learned with straight-through estimators."""

    counts_norms = False

    def why_not(self, sae: Any) -> str:
        return "" if sae.cfg.jumprelu_sparsity_loss_mode in ("step", "quadratic", "tanh") else "sparsity loss mode"

    def chosen(self, sae: Any, state: State, sae_in: Tensor, encoder: EncoderRows) -> SparseActs | str:
        # SAELens keeps thresholds from falling below 0 this way; clamping in the graph would lose their gradient.
        sae.threshold.data.clamp_(min=0.0)
        # Entries within half a bandwidth below their threshold have no value, but a gradient.
        least = sae.threshold.detach().to(sae_in.dtype) - sae.bandwidth / 2
        acts, undecided = encoder.try_above(sae_in, least)
        return TOO_MANY if undecided.numel() else acts

    def acts(self, step: Step, chosen: SparseActs) -> SparseActs:
        pre, threshold = self._about(step, chosen)
        cfg = step.sae.cfg
        return replace(chosen, values=jump(pre, threshold, step.sae.bandwidth, cfg.jumprelu_ste_to_input))

    def _about(self, step: Step, chosen: SparseActs) -> tuple[Tensor, Tensor]:
        """Pre-activation and threshold of every stored entry [z], differentiable."""
        pre = step.pre(chosen)
        exact = torch.where(chosen.values > 0, chosen.values, pre.detach())
        return value_with_gradient_of(exact, pre), step.sae.threshold.to(pre.dtype)[chosen.stored_indices]

    def latents(self, sae: Any, acts: SparseActs) -> Tensor:
        return LatentsWhenUsed.of(acts)

    def aux_losses(
        self, step: Step, acts: SparseActs, sae_out: Tensor, partial: Sequence[Tensor], given: Any
    ) -> dict[str, Tensor]:
        cfg = step.sae.cfg
        norms = weight(step.sae, "W_dec").norm(dim=1)
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            values = torch.tanh(cfg.jumprelu_tanh_scale * acts.values * norms[acts.stored_indices])
        else:
            pre, threshold = self._about(step, acts)
            values = gate(pre, threshold, step.sae.bandwidth, cfg.jumprelu_ste_to_input)
        each = token_sums(values, acts)
        if cfg.jumprelu_sparsity_loss_mode == "quadratic":
            each = 2 / cfg.target_l0 * (each - cfg.target_l0) ** 2
        losses = {"l0_loss": (given.coefficients["l0"] * each).mean()}
        if cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._of_pre_acts(step, given, norms)
        return losses

    def _of_pre_acts(self, step: Step, given: Any, norms: Tensor) -> Tensor:
        """SAELens' calculate_pre_act_loss: how far dead latents are below their thresholds."""
        dead = _dead(given)
        if dead is None:
            return step.x.new_tensor(0.0)
        threshold = step.sae.threshold.to(step.x.dtype)[dead]
        below = (threshold - step.dense_pre(dead)).relu() * norms[dead]
        return step.sae.cfg.pre_act_loss_coefficient * below.sum(dim=-1).mean()


class AcceleratedTrainingSAE(Accelerated):
    """The method that overrides SAELens' own in an accelerated training SAE. Created by `accelerate`, never by hand."""

    _architecture: TopK

    def training_forward_pass(self, step_input: Any) -> Any:
        """SAELens' step: losses, latents and reconstruction of a batch, differentiable."""
        state, found = self._fast, self._begun(step_input.sae_in)
        if isinstance(found, str):
            state.count("training_forward_pass", found)
            output = super().training_forward_pass(step_input)
            if found == TOO_MANY:  # only for JumpReLU, whose latents SAELens returns dense
                self._remember(state, output.feature_acts.detach())
            return output
        state.count("training_forward_pass")
        state.back_off.after_trying(len(step_input.sae_in), None)
        return self._stepped(*found, step_input)

    def _begun(self, x: Tensor) -> tuple[Step, SparseActs] | str:
        """A step and the latents that take part in it, or why SAELens answers."""
        ready = self._look(self._fast, x)
        if isinstance(ready, str):
            return ready
        sae_in, encoder, norms = ready
        with torch.no_grad():
            chosen = self._architecture.chosen(self, self._fast, sae_in.detach(), encoder)
        if isinstance(chosen, str):
            return chosen
        return Step(self, x, sae_in, rows_of(encoder.packed_rows, weight(self, "W_enc")), norms), chosen

    def _remember(self, state: State, acts: Tensor) -> None:
        """Leave some steps to SAELens after one with too many latents."""
        if state.back_off.left:
            state.back_off.after_dense(acts)
        else:
            state.back_off.after_trying(len(acts), acts)

    def _look(self, state: State, x: Any) -> tuple[Tensor, EncoderRows, Tensor | None] | str:
        """The encoder's input and packed weights and the decoder's norms, or why SAELens answers."""
        reason = why_not_input(x) or self._why_not(x) or (TOO_MANY if state.back_off.steps_aside() else "")
        if reason:
            return reason
        if stepping_aside.is_small_encode(x, self.cfg.d_sae, stepping_aside.TRAINING_COST):
            return SMALL
        norms = None
        if self._architecture.counts_norms and self.cfg.rescale_acts_by_decoder_norm:
            if not x.is_cpu:
                return "rescale_acts_by_decoder_norm has no kernel for this device"
            norms = weight(self, "W_dec").norm(dim=-1)
        W_enc, b_enc = weight(self, "W_enc"), weight(self, "b_enc")
        options = {} if norms is None else {"gain": norms.detach()}
        prepared = pack_encoder(W_enc.detach(), b_enc.detach(), **options)
        if isinstance(prepared, str):
            return prepared
        return self.process_sae_in(x), EncoderRows(W_enc.detach().mT, b_enc.detach(), prepared=prepared), norms

    def _why_not(self, x: Tensor) -> str:
        if x.ndim != 2:
            return "a batch that is not [N, d]"
        W_enc, b_enc, W_dec, b_dec = (weight(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        reason = why_not_together(self, x, (W_enc, b_enc)) or why_not_decoder(self, W_dec, b_dec)
        reason = reason or ("mixed dtypes" if x.dtype is not self.dtype else "") or self._architecture.why_not(self)
        names = ("hook_sae_acts_pre", "hook_sae_acts_post")
        if reason or not any(is_hooked_densely(self._modules[name]) for name in names):
            own = [name for name in _METHODS if name in self.__dict__]
            return reason or (f"{own[0]} is overridden" if own else "")
        return "latents or pre-activations are hooked"

    def _stepped(self, step: Step, chosen: SparseActs, given: Any) -> Any:
        from sae_lens.saes.sae import TrainStepOutput

        architecture = self._architecture
        acts = architecture.acts(step, chosen)
        x_hat, partial = architecture.reconstructions(step, acts)
        sae_out = step.finished(self.hook_sae_recons(x_hat))
        losses = {"mse_loss": step.mse(sae_out), **architecture.aux_losses(step, acts, sae_out, partial, given)}
        output = TrainStepOutput(
            sae_in=step.x,
            sae_out=sae_out,
            feature_acts=architecture.latents(self, acts),
            hidden_pre=_pre_acts_when_used(step),
            loss=functools.reduce(torch.add, losses.values()),
            losses=losses,
        )
        architecture.finish(self, output, step, acts, partial)
        return output


def is_hooked_densely(point: Any) -> bool:
    """Whether anything listens at a hook point, including SAELens' own hooks for sparse latents."""
    from sae_lens.saes.topk_sae import SparseHookPoint

    return has_hooks(point) if type(point) is SparseHookPoint else is_hooked(point)


def _pre_acts_when_used(step: Step) -> Tensor:
    """Dense pre-activations [N, F] in SAELens' arithmetic, computed when read."""
    sae = step.sae
    weights = [weight(sae, name) for name in ("W_enc", "b_enc", "W_dec")]
    versions = [own._version for own in weights]

    def compute() -> Tensor:
        if [own._version for own in weights] != versions:
            raise RuntimeError(STALE)
        with torch.enable_grad():
            pre = step.sae_in @ weights[0] + weights[1]
            return pre if step.norms is None else pre * step.norms

    return ReadWhenUsed((len(step.x), sae.cfg.d_sae), step.x, compute)


@functools.cache
def _known() -> dict[type, TopK]:
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, topk_sae

    return {
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE: Matryoshka(),
        batchtopk_sae.BatchTopKTrainingSAE: BatchTopK(),
        topk_sae.TopKTrainingSAE: TopK(),
        jumprelu_sae.JumpReLUTrainingSAE: JumpRelu(),
    }


def _overridden(plain: type, base: type) -> Iterator[str]:
    return (name for name in _METHODS if getattr(plain, name, None) is not getattr(base, name, None))


def is_training_sae(plain: type) -> bool:
    """Whether a class is one of SAELens' training classes."""
    from sae_lens.saes.sae import TrainingSAE

    return issubclass(plain, TrainingSAE)


def training_surface(plain: type) -> tuple[type[Accelerated], dict[str, Any]]:
    """Methods and members of an accelerated class. Raises ValueError, with the reason, if it cannot be accelerated."""
    base = next((known for known in _known() if issubclass(plain, known)), None)
    why = "a training class without sparse latents, or with losses that need dense pre-activations"
    if base is not None:
        own = next(_overridden(plain, base), "")
        why = f"its {own} is not that of {base.__name__}" if own else ""
    if base is None or why:
        raise InputError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")
    lookup = classmethod(lambda cls, architecture: plain_class(cls).get_sae_class_for_architecture(architecture))
    return AcceleratedTrainingSAE, {
        "get_sae_class_for_architecture": lookup,
        "_architecture": _known()[base],
        "_library": "SAELens",
    }
