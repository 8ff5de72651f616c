"""`dm.train`: train SAEs on activations in memory, a store, or a model reading text.

The training text is read once for all given SAEs. A run with a checkpoint folder can be killed at any moment and resumed
with bit-identical results. Under torchrun every process reads the stream and steps on its part of each batch; gradients
are summed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from darkmatter_ext.activations.sources import Source
from darkmatter_ext.runtime.checkpoint import CheckpointFolder
from darkmatter_ext.runtime.inputs import InputError, require, require_at_least
from darkmatter_ext.runtime.processes import Processes, processes
from darkmatter_ext.training.batches import Batches, SourceTokens, TensorTokens, Tokens, no_batch
from darkmatter_ext.training.config import StreamConfig, TrainingConfig
from darkmatter_ext.training.evaluation import evaluated
from darkmatter_ext.training.saving import TrainedSae, as_sae_lens
from darkmatter_ext.training.seeds import generator
from darkmatter_ext.training.trainer import MakeScheduler, SaeTrainer, StepReport

Log = Callable[[list[dict[str, float]]], None]
DEFAULT_STREAM = StreamConfig()
ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Checkpoint:
    """Where a run saves its state, and how often."""

    folder: Path
    seconds: float = 300.0
    """between two saved states"""


@overload
def train(source: Tensor | Source, config: TrainingConfig, **options: Any) -> TrainedSae: ...
@overload
def train(source: Tensor | Source, config: Sequence[TrainingConfig], **options: Any) -> list[TrainedSae]: ...
@torch.no_grad()
def train(  # pyright: ignore[reportInconsistentOverload]  (the options are listed once, here)
    source: Tensor | Source,
    config: TrainingConfig | Sequence[TrainingConfig],
    *,
    stream: StreamConfig = DEFAULT_STREAM,
    hook: str = "",
    excluded_tokens: Collection[int] = (),
    metadata: Mapping[str, Any] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    scheduler: MakeScheduler | None = None,
    device: str | torch.device | None = None,
    log_every: int = 50,
    log: Log | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainedSae | list[TrainedSae]:
    """Train one SAE, or several on one stream of activations.

    Args:
        source: activations [n, d] in memory, or a Source: a model reading text, or a store of activations.
        config: for one SAE, or for several with the same batch_size; the first one's seed orders the tokens.
        stream: which tokens are trained on and which are held out.
        hook: the hook point, if the source has several.
        excluded_tokens: ids of tokens to leave out of a source.
        metadata: stored in the SAE's configuration under SAELens' names (model_name, hook_name, prepend_bos, ...).
        checkpoint: folder for the run's state; repeating the same call resumes from it, with bit-identical results.
        scheduler: makes a torch learning-rate scheduler from the optimiser, replacing the configured one; its
            rates must depend only on the number of steps.
        device: to train on; default: the device of a tensor source, else cpu.
        log_every: steps between two entries of the history.
        log: called with the entries: sae (its number), step, loss, fvu, l0, dead_share, learning_rate, tokens_a_second.
        progress: called with the number of steps done since its last call.

    Returns:
        TrainedSae: `.sae` (a SAELens object, float32), `.report`, `.history`, `.save(FOLDER)`; a list if config is a list.

    Raises:
        InputError: the source holds no full batch or is not finite, settings do not fit, or training diverged; one line.
        StateError: a damaged store or checkpoint. OSError: a checkpoint cannot be written; the last good one stays.

    Cost: each step is an exact encode (no [N, F] array), sums over the active latents, and Adam over 2 F d weights.
    Memory: the weights, their gradients, two moments, and the packed encoder; while few latents are dead (at most 12
    `aux_k`), two arrays of tokens by dead latents.
    """
    configs = [config] if isinstance(config, TrainingConfig) else list(config)
    _check(configs, log_every)
    tokens = _tokens(source, hook, stream, excluded_tokens, configs[0])
    device = device or (source.device if isinstance(source, Tensor) else "cpu")
    if isinstance(checkpoint, str | Path):
        checkpoint = Checkpoint(Path(checkpoint))
    with processes(str(device)) as own, _in_use(checkpoint, own):
        run = _Run.start(configs, tokens, stream, own, scheduler)
        run.resume(checkpoint)
        run.to_the_end(checkpoint, log_every, log, progress)
        found = run.finished(stream, metadata or {})
    return found[0] if isinstance(config, TrainingConfig) else found


def _in_use(checkpoint: Checkpoint | None, own: Processes) -> AbstractContextManager[None]:
    return CheckpointFolder(checkpoint.folder).in_use() if checkpoint and own.is_first else nullcontext()


def _check(configs: Sequence[TrainingConfig], log_every: int) -> None:
    require(bool(configs), "config", "must name at least one SAE", "none")
    sizes = sorted({config.batch_size for config in configs})
    require(len(sizes) == 1, "batch_size", "must be the same for all SAEs of a stream", sizes)
    require_at_least("log_every", 1, log_every)


def _tokens(
    source: Tensor | Source, hook: str, stream: StreamConfig, excluded: Collection[int], config: TrainingConfig
) -> Tokens:
    if isinstance(source, Tensor):
        tokens: Tokens = TensorTokens(source, stream)
    else:
        require_at_least("buffer_tokens", config.batch_size, stream.buffer_tokens)
        tokens = SourceTokens(source, hook, stream, excluded)
    if tokens.n_tokens < config.batch_size:
        raise no_batch(config.batch_size, tokens.n_tokens)
    return tokens


def _mean_and_scale(x: Tensor) -> tuple[Tensor, float]:
    """Mean [d] of x [n, d], float32, and the root of the variance averaged over dimensions; float64 sums, no copy of x."""
    parts = x.split(ROWS_AT_A_TIME)
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / len(x)
    squares = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
    return mean.float(), (squares / x.numel()).sqrt().item()


@dataclass
class _Run:
    """SAEs being trained on one stream."""

    trainers: list[SaeTrainer]
    batches: Batches
    tokens: Tokens
    scale: float  # divides the activations
    sample: Tensor  # [n, d] of the training text, for evaluation
    identity: dict[str, Any]  # everything the result depends on
    own: Processes
    histories: list[list[dict[str, float]]]
    losses: list[float]  # of the last step examined
    step: int = 0

    @classmethod
    def start(
        cls,
        configs: Sequence[TrainingConfig],
        tokens: Tokens,
        stream: StreamConfig,
        own: Processes,
        scheduler: MakeScheduler | None,
    ) -> _Run:
        seed = configs[0].seed
        require_at_least("batch_size", own.size, configs[0].batch_size)
        batches = Batches(tokens, configs[0].batch_size, seed)
        first = batches.piece  # it also decides which norms are too large, so it is always read first
        mean, scale = _mean_and_scale(first)
        drawn = torch.randperm(len(first), generator=generator("sample", seed))[: stream.evaluation_tokens]
        require(0 < scale < float("inf"), "source", "must be finite and vary", f"a standard deviation of {scale}")
        identity = {
            "configs": [dataclasses.asdict(config) for config in configs],
            "stream": dataclasses.asdict(stream),
            "source": tokens.identity,
        }
        mean = (mean / scale).to(own.device)
        trainers = [SaeTrainer(config, mean, scheduler, own) for config in configs]
        sample = first[drawn.to(first.device)]
        return cls(
            trainers, batches, tokens, scale, sample, identity, own, [[] for _ in configs], [math.nan] * len(configs)
        )

    @property
    def n_steps(self) -> int:
        return max(trainer.config.steps for trainer in self.trainers)

    # ---- checkpoints

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Claim the folder, and resume from the state in it."""
        if checkpoint is None:
            return
        folder = CheckpointFolder(checkpoint.folder)
        for turn in (self.own.is_first, not self.own.is_first):  # one claims it, the others find it claimed
            if turn:
                folder.start(self.identity)
            self.own.wait()
        if (found := folder.load()) is None:
            return
        tensors, state = found
        for number, trainer in enumerate(self.trainers):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            trainer.restore(own, state["steps_done"][number])
        self.step, self.batches.position = state["step"], list(state["position"])
        self.histories, self.losses = state["histories"], state["losses"]

    def save(self, checkpoint: Checkpoint) -> None:
        tensors = {
            f"{number}.{name}": tensor
            for number, trainer in enumerate(self.trainers)
            for name, tensor in trainer.state().items()
        }
        state = {
            "step": self.step,
            "steps_done": [trainer.steps_done for trainer in self.trainers],
            "position": self.batches.position,
            "histories": self.histories,
            "losses": self.losses,
        }
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise self._diverged(self.trainers[0])  # in this very step: the loss was still finite
        CheckpointFolder(checkpoint.folder).save(tensors, state)

    # ---- the loop

    def to_the_end(
        self,
        checkpoint: Checkpoint | None,
        log_every: int,
        log: Log | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        saved = looked = time.monotonic()
        looked_at = self.step
        if progress is not None and self.step:
            progress(self.step)
        while self.step < self.n_steps:
            reports, x = self._one_step()
            last = self.step == self.n_steps
            if progress is not None:
                progress(1)
            due = [
                number
                for number, trainer in enumerate(self.trainers)
                if reports[number] and (self.step % log_every == 0 or self.step == trainer.config.steps)
            ]
            if due:
                self._check_losses(reports)
                now = time.monotonic()
                rate = (self.step - looked_at) * len(x) / max(now - looked, 1e-9)
                looked, looked_at = now, self.step
                self._log({number: reports[number] for number in due}, x, rate, log)
            if (
                checkpoint is not None
                and self.own.is_first
                and (last or time.monotonic() - saved >= checkpoint.seconds)
            ):
                self._check_losses(reports)  # a diverged state must not replace a good one
                self.save(checkpoint)
                saved = time.monotonic()

    def _one_step(self) -> tuple[list[StepReport | None], Tensor]:
        """One step of every SAE that is not done; returns the batch in training units."""
        x = self.batches.next().to(self.own.device).float() / self.scale
        part = x.tensor_split(self.own.size)[self.own.rank]
        reports: list[StepReport | None] = []
        for trainer in self.trainers:
            if trainer.steps_done == trainer.config.steps:
                reports.append(None)
                continue
            try:
                reports.append(trainer.step(part))
            except InputError:  # the ops reject NaN in weights
                raise self._diverged(trainer) from None
        self.step += 1
        return reports, x

    def _diverged(self, trainer: SaeTrainer) -> InputError:
        rate = trainer.config.learning_rate
        return InputError(f"learning_rate: must be lower, training diverged before step {self.step + 1}, got {rate}")

    def _check_losses(self, reports: Sequence[StepReport | None]) -> None:
        for number, (trainer, report) in enumerate(zip(self.trainers, reports, strict=True)):
            if report is not None:
                self.losses[number] = report.loss.item()
                if not math.isfinite(self.losses[number]):
                    raise self._diverged(trainer)

    def _log(self, due: Mapping[int, StepReport | None], x: Tensor, rate: float, log: Log | None) -> None:
        variance = (x - x.mean(0)).square().mean()
        entries = []
        for number, report in due.items():
            trainer = self.trainers[number]
            assert report is not None
            entry = {
                "step": trainer.steps_done,
                "loss": self.losses[number],
                "fvu": (report.mse / variance).item(),
                "l0": report.l0.item(),
                "dead_share": len(trainer.dead()) / trainer.config.d_sae,
                "learning_rate": trainer.learning_rate,
            }
            self.histories[number].append(entry)
            entries.append({"sae": number, **entry, "tokens_a_second": rate})
        if log is not None:
            log(entries)

    # ---- the end

    def finished(self, stream: StreamConfig, metadata: Mapping[str, Any]) -> list[TrainedSae]:
        """The SAEs, evaluated on training text and on held-out text."""
        size = self.trainers[0].config.batch_size
        texts = {"train": iter([self.sample]), "held_out": self.tokens.held_out()}
        reports = [
            {"loss": loss, "dead_share": len(trainer.dead()) / trainer.config.d_sae}
            for trainer, loss in zip(self.trainers, self.losses, strict=True)
        ]
        for text, batches in texts.items():
            found = evaluated(self.trainers, batches, self.scale, at_most=stream.evaluation_tokens, batch_size=size)
            for report, numbers in zip(reports, found, strict=True):
                report |= {f"{text}/{name}": value for name, value in numbers.items()}
        return [
            TrainedSae(as_sae_lens(trainer, self.scale, metadata), trainer.config, report, history)
            for trainer, report, history in zip(self.trainers, reports, self.histories, strict=True)
        ]
