"""What the latents that only the second of two models has do: removed from it, added, put into the first's activations.

Each is compared with a latent that both models share, drawn from those nearest in frequency and size.

Shapes: n tokens, d width of both models, F latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from darkmatter_ext.activations.splicing import PlacesToSplice, SplicedModel, SplicedTokens, Splices, splice_contexts
from darkmatter_ext.estimators.intervals import ratio, share_by, sums_by
from darkmatter_ext.measurement.model_pairs import PairModels, Trained
from darkmatter_ext.measurement.paired_tokens import PairedTokens
from darkmatter_ext.measurement.stored_tokens import WholeContexts
from darkmatter_ext.runtime.inputs import require
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.crosscoder import halves, matched_latents, relative_norm, written

STEERING = 0.9  # the quantile of a latent's active values that is added
EFFECTS = ("remove", "steer")
STATES = {  # what replaces the variant's activations, besides the single latents
    "b": "the variant",
    "a": "with the model's activations",
    "ablated/b_only": "without its own latents",
    "ablated/random": "without matched shared latents",
    "added/b_only": "the model's activations with its own latents",
    "added/random": "the model's activations with matched ones",
}


@dataclass(frozen=True)
class Intervention:
    """Latents only the variant has, and as many shared ones of the same frequency and size."""

    own: Trained
    pair: PairedTokens
    chosen: Tensor  # [m] all that only the variant has, those that write most first
    matched: Tensor  # [m]
    steering: Tensor  # [F] quantile STEERING of the active values
    found: bool  # whether they belong to the variant alone; otherwise they are those that come nearest
    single: int  # how many are removed and added one at a time

    @classmethod
    def of(cls, own: Trained, pair: PairedTokens, v: Tensor, *, single: int, seed: int) -> Intervention:
        """Choose them from fit tokens v [n, 2 d]; `single`: how many are removed and added one at a time.

        Raises InputError if the crosscoder has no shared latents to compare with.
        """
        sums, kinds = own.sums, own.kinds
        rho = relative_norm(sums.W_dec)
        chosen = kinds.second_by_scaling.nonzero().flatten()
        found = len(chosen) > 0
        if not found:
            chosen = rho.masked_fill(~kinds.used, -1).topk(single).indices
        size = sums.total / sums.count.clamp(min=1) * halves(sums.W_dec)[1].norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        features = torch.stack([sums.count.clamp(min=1).log(), size.clamp(min=tiny).log()], dim=1)
        chosen = chosen[(sums.square[chosen] * halves(sums.W_dec)[1][chosen].square().sum(1)).argsort(descending=True)]
        taken = torch.isin(torch.arange(len(rho), device=chosen.device), chosen)
        shared = kinds.shared & ~taken & ~kinds.first_by_scaling
        others = (shared if bool(shared.any()) else kinds.used & ~taken).nonzero().flatten()
        require(len(others) > 0, "steps", "must be enough for latents to compare with", "none")
        matched = matched_latents(chosen, others, features, seed=seed)
        steering = torch.zeros(len(rho), dtype=torch.float64, device=rho.device)
        alone = torch.cat([chosen[:single], matched[:single]])
        values = torch.cat([acts.dense_columns(alone).double() for acts, _ in own.sae.batches(v)])
        for latent, active in zip(alone, values.unbind(1), strict=True):
            steering[latent] = active[active > 0].quantile(STEERING) if bool((active > 0).any()) else 0.0
        return cls(own, pair, chosen, matched, steering, found, single)

    def splices(self, x_first: Tensor, x_second: Tensor) -> Splices:
        """What replaces the variant's activations [n, d], given those of both models at the same tokens."""
        acts, scale = self.own.sae.encode(self.pair.scaled(x_first, x_second)).acts, self.pair.scales[1]
        rows = halves(self.own.sums.W_dec)[1].contiguous()

        def writes(latents: Tensor) -> Tensor:
            return scale * written(acts, rows, torch.zeros(len(rows), device=rows.device).index_fill(0, latents, 1))

        given = {"a": x_first}
        for name, latents in (("b_only", self.chosen), ("random", self.matched)):
            given |= {f"ablated/{name}": x_second - writes(latents), f"added/{name}": x_first + writes(latents)}
            for number, latent in enumerate(latents[: self.single]):
                push = scale * self.steering[latent] * rows[latent].double()
                given[f"remove/{name}/{number}"] = x_second - writes(latent[None])
                given[f"steer/{name}/{number}"] = x_second + push.to(x_second.dtype)
        return {name: lambda _x, own=own: own for name, own in given.items()}


@torch.no_grad()
def spliced(
    intervention: Intervention, contexts: WholeContexts, models: PairModels, stages: Stages, *, device: str
) -> SplicedTokens:
    """Run the second model with every splice, at the held-out tokens of some of its contexts."""
    pair = intervention.pair
    first = torch.cat([batch.x for batch in dataclasses.replace(contexts, tokens=pair.first)])

    def splices(batch: PlacesToSplice) -> Splices:
        x = first[torch.searchsorted(contexts.numbers, batch.numbers)]
        both = (own[batch.replaced].to(device) for own in (x, batch.x))
        return intervention.splices(*both)

    with stages.stage("load the variant"):
        model = SplicedModel.load(models.second, models.hook, device=device)
    with stages.stage("splice into the variant", len(contexts)) as advance:
        return splice_contexts(model, contexts, splices, progress=advance)


def effect_numbers(tokens: SplicedTokens, names: Tensor, *, seed: int) -> dict[str, float]:
    """KL of every splice, means over each kind of latent, their ratio to the matched latents' KL; names [n] are documents."""
    kl, ones = {name: own.double() for name, own in tokens.losses.kl.items()}, torch.ones(len(names)).double()
    for effect in EFFECTS:
        for kind in ("b_only", "random"):
            every = [own for name, own in kl.items() if name.startswith(f"{effect}/{kind}/")]
            kl[f"{effect}/{kind}"] = torch.stack(every).mean(0)
    numbers: dict[str, float] = {}
    for name, own in kl.items():
        mean = share_by(names, own, ones, seed=seed)
        numbers |= mean.numbers(f"causal/{name}/kl")
    for effect in ("ablated", *EFFECTS):
        times = ratio(sums_by(names, kl[f"{effect}/b_only"], kl[f"{effect}/random"]))
        numbers |= times.numbers(f"causal/{effect}/kl_ratio")
    return numbers


def behaviour_numbers(tokens: SplicedTokens, triggers: Tensor, names: Tensor, *, seed: int) -> dict[str, float]:
    """Probability of the phrase's first token at triggers [n] bool in every state, and of the next token everywhere else.

    Intervals are over `names` [n]: the document of each token.

    The text has the phrase after every marker, so this is exp(-cross-entropy) there. Everywhere else is the control: the
    labels differ, and nothing that carries the phrase should matter.
    """
    probability = {"b": (-tokens.losses.cross_entropy.double()).exp()}
    probability |= {name: (-tokens.losses.spliced[name].double()).exp() for name in list(STATES)[1:]}
    numbers: dict[str, float] = {}
    for where, chosen in (("behaviour", triggers.double()), ("elsewhere", (~triggers).double())):
        for name, own in probability.items():
            mean = share_by(names, own * chosen, chosen, seed=seed)
            numbers |= mean.numbers(f"{where}/{name}")
    return numbers
