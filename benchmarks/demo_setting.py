"""How far the demo's numbers depend on its settings: one factor at a time, three seeds, a table.

    python benchmarks/demo_setting.py --out docs/demo_setting.md

About half an hour on two cores. Every run is `darkmatter run decomposition` with one setting changed. Finished rows are
kept in the cache folder, so the command can be stopped and started again; what is left is the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from darkmatter_ext.activations.embedded_model import EMBEDDED_MODEL
from darkmatter_ext.cli import _quiet_libraries
from darkmatter_ext.experiments import decomposition
from darkmatter_ext.measurement.settings import replaced
from darkmatter_ext.report.result import Result, provenance
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.runtime.storage import atomic_file, cache_dir, fingerprint

BASE = replaced(decomposition.PRESETS["demo"], widths=(2048,))
FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {  # factor -> values other than the demo's
    "tokens": {"tokens": (100_000, 400_000)},
    "width": {"widths": ((1024,), (4096,))},
    "split": {"split": ("contexts", "tokens")},
    "dropped positions": {"drop_positions": (1, 64)},
    "training steps": {"steps": (200, 1600)},
    "layer": {"hook": tuple(f"blocks.{layer}.hook_resid_post" for layer in (5, 15, 20))},
}
COLUMNS = (
    ("fvu", "FVU"),
    ("fvu_nonlinear", "FVU nonlinear"),
    ("linear_share", "linear share"),
    ("r2_vec", "R² error vector"),
    ("r2_norm/error", "R² error norm"),
    ("r2_norm/nonlinear", "R² nonlinear norm"),
    ("r2_norm/x", "R² norm of x"),
)


def _spread(values: list[float]) -> str:
    """Mean and, in brackets, the range over the seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def _row(label: str, results: list[Result]) -> str:
    name = results[0].series["saes"][0]["name"]
    cells = [_spread([result.numbers[f"{name}/{key}"] for result in results]) for key, _ in COLUMNS]
    return f"| {label} | " + " | ".join(cells) + " |"


class Rows:
    """Table rows by setting, each kept on disk as soon as it is measured."""

    def __init__(self, seeds: int) -> None:
        self.seeds = range(seeds)
        key = fingerprint(base=dataclasses.asdict(BASE), seeds=seeds, columns=COLUMNS)
        self.path = cache_dir("benchmarks") / f"demo_setting_{key}.json"
        self.rows: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def measure(self, label: str, **changes: Any) -> str:
        if label not in self.rows:
            start = time.perf_counter()
            configs = [replaced(BASE, seed=seed, **changes) for seed in self.seeds]
            self.rows[label] = _row(label, [decomposition.run(config, Stages(show=False)) for config in configs])
            with atomic_file(self.path) as part:
                part.write_text(json.dumps(self.rows))
            print(f"{self.rows[label]}  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return self.rows[label]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="markdown file to write")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    _quiet_libraries()
    kept = Rows(arguments.seeds)
    rows = [kept.measure(f"demo, {BASE.saes.widths[0]} latents")]
    for factor, settings in FACTORS.items():
        ((field, values),) = settings.items()
        for value in values:
            shown = value[0] if isinstance(value, tuple) else value
            rows.append(kept.measure(f"{factor}: {shown}", **{field: value}))
    made = provenance(BASE.device)
    heading = "| setting | " + " | ".join(name for _, name in COLUMNS) + " |"
    lines = [
        "# How far the demo's numbers depend on its settings",
        "",
        f"`python benchmarks/demo_setting.py`: one factor changed at a time from the demo ({EMBEDDED_MODEL},",
        f"{BASE.saes.trained_hooks[0]},",
        f"{BASE.data.tokens} tokens, k {BASE.saes.k}, {BASE.saes.steps} steps, split by {BASE.measure.split}, positions below "
        f"{BASE.measure.drop_positions}",
        f"dropped). Mean over {arguments.seeds} seeds (of the splits and of SAE training), range in brackets; held-out tokens.",
        f"Made {made['created'][:10]} with torch {made['versions']['torch']} on {made['device']}.",
        "",
        heading,
        "|" + "---|" * (len(COLUMNS) + 1),
        *rows,
        "",
    ]
    arguments.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
