"""`darkmatter train`: train SAEs on the activations that a run would measure, chosen by the same flags.

From settings to a source, from the source to SAEs, from SAEs to folders with complete metadata. A run keeps its state in
OUT/checkpoint and resumes from it; the SAEs are in OUT/NAME.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkmatter_ext.activations.sources import CacheSource, Source, open_cache
from darkmatter_ext.measurement.opening import opened_source, stored_activations
from darkmatter_ext.measurement.resolved import Resolved, resolve
from darkmatter_ext.measurement.run import contexts_folder
from darkmatter_ext.measurement.settings import TRAINED_HOOK, Data, Measure, Saes, Settings
from darkmatter_ext.runtime.inputs import InputError, require
from darkmatter_ext.runtime.processes import Processes
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.training.config import StreamConfig, TrainingConfig
from darkmatter_ext.training.saving import LAYOUTS, TrainedSae
from darkmatter_ext.training.train import Checkpoint, Log, train


@dataclass(frozen=True)
class TrainSettings:
    """Everything `darkmatter train` needs to know."""

    data: Data = field(default_factory=Data)
    stream: StreamConfig = field(default_factory=StreamConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    hook: str = ""
    """site, by its TransformerLens name (blocks.10.hook_resid_post)"""
    widths: tuple[int, ...] = ()
    """train one SAE of each of these widths on the same stream, instead of one of d_sae"""
    layout: str = "saelens"
    """format of the saved SAEs: saelens, or sparsify (topk only)"""
    checkpoint_seconds: float = 300.0
    """seconds between saved states"""
    log_every: int = 50
    """steps between two lines of the training log"""
    device: str = "cpu"
    """cpu or cuda"""

    def __post_init__(self) -> None:
        require(self.layout in LAYOUTS, "layout", f"must be {' or '.join(LAYOUTS)}", repr(self.layout))
        if self.layout == "sparsify" and self.training.architecture != "topk":
            raise InputError(f"layout: must be saelens for a {self.training.architecture} SAE, got 'sparsify'")
        require(self.data.positions == "auto", "positions", "must be left out, see drop_positions", self.data.positions)
        _ = self.configs, self.inputs  # each checks its values

    @property
    def configs(self) -> list[TrainingConfig]:
        """One configuration per SAE."""
        return [dataclasses.replace(self.training, d_sae=width) for width in self.widths] or [self.training]

    @property
    def inputs(self) -> Settings:
        """The activations, as settings of a run."""
        narrowest = min(config.d_sae for config in self.configs)
        saes = Saes(hook="" if self.data.cache else self.hook, widths=(narrowest,), k=self.training.k)
        return _Inputs(self.data, saes, Measure(seed=self.training.seed), self.device)


class _Inputs(Settings):
    """Settings whose SAEs are trained on everything that is read, whatever the source."""

    def check_stored(self) -> None:
        """Nothing is measured afterwards, so stored activations or tokens will do."""


def plan(settings: TrainSettings) -> list[str]:
    """Describe what a run would do."""
    found, first = _resolved(settings), settings.training
    tokens = first.steps * first.batch_size
    source = settings.data.stored or ("dataset" if settings.data.dataset else "text")
    lines = [f"read      {found.model} at {found.trained[0]}, {settings.data.tokens} tokens from {source}"]
    lines += [
        f"train     {name(config)}: {config.d_sae} latents, k {config.k}, {config.steps} steps, {tokens} tokens"
        for config in settings.configs
    ]
    share = settings.stream.held_out_share
    return [*lines, f"hold out  {share:.0%} of the text, its end", f"seed      {first.seed}"]


def name(config: TrainingConfig) -> str:
    """The name of an SAE's folder."""
    return f"{config.architecture}-{config.d_sae}"


def train_on_text(settings: TrainSettings, out: Path, own: Processes, stages: Stages, log: Log) -> list[TrainedSae]:
    """Train and save in OUT/NAME. If killed, the same call resumes from OUT/checkpoint.

    Raises InputError, StateError and OSError as `train` does.
    """
    found = _resolved(settings)
    source = _source(found, own, stages)
    configs = settings.configs
    with stages.stage("train", max(config.steps for config in configs)) as advance:
        trained = train(
            source,
            configs,
            stream=settings.stream,
            hook=found.trained[0],
            excluded_tokens=found.excluded,
            metadata=_metadata(found),
            checkpoint=Checkpoint(out / "checkpoint", settings.checkpoint_seconds),
            device=own.device,
            log_every=settings.log_every,
            log=log,
            progress=advance,
        )
    for sae in trained if own.is_first else ():
        sae.save(out / name(sae.config), settings.layout)
    return trained


def _resolved(settings: TrainSettings) -> Resolved:
    hook = settings.hook
    if settings.data.cache and not hook:
        hooks = list(open_cache(settings.data.cache).widths)
        require(len(hooks) == 1, "hook", f"must be one of {', '.join(hooks)}", "none")
        hook = hooks[0]
    return resolve(settings.inputs, train_at=[hook or TRAINED_HOOK])


def _source(found: Resolved, own: Processes, stages: Stages) -> Source:
    if found.settings.data.store and not found.settings.data.stored:
        require(own.size == 1, "torchrun", "must be used with a stream, or a cache made before", "store")
        return CacheSource(stored_activations(found, stages))
    return opened_source(found, contexts_folder(found), own, stages)


def _metadata(found: Resolved) -> dict[str, Any]:
    """Under SAELens' names, everything that a user of the SAE must do the way it was done here."""
    data, usage = found.settings.data, found.usage
    said: dict[str, Any] = {"hook_name": found.trained[0]}
    if data.cache:
        return said
    said |= {"model_name": found.model, "context_size": usage.context_length}
    if not data.tokenised:
        said["prepend_bos"] = usage.bos
    if data.dataset or data.tokenised:
        said["dataset_path"] = data.dataset or data.tokenised
    if found.excluded:
        said["exclude_special_tokens"] = list(found.excluded)
    return said
