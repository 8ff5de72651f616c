"""Many SAEs in one pass: cost against SAEs, tokens and width, memory against tokens, and the released procedure beside it.

    python benchmarks/one_pass.py saes               # demo model: 1, 2, 4, 8 SAEs in one pass
    python benchmarks/one_pass.py memory             # peak memory at 1x, 4x, 16x tokens, each in a process of its own
    python benchmarks/one_pass.py widths             # stored activations: one SAE of 2048 to 32768 latents
    python benchmarks/one_pass.py released --tokens 131072   # the released procedure in plain torch, and ours, same data
    python benchmarks/one_pass.py million            # a million stored tokens, four SAEs of 8192 latents

Two threads. Every command prints one JSON line a row; docs/scaling.md has the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darkmatter_ext.activations.contexts import text_rows, write_contexts
from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL
from darkmatter_ext.activations.sources import CacheSource, ModelSource, Source
from darkmatter_ext.activations.store import ActivationCache, _write_shard, load_tokenizer
from darkmatter_ext.activations.text import documents
from darkmatter_ext.measurement.engine import measure
from darkmatter_ext.measurement.measurement import SiteMeasurement
from darkmatter_ext.measurement.presets import DEMO
from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.settings import Measure, replaced
from darkmatter_ext.measurement.tokens import FIT, TokenRoles
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import cache_dir
from darkmatter_ext.saes.encoders import Encoder, as_encoder

HOOK, D, K = "blocks.10.hook_resid_post", 576, 32
LENGTH = 256
FEATURES = 48  # directions that make up a stored activation, as an SAE's input is made


def _report(**row: Any) -> None:
    print(json.dumps(row), flush=True)


class Seconds(NamedTuple):
    """Of the clock, and of the processor over all threads: the second hardly depends on what else the machine does."""

    wall: float
    cpu: float


def _timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return Seconds(round(time.perf_counter() - wall, 2), round(time.process_time() - cpu, 2)), value


def _median(taken: Sequence[Seconds]) -> Seconds:
    return Seconds(statistics.median(own.wall for own in taken), statistics.median(own.cpu for own in taken))


def _row(seconds: Seconds, **row: Any) -> None:
    _report(**row, wall_s=seconds.wall, cpu_s=seconds.cpu)


def _settings(**changes: Any) -> Measure:
    return dataclasses.replace(Measure(passes=1, products="float32", table_contexts=0), **changes)


def _measure(source: Source, saes: Sequence[Encoder], settings: Measure) -> dict[str, SiteMeasurement]:
    folder = Path(tempfile.mkdtemp())
    try:
        return measure(source, saes, TokenRoles.decide(source, settings, [HOOK]), folder=folder)
    finally:
        shutil.rmtree(folder)


def _peak_mib() -> int:
    """Peak resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# ---- the demo model and its trained SAEs


def _demo_source(tokens: int, folder: Path) -> ModelSource:
    rows = text_rows(load_tokenizer(EMBEDDED_MODEL), documents(), context_length=LENGTH, prepend_bos=True)
    store = write_contexts(folder / "contexts", rows, n_contexts=tokens // LENGTH, context_length=LENGTH)
    return ModelSource.load(EMBEDDED_MODEL, [HOOK], store, dtype=torch.float32)


def _demo_saes(n: int) -> list[Encoder]:
    """Eight SAEs as the demo trains them: widths 1024, 2048, 4096 of three seeds, without the last."""
    saes = []
    for seed in range(3):
        found = prepare(replaced(DEMO, seed=seed), Stages(show=False)).saes
        saes += [sae.encoder(name=f"{sae.name} seed {seed}") for sae in found]
    order = [1, 4, 7, 0, 2, 3, 5, 6]  # the three of 2048 first, then the others as they come
    return [saes[i] for i in order[:n]]


def cost_of_saes(tokens: int) -> None:
    """Seconds of a pass with 1, 2, 4 and 8 SAEs, in turn, three rounds; medians and ratios to one."""
    with tempfile.TemporaryDirectory() as folder:
        source = _demo_source(tokens, Path(folder))
        everything, seconds = _demo_saes(8), {n: [] for n in (1, 2, 4, 8)}
        _measure(source, everything, _settings())  # to warm up
        for _ in range(3):
            for n, taken in seconds.items():
                taken.append(_timed(lambda n=n: _measure(source, everything[:n], _settings()))[0])
    one = _median(seconds[1])
    for n, taken in seconds.items():
        own = _median(taken)
        ratios = {"wall_times_one": round(own.wall / one.wall, 2), "cpu_times_one": round(own.cpu / one.cpu, 2)}
        _row(own, saes=n, tokens=tokens, **ratios, all=taken)


def memory(tokens: int) -> None:
    """Peak resident memory of a process that measures, at 1x, 4x and 16x tokens: stored activations, then the demo model."""
    for command in ("stored-memory", "model-memory"):
        for factor in (1, 4, 16):
            own = [sys.executable, __file__, command, "--tokens", str(tokens * factor)]
            done = subprocess.run(own, capture_output=True, text=True, check=True)
            _report(of=command, **json.loads(done.stdout.splitlines()[-1]))


def model_memory(tokens: int) -> None:
    saes = _demo_saes(4)
    with tempfile.TemporaryDirectory() as folder:
        source = _demo_source(tokens, Path(folder))
        before = _peak_mib()  # reading the text of large source files counts here
        seconds, _ = _timed(lambda: _measure(source, saes, _settings(table_contexts=100)))
    _row(seconds, tokens=tokens, before_mib=before, peak_mib=_peak_mib())


# ---- stored activations and SAEs that share their directions


def _dictionary(d_sae: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, D, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def _sae(d_sae: int, true: Tensor, blur: float, seed: int) -> Any:
    """A SAELens TopK SAE whose directions are the true ones, seen with some noise: the width it has of them."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    generator = torch.Generator().manual_seed(seed)
    rows = true[torch.randint(len(true), (d_sae,), generator=generator)] if d_sae != len(true) else true
    rows = rows + blur * torch.randn(d_sae, D, generator=generator) / D**0.5
    rows = rows / rows.norm(dim=1, keepdim=True)
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=d_sae, k=K, dtype="float32", device="cpu"))
    zeros = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(D)}
    sae.load_state_dict({"W_enc": rows.mT.contiguous(), "W_dec": rows.clone(), **zeros})
    return sae.eval().requires_grad_(False)


def _stored(tokens: int, true: Tensor, folder: Path) -> CacheSource:
    """Activations made of 48 true directions a token and noise, in our cache format; documents of four contexts."""
    contexts, per_shard = tokens // LENGTH, 64
    generator = torch.Generator().manual_seed(1)
    for number, start in enumerate(range(0, contexts, per_shard)):
        n = min(per_shard, contexts - start)
        picks = torch.randint(len(true), (n * LENGTH, FEATURES), generator=generator)
        weights = torch.rand(n * LENGTH, FEATURES, generator=generator) * 4
        x = torch.nn.functional.embedding_bag(picks, true, per_sample_weights=weights, mode="sum")
        x += 0.3 * torch.randn(n * LENGTH, D, generator=generator)
        ids = torch.randint(0, 1000, (n, LENGTH), generator=generator)
        _write_shard(folder, number, x.view(n, LENGTH, D), ids, torch.arange(start, start + n) // 4)
    meta = {"hook": HOOK, "d_in": D, "n_contexts": contexts, "context_length": LENGTH, "tokens_sha256": "made"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return CacheSource({HOOK: ActivationCache(folder, meta)})


def _measured(saes: Sequence[Any]) -> list[Encoder]:
    """Encoders made once, as a run makes them."""
    encoders = [as_encoder(sae) for sae in saes]
    return [
        Encoder.of_site(f"sae{i}", HOOK, sae.cfg.d_sae, lambda e=e: e)
        for i, (sae, e) in enumerate(zip(saes, encoders, strict=True))
    ]


def widths(tokens: int) -> None:
    """Seconds of a pass over stored activations with one SAE, by its width; the pass without encoding is the rest."""
    true = _dictionary(8192, 0)
    with tempfile.TemporaryDirectory(dir=cache_dir("benchmarks")) as folder:
        source = _stored(tokens, true, Path(folder))
        for d_sae in (2048, 8192, 32768):
            saes = _measured([_sae(d_sae, true, 0.3, 2)])
            taken = [_timed(lambda s=saes: _measure(source, s, _settings()))[0] for _ in range(3)]
            _row(_median(taken), d_sae=d_sae, tokens=tokens, all=taken)


def _four(true: Tensor) -> list[Any]:
    return [_sae(8192, true, blur, seed) for seed, blur in enumerate((0.0, 0.2, 0.4, 0.6))]


@torch.no_grad()
def released_procedure(
    x: Tensor, train: Tensor, saes: Sequence[Any]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The paper's released procedure in plain torch: SAE by SAE, dense latents, errors stored, one lstsq a regression.

    Returns processor seconds by stage and the numbers of each SAE.
    """
    seconds = {"encode and decode": 0.0, "error vector": 0.0, "norm tests": 0.0}
    test, found = ~train, []
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def regress(y: Tensor) -> Tensor:
        return design @ torch.linalg.lstsq(design[train], y[train], driver="gelsd").solution

    def r2(y: Tensor, predicted: Tensor) -> float:
        residual = (y - predicted)[test].square().sum(0)
        return (1 - residual / (y[test] - y[test].mean(0)).square().sum(0)).mean().item()

    for sae in saes:
        taken, x_hat = _timed(lambda s=sae: torch.cat([_dense(s, part) for part in x.split(4096)]))
        seconds["encode and decode"] += taken.cpu
        error = x - x_hat
        taken, linear = _timed(lambda e=error: regress(e))
        seconds["error vector"] += taken.cpu
        variance = (x[test] - x[test].mean(0)).square().sum()
        numbers = {
            "fvu": (error[test].square().sum() / variance).item(),
            "fvu_nonlinear": ((error - linear)[test].square().sum() / variance).item(),
            "r2_vec": r2(error, linear),
        }
        nonlinear = error - linear
        vectors = {"x": x, "sae": x_hat, "error": error, "linear": linear, "nonlinear": nonlinear,
                   "sae_plus_nonlinear": x_hat + nonlinear}  # fmt: skip
        for name, vector in vectors.items():
            norm = vector.square().sum(1, keepdim=True)
            taken, predicted = _timed(lambda n=norm: regress(n))
            seconds["norm tests"] += taken.cpu
            numbers[f"r2_norm/{name}"] = r2(norm, predicted)
        found.append(numbers)
    return seconds, found


def _dense(sae: Any, x: Tensor) -> Tensor:
    """SAELens' TopK arithmetic in plain torch: dense pre-activations, topk, dense latents, dense decoder."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.topk(sae.cfg.k, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    return acts @ sae.W_dec + sae.b_dec


def released(tokens: int) -> None:
    """The released procedure and both of ours on the same data, four SAEs of 8192 latents, in one process."""
    true = _dictionary(8192, 0)
    saes = _four(true)
    plain_saes = [_sae(8192, true, blur, seed) for seed, blur in enumerate((0.0, 0.2, 0.4, 0.6))]  # never accelerated
    with tempfile.TemporaryDirectory(dir=cache_dir("benchmarks")) as folder:
        source = _stored(tokens, true, Path(folder))
        measured = _measured(saes)
        rows = {}
        for name, settings in (
            ("ours, one pass, float32 products", _settings(drop_positions=0, max_norm_ratio=0.0)),
            (
                "ours, two passes, float64 products",
                _settings(passes=2, products="float64", drop_positions=0, max_norm_ratio=0.0),
            ),
        ):
            seconds, sites = _timed(lambda s=settings: _measure(source, measured, s))
            rows[name] = (seconds, [sites[HOOK].decomposition(sae.name).numbers() for sae in measured])
            _row(seconds, procedure=name, tokens=tokens)
        batch = source.read(range(source.n_contexts))
        x = batch.activations[HOOK].flatten(0, 1)
        roles = TokenRoles.decide(source, _settings(passes=2), [HOOK])
        train = (roles.contexts == FIT).repeat_interleave(LENGTH)
    total, (stages, numbers) = _timed(lambda: released_procedure(x, train, plain_saes))
    same = rows["ours, two passes, float64 products"][1]
    worst = max(abs(theirs[key] - own[key]) for theirs, own in zip(numbers, same, strict=True) for key in theirs)
    _row(total, procedure="released", tokens=tokens, cpu_by_stage=stages, worst_difference=worst)
    for name, (seconds, _) in rows.items():
        _report(of=name, wall_ratio=round(total.wall / seconds.wall, 2), cpu_ratio=round(total.cpu / seconds.cpu, 2))


def stored_memory(tokens: int) -> None:
    """One SAE of 2048 latents on stored activations, which are made 64 contexts at a time."""
    true = _dictionary(2048, 0)
    measured = _measured([_sae(2048, true, 0.3, 0)])
    with tempfile.TemporaryDirectory(dir=cache_dir("benchmarks")) as folder:
        source = _stored(tokens, true, Path(folder))
        before = _peak_mib()
        seconds, _ = _timed(lambda: _measure(source, measured, _settings(table_contexts=100)))
    _row(seconds, tokens=tokens, before_mib=before, peak_mib=_peak_mib())


def million(tokens: int) -> None:
    """A million stored tokens, four SAEs of 8192 latents, every token read once."""
    true = _dictionary(8192, 0)
    measured = _measured(_four(true))
    with tempfile.TemporaryDirectory(dir=cache_dir("benchmarks")) as folder:
        source = _stored(tokens, true, Path(folder))
        seconds, _ = _timed(lambda: _measure(source, measured, _settings()))
        _row(seconds, tokens=tokens, saes=4, d_sae=8192, peak_mib=_peak_mib())


COMMANDS: dict[str, tuple[Callable[[int], None], int]] = {
    "saes": (cost_of_saes, 65_536),
    "memory": (memory, 16_384),
    "stored-memory": (stored_memory, 16_384),
    "model-memory": (model_memory, 16_384),
    "widths": (widths, 65_536),
    "released": (released, 131_072),
    "million": (million, 1_048_576),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--tokens", type=int, help="tokens to measure on (of memory: at 1x)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    work, tokens = COMMANDS[arguments.command]
    work(arguments.tokens or tokens)


if __name__ == "__main__":
    main()
