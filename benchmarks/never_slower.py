"""Is an accelerated call ever slower than SAELens' own? Every instruction set, architecture and kind of data users have.

    python benchmarks/never_slower.py [--quick] [--isa avx2 ...] [--only topk n=64 ...] [--minutes 24] [--threads N]

An accelerated SAE and its plain twin, which share all weights, take turns in one process; each instruction set that this
machine has runs in a process of its own, forced for torch, oneDNN and MKL as for us. ratio = plain time / accelerated time,
of medians over the rounds. Prints every cell below 1; writes results/never_slower-<isa>.json. `--only`: words of the names
of cells, such as "topk bfloat16 N=64 F=4096 sparse". On a machine that is not idle, `--threads 1`: two threads wait for the
one that has lost its core, and a call of microseconds takes milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from field_saes import ARCHITECTURES, INPUTS, Case, make_case
from run import cpu_name

import darkmatter_ext as dm
from darkmatter_ext.report.result import provenance
from darkmatter_ext.runtime.storage import atomic_file

# Weakest first, with what holds the others to the same instructions.
ISAS = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "amx_int8": ("avx512", "AVX512_CORE_AMX", "AVX512_E4"),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
RESULTS = Path(__file__).parent / "results"
FLOOR = 0.95  # below this a cell breaks the promise; between this and 1 it is within the noise that is allowed

WIDTHS, TOKENS = (1024, 4096, 16384, 65536), (1, 8, 64, 1024)
# N d F of the largest cells: larger ones only repeat them, at seconds a call (SAELens' bfloat16 above all, where the
# processor has no such product: 200 million multiply-adds took half a second on AVX2).
MAX_PRODUCT = {"float32": 1024 * 768 * 24576, "bfloat16": 1 << 30}
D_IN = {1024: 512, 4096: 768, 16384: 768, 65536: 768}
CALLS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "encode": lambda sae, x: sae.encode(x),
    "encode, decode": lambda sae, x: sae.decode(sae.encode(x)),
    "forward": lambda sae, x: sae(x),
}
BATCH_MS = 2.0  # calls shorter than this are repeated within a round
ROUNDS, MIN_ROUNDS, CELL_SECONDS = 15, 3, 0.35  # of a call: as many rounds as fit into its seconds, from 3 to 15
SLOW_MS = 1500.0  # a call this slow is measured once


@dataclass(frozen=True)
class Cell:
    """An SAE and its inputs; all calls are timed on it."""

    architecture: str
    dtype: str
    n: int
    d_in: int
    d_sae: int
    data: str
    grad: bool = False

    @property
    def name(self) -> str:
        grad = " grad" if self.grad else ""
        return f"{self.architecture} {self.dtype} N={self.n} d={self.d_in} F={self.d_sae} {self.data}{grad}"

    def make(self) -> Case:
        dtype = getattr(torch, self.dtype)
        return make_case(self.architecture, self.data, self.n, self.d_in, self.d_sae, dtype)


def all_cells() -> list[Cell]:
    """Kinds of data x architectures at a few sizes; gradients; d 2304; then sizes x dtypes x architectures, small first."""
    cells = []
    for data, architecture, (n, width) in itertools.product(INPUTS, ARCHITECTURES, ((8, 16384), (64, 4096))):
        cells.append(Cell(architecture, "float32", n, 768, width, data))
    for data, architecture in itertools.product(INPUTS, ("topk", "jumprelu")):
        cells.append(Cell(architecture, "bfloat16", 64, 768, 4096, data))
        cells.append(Cell(architecture, "float32", 1024, 512, 4096, data))
    for architecture, n in itertools.product(ARCHITECTURES, (8, 64)):
        cells.append(Cell(architecture, "float32", n, 768, 4096, "sparse", grad=True))
    for architecture, n in itertools.product(ARCHITECTURES, (1, 64)):
        cells.append(Cell(architecture, "float32", n, 2304, 16384, "sparse"))
    for width, n, dtype, architecture in itertools.product(WIDTHS, TOKENS, ("float32", "bfloat16"), ARCHITECTURES):
        cells.append(Cell(architecture, dtype, n, D_IN[width], width, "sparse"))
    kept = [cell for cell in cells if cell.n * cell.d_in * cell.d_sae <= MAX_PRODUCT[cell.dtype]]
    return list(dict.fromkeys(kept))


def quick_cells() -> list[Cell]:
    """The smallest and a middle size, and every kind of data once."""
    cells = []
    for (n, width), architecture in itertools.product(((1, 1024), (64, 4096)), ARCHITECTURES):
        cells.append(Cell(architecture, "float32", n, D_IN[width], width, "sparse"))
    for data, architecture in itertools.product(INPUTS, ("standard", "topk_plain", "jumprelu")):
        cells.append(Cell(architecture, "float32", 64, 768, 4096, data))
    return list(dict.fromkeys(cells))


# ---- timing


def _batch_ms(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds a call, of `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return 1e3 * (time.perf_counter() - start) / repeats


def in_turns(
    plain: Callable[[], Any], accelerated: Callable[[], Any], seconds: float = CELL_SECONDS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Medians over rounds in which both run, in either order by turns, and their ratio."""
    times = ([_batch_ms(plain, 1)], [_batch_ms(accelerated, 1)])
    slowest = max(*times[0], *times[1], 1e-3)
    repeats = max(1, int(BATCH_MS / slowest))
    if slowest < SLOW_MS:  # else what has been measured is all
        times = ([], [])
        rounds = max(MIN_ROUNDS, min(rounds, int(1e3 * seconds / (2 * repeats * slowest))))
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                times[which].append(_batch_ms((plain, accelerated)[which], repeats))
    plain_ms, accelerated_ms = map(statistics.median, times)
    return {
        "plain_ms": plain_ms,
        "accelerated_ms": accelerated_ms,
        "ratio": plain_ms / accelerated_ms,
        "rounds": len(times[0]),
        "repeats": repeats,
    }


def measure(cell: Cell, seconds: float = CELL_SECONDS) -> list[dict[str, Any]]:
    """One row a call. The first accelerated call, which packs weights, is not in the ratio but in its own column."""
    case = cell.make()
    with torch.set_grad_enabled(cell.grad):
        first_ms = _batch_ms(lambda: _run(CALLS["forward"], case.accelerated, case.inputs), 1)
        _run(CALLS["forward"], case.plain, case.inputs)
        rows = []
        for name, call in CALLS.items():
            before = dm.stats(case.accelerated)
            timed = in_turns(
                lambda call=call: _run(call, case.plain, case.inputs),
                lambda call=call: _run(call, case.accelerated, case.inputs),
                seconds,
            )
            why = _by_sae_lens(before, dm.stats(case.accelerated))
            rows.append({**asdict(cell), "call": name, **timed, "first_call_ms": first_ms, "by_sae_lens": why})
    return rows


def _run(call: Callable[[Any, torch.Tensor], Any], sae: Any, inputs: list[torch.Tensor]) -> None:
    for x in inputs:
        call(sae, x)


def _by_sae_lens(before: dm.Stats, after: dm.Stats) -> dict[str, int]:
    """Why calls in between were answered by SAELens, and how many."""
    found: dict[str, int] = {}
    for method, reasons in after.fallback.items():
        for reason, count in reasons.items():
            new = count - before.fallback.get(method, {}).get(reason, 0)
            if new:
                found[f"{method}: {reason}"] = new
    return found


# ---- reporting


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the ratios of an instruction set."""
    ratios = [row["ratio"] for row in rows]
    if not ratios:
        return {"cells": 0}
    return {
        "cells": len(ratios),
        "median": statistics.median(ratios),
        "least": min(ratios),
        "share_below_1": sum(ratio < 1 for ratio in ratios) / len(ratios),
        f"share_below_{FLOOR}": sum(ratio < FLOOR for ratio in ratios) / len(ratios),
    }


def _line(row: dict[str, Any]) -> str:
    cell = Cell(**{key: row[key] for key in Cell.__dataclass_fields__})
    why = "; ".join(row["by_sae_lens"]) or "fast"
    return (
        f"{row['ratio']:6.2f}  {cell.name}, {row['call']}: SAELens {row['plain_ms']:.3f} ms, "
        f"accelerated {row['accelerated_ms']:.3f} ms, first call {row['first_call_ms']:.1f} ms ({why})"
    )


def report(isa: str, rows: list[dict[str, Any]]) -> str:
    """Every cell below 1, worst first, and the summary."""
    below = sorted((row for row in rows if row["ratio"] < 1), key=lambda row: row["ratio"])
    lines = [f"{isa}: {len(below)} of {len(rows)} below 1", *map(_line, below)]
    if rows and not below:
        lines.append("least: " + _line(min(rows, key=lambda row: row["ratio"])))
    return "\n".join([*lines, f"{isa}: {json.dumps(summary(rows))}"])


def measured(cells: list[Cell], deadline: float, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of each cell until the deadline (of time.monotonic)."""
    for number, cell in enumerate(cells):
        if time.monotonic() > deadline:
            print(f"time is up: {len(cells) - number} cells are not measured", file=sys.stderr)
            return
        rows = measure(cell, seconds)
        ratios = "  ".join(f"{row['call']} {row['ratio']:.2f}" for row in rows)
        print(f"{number + 1}/{len(cells)} {cell.name}: {ratios}", file=sys.stderr, flush=True)
        yield rows


def run_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cells on the instruction set of this process; the content of its JSON file."""
    cells = [cell for cell in (quick_cells() if arguments.quick else all_cells()) if _wanted(cell, arguments.only)]
    about, isa = provenance("cpu"), dm.build_info()["cpu_isa"]
    seconds = CELL_SECONDS / 2 if arguments.quick else CELL_SECONDS
    deadline = time.monotonic() + 60 * arguments.minutes
    rows = [row for rows in measured(cells, deadline, seconds) for row in rows]
    settings = {name: os.environ.get(name, "") for name in ("DARKMATTER_CPU_ISA", *VARIABLES)}
    settings |= {"quick": arguments.quick, "only": arguments.only, "seconds_a_call": seconds}
    return {
        "cpu": cpu_name(),
        "isa": isa,
        "provenance": about,
        "settings": settings,
        "summary": summary(rows),
        "cells_not_measured": len(cells) - len(rows) // len(CALLS),
        "rows": rows,
    }


def _wanted(cell: Cell, words: list[str]) -> bool:
    return set(words) <= set(cell.name.split())


def available() -> list[str]:
    """The instruction sets of this machine, weakest first."""
    names = list(ISAS)
    return names[: names.index(dm.build_info()["cpu_isa_best"]) + 1]


def environment(isa: str) -> dict[str, str]:
    """Of a child process in which ours and theirs have `isa` and no more."""
    return os.environ | {"DARKMATTER_CPU_ISA": isa} | dict(zip(VARIABLES, ISAS[isa], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes")
    parser.add_argument("--isa", nargs="+", default=available(), choices=available(), help="instruction sets")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose names have all these words")
    parser.add_argument("--minutes", type=float, default=24.0, help="for all instruction sets together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads; default its own")
    parser.add_argument("--out", type=Path, help=f"folder of the JSON files; default {RESULTS.name}/, --quick: none")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the child: one set, this process
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.quick or arguments.only else RESULTS)
    if not arguments.here:
        for isa in arguments.isa:
            minutes = ["--minutes", str(arguments.minutes / len(arguments.isa))]
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], *minutes, "--here"], env=environment(isa), check=True
            )
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    content = run_here(arguments)
    print(report(content["isa"], content["rows"]), flush=True)
    if out is not None:
        with atomic_file(out / f"never_slower-{content['isa']}.json") as part:
            part.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
