"""Adapters trained around SAEs at a site, on whole fit contexts; kept in the cache folder so that a run can resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from darkmatter_ext.activations.splicing import PlacesToSplice, Splice, SplicedModel, splice_contexts
from darkmatter_ext.measurement.stored_tokens import StoredTokens, WholeContexts
from darkmatter_ext.measurement.tokens import FIT
from darkmatter_ext.runtime.inputs import require
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import atomic_folder, cache_dir, fingerprint
from darkmatter_ext.training.adaptation import Arm, Recipe, train_adapters
from darkmatter_ext.training.low_rank import Adapter

PILOT = 4  # each learning rate is tried on every PILOT-th context


class ToAdapt(NamedTuple):
    """An adapter to train."""

    name: str
    rank: int  # 0: biases
    seed: int
    inserted: str  # name of the splice it is trained around; empty: x stays
    loss_of_text: bool = False


@dataclass(frozen=True)
class Method:
    """What all adapters of a run have in common."""

    learning_rates: tuple[float, ...]
    alpha: float = 32.0
    dropout: float = 0.0
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class AdapterTraining:
    """The training of adapters around one SAE."""

    method: Method
    model: SplicedModel
    layers: Mapping[str, nn.Module]
    splices: Mapping[str, Splice]
    identity: str  # of the SAE and the activations
    folders: dict[str, str] = field(default_factory=dict)  # name -> folder of the adapter, in peft's layout

    def train(
        self,
        wanted: Sequence[ToAdapt],
        rate: float,
        contexts: PlacesToSplice,
        stages: Stages,
        *,
        about: str,
        checkpoints: Mapping[str, Sequence[float]] | None = None,
    ) -> dict[str, Adapter]:
        """Train adapters of one seed side by side; return them by name, with copies at checkpoints as `NAME@SHARE`.

        Adapters that an earlier run trained are read from the cache folder. Checkpoints are those of `train_adapters`.
        """
        (seed,) = {own.seed for own in wanted}
        method, checkpoints = self.method, checkpoints or {}
        made = {own.name: self._start(own) for own in wanted}
        arms = {
            own.name: Arm(
                made[own.name],
                rate,
                self.splices[own.inserted] if own.inserted else None,
                replace(method.recipe, loss_of_text=own.loss_of_text),
            )
            for own in wanted
        }
        decided: dict[str, Any] = {
            "identity": self.identity, "adapters": wanted, "layers": list(self.layers), "rate": rate,
            "contexts": contexts.numbers.tolist(), "method": asdict(replace(method, learning_rates=())),
            "checkpoints": {name: list(shares) for name, shares in checkpoints.items()},
        }  # fmt: skip
        folder = cache_dir("adapters") / fingerprint(**decided)
        with stages.stage(about, len(contexts.tokens)) as advance:
            if not folder.exists():
                kept = train_adapters(
                    self.model, contexts, arms, seed=method.seed + seed, checkpoints=checkpoints, progress=advance
                )
                copies = {f"{name}@{share:g}": own[share] for name, own in kept.items() for share in own}
                with atomic_folder(folder) as part:
                    for name, adapter in (made | copies).items():
                        adapter.save(part / name, model=str(self.model.network.config.name_or_path))
        self.folders.update({name: str(folder / name) for name in made})
        names = [*made, *(f"{name}@{share:g}" for name, shares in checkpoints.items() for share in shares)]
        return {name: made[name.partition("@")[0]].copied().load(folder / name) for name in names}

    def _start(self, own: ToAdapt) -> Adapter:
        method = self.method
        seed = 1000 * method.seed + own.seed
        return Adapter(self.layers, own.rank, alpha=method.alpha, dropout=method.dropout, seed=seed)

    def best_rate(
        self, pilot: ToAdapt, contexts: PlacesToSplice, choose: WholeContexts, stages: Stages
    ) -> tuple[float, dict[str, float]]:
        """The learning rate with the lowest KL on `choose` after training on every PILOT-th context, and each rate's KL.

        A single rate is returned without a trial.
        """
        rates, found = self.method.learning_rates, {}
        if len(rates) == 1:
            return rates[0], {}
        few = PlacesToSplice(*(column[::PILOT] for column in contexts))
        for rate in rates:
            twin = replace(self, folders={})
            adapter = twin.train([pilot], rate, few, stages, about="choose the learning rate")[pilot.name]
            splice = {"on": self.splices[pilot.inserted]}
            with stages.stage("choose the learning rate"):
                tokens = splice_contexts(self.model, choose, splice, changes={"on": adapter.on})
            found[rate] = tokens.losses.kl["on"].double().mean().item()
        return min(found, key=found.__getitem__), {f"{rate:g}": kl for rate, kl in found.items()}


def fit_contexts(
    tokens: StoredTokens, adapt_tokens: int, choose_contexts: int, *, seed: int
) -> tuple[WholeContexts, WholeContexts]:
    """Contexts to train adapters on, and contexts of other fit documents (a fifth) to choose learning rates on.

    Raises InputError for less than one context, fewer than two fit documents, or more contexts than they contain.
    """
    length = tokens.cache.context_length
    count = adapt_tokens // length
    require(count >= 1, "adapt_tokens", f"must be at least a context of {length}", adapt_tokens)
    documents = tokens.documents_with(FIT).unique()
    rule = "must leave two fit documents, one to train adapters and one to choose their learning rate"
    require(len(documents) > 1, "tokens", rule, len(documents))
    order = documents[torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))]
    split = max(1, len(order) // 5)

    def sample(count: int, some: torch.Tensor, argument: str) -> WholeContexts:
        return WholeContexts.sample(tokens, count, seed=seed, role=FIT, documents=some, argument=argument)

    train = sample(count, order[split:], "adapt_tokens")
    return train, sample(choose_contexts, order[:split], "choose_contexts")
