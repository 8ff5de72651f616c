"""How benchmarks/gpu.py times: participants take turns in every round, device events, medians, L2 overwritten before each.

A participant that does not fit into memory, or that needs a package that is not there, is recorded as such.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.report.result import provenance
from darkmatter_ext.runtime.storage import atomic_file

FLUSH_BYTES = 256 << 20


@dataclass
class Row:
    """One line of the table."""

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    floors: dict[str, Callable[[], Any]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    flops: float = 0.0  # of ours' screen
    bytes: float = 0.0  # that ours must read or write
    extra: dict[str, Any] = field(default_factory=dict)


def with_tf32(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return function()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def peak(function: Callable[[], Any]) -> int:
    """Bytes allocated at the worst moment of a call, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def flush_buffer() -> Tensor:
    """What overwrites the L2 when it is written."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def elapsed_ms(function: Callable[[], Any]) -> float:
    """Of one call, between two device events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms(function: Callable[[], Any], repeats: int, warm: int) -> float:
    """Of `repeats` calls after `warm` others."""
    return statistics.median([elapsed_ms(function) for _ in range(warm + repeats)][warm:])


def _time(function: Callable[[], Any], flush: Tensor) -> float:
    flush.zero_()
    return elapsed_ms(function)


def measure(row: Row, rounds: int, flush: Tensor) -> dict[str, Any]:
    """Check, warm up, then time every participant once a round."""
    row.check()
    participants = {"ours": row.ours, **row.peers, **{f"floor: {name}": run for name, run in row.floors.items()}}
    failed, warm = {}, {}
    for name, function in list(participants.items()):
        try:
            _time(function, flush)
            warm[name] = _time(function, flush)
        except (RuntimeError, ModuleNotFoundError) as error:  # out of memory too
            if name == "ours":
                raise
            failed[name] = f"not run: {str(error).splitlines()[0]}"
            del participants[name]
            torch.cuda.empty_cache()
    rounds = max(3, min(rounds, int(4000 / max(sum(warm.values()), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in participants}
    for _ in range(rounds):
        for name, function in participants.items():
            times[name].append(_time(function, flush))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["ours"]
    return {
        "row": row.name,
        "rounds": rounds,
        "median_ms": medians,
        "spread_ms": {name: [min(values), max(values)] for name, values in times.items()},
        "ratio_to_ours": {name: median / ours for name, median in medians.items() if name != "ours"},
        "not_run": failed,
        "tflops": row.flops / ours / 1e9 if row.flops else None,
        "gb_per_s": row.bytes / ours / 1e6 if row.bytes else None,
        **row.extra,
    }


def line(found: dict[str, Any]) -> str:
    """Of the table that is printed."""
    others = "; ".join(
        f"{name} {found['median_ms'][name]:.3f} ms = {ratio:.2f}x" for name, ratio in found["ratio_to_ours"].items()
    )
    rate = (
        f" {found['tflops']:.0f} TFLOP/s"
        if found["tflops"]
        else f" {found['gb_per_s']:.0f} GB/s"
        if found["gb_per_s"]
        else ""
    )
    others = "; ".join([others, *(f"{name} {reason}" for name, reason in found["not_run"].items())])
    return f"| {found['row']} | {found['median_ms']['ours']:.3f}{rate} | {others} |"


def gpu_slug() -> str:
    """The GPU's name as a file name: nvidia-h200."""
    return "-".join(torch.cuda.get_device_name().lower().split())


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """All rows so far, with the GPU and the versions."""
    content = {"gpu": torch.cuda.get_device_name(), "provenance": provenance("cuda"), "rows": found}
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=1))
