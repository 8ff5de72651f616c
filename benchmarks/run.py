"""The CPU benchmark: peers side by side in one process, interleaved, medians; a table and a JSON file.

    python benchmarks/run.py [--only encode] [--data gaussian sae_like] [--rounds 9] [--out FILE]

Each row is checked against the float64 oracle before it is timed. In every round ours, the peers and the floors run once
each, so that a slow moment of a shared machine hits all of them; medians over the rounds, and ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from problems import DATA, SHAPES, Problem, Row, demo_problems
from pursuit_cases import pursuit_rows
from rich.console import Console
from rich.table import Table

from darkmatter_ext.report.result import provenance
from darkmatter_ext.runtime.storage import atomic_file

OPERATIONS = ("encode", "forward", "decode", "train", "support", "drop-in", "pursuit")


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _rows_of(problem: Problem, operations: set[str]) -> Iterator[Callable[[], Row]]:
    makers = {
        "encode": [problem.encode_row],
        "forward": [problem.forward_row],
        "decode": [problem.decode_row],
        "train": [problem.training_row],
        "support": [problem.support_row],
        "drop-in": [problem.drop_in_row, problem.drop_in_forward_row, problem.error_term_row],
    }
    trainable = problem.architecture == "topk" and problem.x.dtype == torch.float32 and len(problem.x) > 1
    for name in OPERATIONS:
        if name in makers and name in operations and (trainable or name != "train"):
            yield from makers[name]


def _problems(data: list[str], dtypes: list[str], *, demo: bool) -> Iterator[Problem]:
    for kind in data:
        for shape in SHAPES:
            for architecture in ("topk", "jumprelu"):
                for dtype in dtypes:
                    yield Problem.make(kind, shape, architecture, getattr(torch, dtype))
    if demo:
        yield from demo_problems()


def _all_rows(arguments: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    operations = set(arguments.only)
    if operations - {"pursuit"}:
        for problem in _problems(arguments.data, arguments.dtypes, demo=not arguments.no_demo):
            yield from _rows_of(problem, operations)
    if "pursuit" in operations:
        yield from pursuit_rows()


def _milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Check, warm up, then time every participant once a round."""
    participants = {"ours": row.ours, **row.peers, **{f"floor: {name}": run for name, run in row.floors.items()}}
    with contextlib.nullcontext() if row.name.startswith("train") else torch.no_grad():
        row.check()
        slowest = max(_milliseconds(function) for function in participants.values())
        rounds = max(3, min(rounds, int(2000 / max(slowest, 1e-3))))  # a row of slow peers in seconds, not minutes
        times: dict[str, list[float]] = {name: [] for name in participants}
        gc.collect()
        for _ in range(rounds):
            for name, function in participants.items():
                times[name].append(_milliseconds(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: median / medians["ours"] for name, median in medians.items() if name != "ours"}
    return {"row": row.name, "rounds": rounds, "median_ms": medians, "ratio_to_ours": ratios}


def _line(found: dict[str, Any]) -> tuple[str, str, str]:
    parts = [
        f"{name} {found['median_ms'][name]:.1f} ms = {ratio:.2f}x" for name, ratio in found["ratio_to_ours"].items()
    ]
    return found["row"], f"{found['median_ms']['ours']:.2f}", "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(OPERATIONS), choices=OPERATIONS, help="operations to run")
    parser.add_argument("--data", nargs="+", default=["sae_like"], choices=list(DATA), help="kinds of data")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument(
        "--dtypes", nargs="+", default=dtypes, choices=dtypes, help="SAELens takes minutes for bfloat16 on AVX2"
    )
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo's own SAEs and activations")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    found = []
    about = provenance("cpu")  # before the long part: what it imports may be edited meanwhile
    for make in _all_rows(arguments):
        found.append(measure(make(), arguments.rounds))
        print("  ".join(_line(found[-1])), file=sys.stderr, flush=True)
    table = Table("row", "ours, ms", "others: ms and ratio to ours (above 1: ours is faster)", title=cpu_name())
    for entry in found:
        table.add_row(*_line(entry))
    Console(width=200).print(table)
    if arguments.out is not None:
        content = {"cpu": cpu_name(), "provenance": about, "rows": found}
        with atomic_file(arguments.out) as part:
            part.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
