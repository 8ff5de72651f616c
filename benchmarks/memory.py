"""Peak memory of one sae(x) beyond what was there before it: SAELens against accelerated, each in a process of its own.

python benchmarks/memory.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from cases import SHAPES, Problem

import darkmatter_ext as dm


def _status(key: str) -> float:
    """MB, from /proc/self/status: VmRSS now, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure(architecture: str, which: str, shape: int) -> float:
    """Peak MB of a second call above the memory before it (the first call packs weights and warms up)."""
    problem = Problem.make("sae_like", SHAPES[shape], architecture, torch.float32)
    sae = dm.accelerate(problem.sae) if which == "accelerated" else problem.sae
    with torch.no_grad():
        sae(problem.x[:8])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        sae(problem.x)
    return _status("VmHWM") - before


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        return
    for shape in (0, 1):
        for architecture in ("topk", "jumprelu"):
            found = [
                float(subprocess.check_output([sys.executable, __file__, architecture, which, str(shape)]).split()[-1])
                for which in ("plain", "accelerated")
            ]
            plain, fast = found
            print(
                f"{architecture} {SHAPES[shape]}: SAELens {plain:.0f} MB, accelerated {fast:.1f} MB, {fast / plain:.1%}"
            )


if __name__ == "__main__":
    main()
