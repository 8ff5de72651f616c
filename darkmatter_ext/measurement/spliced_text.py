"""What each SAE costs the model at the tokens the page shows: KL of its next-token distribution, and the model's loss.

This follows the experiment `downstream`: Sae(x) replaces x at all measured tokens of a context at once, tokens that were
left out keep their x, the rest of the model runs, and KL(unchanged model || with Sae(x)) is taken at each measured token
that has a next token.

Shapes: C contexts of L tokens that the page shows, c of them spliced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.hook_points import block_that_ends_at
from darkmatter_ext.activations.sources import ModelSource
from darkmatter_ext.activations.splicing import Splice, SplicedModel, TokenLosses, concatenated, splice_losses
from darkmatter_ext.activations.store import CACHE_FORWARD_TOKENS, load_model
from darkmatter_ext.measurement.run import Inputs
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.progress import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SplicedText(NamedTuple):
    """What the model predicts at the kept tokens; NaN if that was not computed."""

    contexts: int  # c
    loss: Tensor  # [C, L] nats, of the unchanged model
    kl: dict[str, Tensor]  # SAE -> [C, L] nats


def why_not_spliced(inputs: Inputs, saes: Sequence[SiteSae]) -> str:
    """Why the page cannot show KL, phrased as the end of a sentence; empty if it can."""
    settings, usage = inputs.settings, inputs.resolved.usage
    inside = [sae for sae in saes if sae.ends or block_that_ends_at(sae.hook) is None]
    reasons = {
        "page_kl_tokens is 0": settings.page_kl_tokens == 0,
        "activations come from a cache, without their model": bool(settings.data.cache),
        "the model is spread over devices (device_map)": bool(settings.data.device_map),
        "TransformerLens runs the model": bool(usage.processing) or settings.data.backend == "transformer-lens",
        "only some tokens of each context are held out (split tokens)": settings.measure.split == "tokens",
        f"{inside[0].name if inside else ''} does not reconstruct the output of a block": bool(inside),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@torch.no_grad()
def spliced_text(
    inputs: Inputs,
    saes: Sequence[SiteSae],
    tokens: Tensor,
    activations: Mapping[str, Tensor],
    measured: Mapping[str, Tensor],
    stages: Stages,
) -> SplicedText | str:
    """KL at the tokens of evenly spread contexts of the page, as many as page_kl_tokens allows; or the reason for none.

    Args:
        tokens: [C, L] int64.
        activations: hook point -> [C, L, d].
        measured: hook point -> [C, L] bool; where x is replaced.

    The reason is returned, not raised: the measurement keeps its value without a KL.

    Cost: the model from each site on, at c L tokens, once plus once per SAE; the whole model is loaded unless the source
    already has it. Memory: c L d numbers for every SAE of a site, and what `splice_losses` takes.
    """
    if reason := why_not_spliced(inputs, saes):
        return reason
    wanted = max(1, min(len(tokens), inputs.settings.page_kl_tokens // tokens.shape[1]))
    chosen = torch.arange(wanted) * len(tokens) // wanted
    hooks = list(dict.fromkeys(sae.hook for sae in saes))
    loss, kl = torch.full(tokens.shape, torch.nan), {}
    try:
        with stages.stage("load the language model"):
            network = _whole_model(inputs)
        with stages.stage("KL for the page", wanted * len(hooks)) as advance:
            for hook in hooks:
                own = [sae for sae in saes if sae.hook == hook]
                layer = block_that_ends_at(hook)
                assert layer is not None  # otherwise a reason was returned
                model = SplicedModel(network, layer)
                replaced = measured[hook][chosen]
                found = _losses(inputs, model, own, tokens[chosen], activations[hook][chosen], replaced, advance)
                replaced[:, -1] = False
                loss[chosen] = loss[chosen].masked_scatter(replaced, found.cross_entropy)
                for name, values in found.kl.items():
                    empty = torch.full(tokens.shape, torch.nan)
                    empty[chosen] = empty[chosen].masked_scatter(replaced, values)
                    kl[name] = empty
    except torch.OutOfMemoryError:
        return f"the device has no memory for all of {inputs.model}"
    except InputError as error:
        return f"the model could not be spliced: {error}"
    return SplicedText(wanted, loss, kl)


def _whole_model(inputs: Inputs) -> PreTrainedModel:
    source, data = inputs.source, inputs.settings.data
    if isinstance(source, ModelSource) and source.loss:
        return source.network
    return load_model(inputs.model, device=inputs.processes.device, dtype=getattr(torch, data.dtype))


def _losses(
    inputs: Inputs,
    model: SplicedModel,
    saes: Sequence[SiteSae],
    tokens: Tensor,
    x: Tensor,
    replaced: Tensor,
    advance: Callable[[int], None],
) -> TokenLosses:
    """Losses at the replaced places of contexts [c, L]. All SAEs first reconstruct x in turn, so each is loaded once."""
    model.check_activations(tokens[:1], x[:1])
    at_once = max(1, (inputs.settings.data.forward_tokens or CACHE_FORWARD_TOKENS) // tokens.shape[1])
    parts = torch.arange(len(tokens)).split(at_once)
    counts = [int(replaced[part].sum()) for part in parts]
    x_hats = {sae.name: _reconstructed(inputs, sae, x[replaced]).split(counts) for sae in saes}
    losses = []
    for number, part in enumerate(parts):
        splices = {name: _gives(x_hat[number]) for name, x_hat in x_hats.items()}
        losses.append(splice_losses(model, tokens[part], x[part], replaced[part], splices))
        advance(len(part))
    return concatenated(losses)


def _gives(x_hat: Tensor) -> Splice:
    return lambda x: x_hat.to(x.device)


def _reconstructed(inputs: Inputs, sae: SiteSae, x: Tensor) -> Tensor:
    """Sae(x) [n, d] for x [n, d], on the CPU."""
    encode, device = sae.own, inputs.processes.device
    parts = x.split(inputs.settings.measure.batch_tokens)
    return torch.cat([encode(part.to(device, torch.float32)).x_hat.cpu() for part in parts])
