"""A training step beside SAELens' trainer and EleutherAI sparsify's: same weights at the start, same batches, one process.

    python benchmarks/training.py [--architectures topk jumprelu] [--shapes 0 1] [--rounds 5] [--threads 1] [--out FILE]
    python benchmarks/training.py --architectures topk batchtopk --dead 0 300      so many latents are dead
    python benchmarks/training.py memory              peak memory, each participant in a process of its own

A step is everything from a batch to changed weights: SAELens' SAETrainer.step (on
its own SAE, and on an accelerated one), sparsify's SparseCoder with what its
trainer does around it (fvu, gradient along decoder rows removed, Adam, unit rows), ours. Participants take turns; the
table has medians of wall time and of processor time, and how far the losses are apart. On a busy machine only processor
time with --threads 1 means anything: it counts no waiting.

Dead latents take part in each one's own auxiliary loss. These are not the same: SAELens' is not divided by the variance of
the error, its b_dec gets a gradient too; sparsify's trains the decoder alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory import settled_rss, status
from rich.console import Console
from rich.table import Table
from run import cpu_name
from torch import Tensor

import darkmatter_ext as dm
from darkmatter_ext.report.result import provenance
from darkmatter_ext.runtime.storage import atomic_file
from darkmatter_ext.training.trainer import SaeTrainer

SHAPES = [(2048, 576, 4096, 32), (4096, 768, 8192, 64), (2048, 768, 24576, 32)]  # N, d, F, k
ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
LEARNING_RATE = 1e-3
NEVER = 1 << 40  # tokens
L0_COEFFICIENT = 1e-3  # JumpReLU's, against the mean squared error
Step = Callable[[Tensor], float]  # a batch -> its mean squared error, weights changed


@dataclass
class Case:
    """A shape, an architecture, batches."""

    shape: tuple[int, int, int, int]
    architecture: str
    dead: int = 0  # latents that never fire and are counted as dead at every step

    @property
    def label(self) -> str:
        dead = f", {self.dead} dead" if self.dead else ""
        return f"{self.architecture} {'x'.join(map(str, self.shape[:3]))} k{self.shape[3]}{dead}"

    @property
    def config(self) -> dm.TrainingConfig:
        n, _, n_latents, k = self.shape
        return dm.TrainingConfig(
            d_sae=n_latents, k=k, architecture=self.architecture, batch_size=n, learning_rate=LEARNING_RATE,
            schedule="constant", warmup_steps=0, l0_penalty="count", l0_coefficient=L0_COEFFICIENT,
            threshold_rate=1.0,  # as SAELens
            dead_after_tokens=NEVER,  # dead are those that are said to be
        )  # fmt: skip

    def batch(self, number: int) -> Tensor:
        """Sums of 48 directions and noise, of variance 1: [N, d]."""
        n, d, n_latents, _ = self.shape
        fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + number)
        directions = torch.nn.functional.normalize(torch.randn(n_latents, d, generator=fixed), dim=1)
        chosen = torch.randint(n_latents, (n, 48), generator=own)
        strength = 2 + 2 * torch.randn(n, 48, generator=own).abs()
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        x += 0.05 * torch.randn(n, d, generator=own)
        return x / (48 * 14 / d) ** 0.5  # 14: the mean square of a strength, about

    def ours(self, **options: Any) -> SaeTrainer:
        config = self.config
        trainer = SaeTrainer(type(config)(**{**vars(config), **options}), self.batch(0).mean(0))
        trainer.weights["W_enc"][: self.dead] *= 1e-3
        return trainer

    def our_step(self, **options: Any) -> Step:
        trainer = self.ours(**options)

        def step(x: Tensor) -> float:
            trainer.silent_tokens[: self.dead] = NEVER
            found = float(trainer.step(x).mse)
            assert len(trainer.dead()) == self.dead  # none has fired
            return found

        return step

    def participants(self) -> dict[str, Step]:
        """Ours twice, each with the rules of the peer after it: unit rows, or free ones and SAELens' clipping."""
        found = {
            "ours, free rows": self.our_step(decoder_norm="free", max_gradient_norm=1 / self.shape[1]),
            "sae_lens": sae_lens_step(self),
            "sae_lens, accelerated": sae_lens_step(self, accelerated=True),
        }
        if self.architecture == "topk":
            found |= {"ours, unit rows": self.our_step(), "sparsify": sparsify_step(self)}
        return found


def sae_lens_step(case: Case, *, accelerated: bool = False) -> Step:
    """SAELens' own trainer, on its own SAE or an accelerated one. Its loss is the sum over d: coefficients are d times ours."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    n, d, n_latents, k = case.shape
    options: dict[str, Any] = {"k": k, "rescale_acts_by_decoder_norm": False}
    if case.architecture == "jumprelu":
        options = {"jumprelu_bandwidth": case.config.bandwidth, "l0_coefficient": L0_COEFFICIENT * d}
    sae_class, cfg_class = get_sae_training_class(case.architecture)
    sae: Any = sae_class(cfg_class(d_in=d, d_sae=n_latents, apply_b_dec_to_input=True, **options))
    weights = case.ours().weights
    sae.W_enc.data, sae.W_dec.data = weights["W_enc"].mT.contiguous(), weights["W_dec"].clone()
    sae.b_dec.data = weights["b_dec"].clone()
    if case.architecture == "jumprelu":
        sae.threshold.data.fill_(start_threshold(case))
    if accelerated:
        dm.accelerate(sae)
    config = SAETrainerConfig(
        total_training_samples=1000 * n, train_batch_size_samples=n, lr=LEARNING_RATE, lr_end=LEARNING_RATE
    )
    trainer: Any = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> float:
        trainer.n_forward_passes_since_fired[: case.dead] = config.dead_feature_window + 1
        return trainer.step(x).losses["mse_loss"].item() / d

    return step


def start_threshold(case: Case) -> float:
    """Where ours starts JumpReLU's threshold."""
    trainer, x = case.ours(learning_rate=1e-30), case.batch(0)
    trainer.step(x)
    return float(trainer.weights["threshold"].max())


def sparsify_step(case: Case) -> Step:
    """sparsify's SparseCoder in a training step: its loss is the FVU of the batch."""
    from sparsify import SparseCoder, SparseCoderConfig

    _, d, n_latents, k = case.shape
    weights = case.ours().weights
    sae = SparseCoder(d, SparseCoderConfig(num_latents=n_latents, k=k))
    sae.encoder.weight.data, sae.b_dec.data = weights["W_enc"].clone(), weights["b_dec"].clone()
    assert sae.W_dec is not None
    sae.W_dec.data = weights["W_dec"].clone()
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    dead = torch.arange(n_latents) < case.dead

    def step(x: Tensor) -> float:
        out = sae(x, dead_mask=dead if case.dead else None)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        sae.set_decoder_norm_to_unit_norm()
        return (out.fvu.detach() * (x - x.mean(0)).square().mean()).item()

    return step


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Each participant a step a round, in turn, on the same batch; the first round is warm-up."""
    participants = case.participants()
    wall: dict[str, list[float]] = {name: [] for name in participants}
    processor: dict[str, list[float]] = {name: [] for name in participants}
    losses: dict[str, list[float]] = {name: [] for name in participants}
    for number in range(rounds + 1):
        x = case.batch(number)
        gc.collect()
        for name, step in participants.items():
            start, used = time.perf_counter(), time.process_time()
            losses[name].append(step(x))
            wall[name].append(1e3 * (time.perf_counter() - start))
            processor[name].append(1e3 * (time.process_time() - used))
    return {
        "case": case.label,
        "wall_ms": {name: statistics.median(times[1:]) for name, times in wall.items()},
        "processor_ms": {name: statistics.median(times[1:]) for name, times in processor.items()},
        "losses": losses,
    }


PAIRS = (  # the same rules
    ("ours, free rows", "sae_lens"),
    ("sae_lens, accelerated", "sae_lens"),
    ("ours, unit rows", "sparsify"),
)


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """One a pair of ours and a peer."""
    rows = []
    for ours, peer in PAIRS:
        if ours not in found["wall_ms"]:
            continue
        apart = max(abs(a - b) / b for a, b in zip(found["losses"][ours], found["losses"][peer], strict=True))
        cells = [found["case"], ours, peer]
        for clock in ("wall_ms", "processor_ms"):
            own, other = found[clock][ours], found[clock][peer]
            cells += [f"{own:.0f}", f"{other:.0f}", f"{other / own:.2f}"]
        rows.append((*cells, f"{apart:.1e}"))
    return rows


def peak(case: Case, name: str) -> tuple[float, float]:
    """MB: of weights, moments and all that a second step adds at its peak; of weights and moments alone."""
    x = case.batch(0)
    before = settled_rss()
    step = _one(case, name)
    step(x)
    kept = settled_rss() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(x)
    return status("VmHWM") - before, kept


def _one(case: Case, name: str) -> Step:
    if name.startswith("sae_lens"):
        return sae_lens_step(case, accelerated=name != "sae_lens")
    if name == "sparsify":
        return sparsify_step(case)
    return case.our_step()


def memory(cases: list[Case]) -> None:
    """A table of peaks."""
    table = Table("case", "participant", "peak of a step, MB", "kept between steps, MB")
    for case in cases:
        label = case.label
        for name in (
            "ours",
            "sae_lens",
            "sae_lens, accelerated",
            *(["sparsify"] if case.architecture == "topk" else []),
        ):
            given = [case.architecture, str(SHAPES.index(case.shape)), str(case.dead), name]
            arguments = [sys.executable, __file__, "peak", *given]
            out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
            table.add_row(label, name, *(f"{value:.0f}" for value in json.loads(out.splitlines()[-1])))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="time", choices=("time", "memory"))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--shapes", nargs="+", type=int, default=list(range(len(SHAPES))), help=f"of {SHAPES}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dead", nargs="+", type=int, default=[0], help="dead latents")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if any(arguments.dead) and "jumprelu" in arguments.architectures:
        parser.error("--dead: SAELens' JumpReLU has no auxiliary loss; give --architectures topk batchtopk")
    torch.set_num_threads(arguments.threads)
    cases = [
        Case(SHAPES[shape], name, dead)
        for shape in arguments.shapes
        for name in arguments.architectures
        for dead in arguments.dead
    ]
    if arguments.what == "memory":
        memory(cases)
        return
    about, found = provenance("cpu"), []
    headings = [
        "case",
        "ours",
        "peer",
        "ours, ms",
        "peer, ms",
        "ratio",
        "ours, cpu ms",
        "peer, cpu ms",
        "ratio",
        "losses apart",
    ]
    table = Table(*headings, title=f"{cpu_name()}, {arguments.threads} threads")
    for case in cases:
        found.append(measure(case, arguments.rounds))
        for row in _rows(found[-1]):
            table.add_row(*row)
            print("  ".join(row), file=sys.stderr, flush=True)
    Console(width=170).print(table)
    if arguments.out is not None:
        content = {"cpu": cpu_name(), "threads": arguments.threads, "provenance": about, "cases": found}
        with atomic_file(arguments.out) as part:
            part.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["peak"]:
        architecture, shape, dead, participant = sys.argv[2:]
        print(json.dumps(peak(Case(SHAPES[int(shape)], architecture, int(dead)), participant)))
    else:
        main()
