"""The demo of every experiment, one after the other, with one cache: how long the whole set takes.

    DARKMATTER_CACHE=NEW_FOLDER python benchmarks/demo_set.py RESULTS_FOLDER [--only scaling diff]

Each is `darkmatter run NAME --out RESULTS_FOLDER/NAME` in a process of its own, as a user types it. In an empty cache the
first that needs the language model's activations, its loss or an SAE makes them, the others read them. Writes
RESULTS_FOLDER/demo_set.json: wall time and stages of each, machine, versions and commit. A second call goes on with those
that are not there yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results_page import ORDER
from run import cpu_name

from darkmatter_ext.report.result import load_result, provenance
from darkmatter_ext.runtime.storage import atomic_file, cache_dir


def _timed(name: str, folder: Path, *, resumed: bool) -> dict[str, Any]:
    """Wall time and stages of one run; `resumed`: an earlier try was stopped, so it found part of its work in the cache."""
    empty = not any(path.is_file() for path in cache_dir().rglob("*"))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "darkmatter_ext", "run", name, "--out", str(folder / name)], check=True)
    wall = time.perf_counter() - start
    stages = load_result(folder / name / f"{name}.json").seconds
    about = {"empty_cache": empty, "resumed": resumed, "cpu": cpu_name(), **provenance("cpu")}
    return {"wall_seconds": wall, "stages": stages, **about}


def _table(runs: dict[str, dict[str, Any]]) -> str:
    lines = ["| experiment | minutes | longest stages (s) |", "|---|---|---|"]
    for name, run in runs.items():
        longest = sorted(run["stages"].items(), key=lambda stage: -stage[1])[:3]
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in longest)
        label = f"{name} (went on)" if run["resumed"] else name
        lines.append(f"| {label} | {run['wall_seconds'] / 60:.1f} | {stages} |")
    return "\n".join([*lines, f"| all | {sum(run['wall_seconds'] for run in runs.values()) / 60:.1f} | |"])


def _keep(runs: dict[str, Any], path: Path) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(runs, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RESULTS_FOLDER")
    parser.add_argument("--only", nargs="+", default=list(ORDER), choices=list(ORDER), metavar="NAME")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    kept = parsed.folder / "demo_set.json"
    runs: dict[str, dict[str, Any] | None] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in parsed.only:
        if runs.get(name):
            continue
        resumed, runs[name] = name in runs, None  # None: begun
        _keep(runs, kept)
        runs[name] = _timed(name, parsed.folder, resumed=resumed)
        _keep(runs, kept)
    print(_table({name: run for name in parsed.only if (run := runs[name])}))


if __name__ == "__main__":
    main()
