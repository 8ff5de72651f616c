"""Memory of an accelerated SAE beside a plain one, each measurement in a process of its own.

python benchmarks/memory.py          the peak of one sae(x) beyond what was there before it: SAELens against accelerated
python benchmarks/memory.py kept     what an accelerated SAE keeps beyond the plain one; the widest needs 8 GB
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from problems import SHAPES, Problem

import darkmatter_ext as dm

KEPT = [(2304, d_sae, dtype) for d_sae in (65536, 262144) for dtype in ("float32", "bfloat16")]


def settled_rss() -> float:
    """MB resident once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(key: str) -> float:
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
        before = status("VmRSS")
        sae(problem.x)
    return status("VmHWM") - before


@torch.no_grad()
def kept(d_in: int, d_sae: int, dtype: str, architecture: str = "jumprelu") -> tuple[float, float]:
    """MB an SAE holds beyond its plain self after accelerated calls, and MB of W_enc."""
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class(architecture)
    sae: Any = sae_class(cfg_class(d_in=d_in, d_sae=d_sae, dtype=dtype, device="cpu"))
    sae.W_enc.uniform_(-1, 1)
    sae.W_dec.uniform_(-1, 1)
    sae.threshold.fill_(
        2.5 * (d_in / 3) ** 0.5
    )  # 2.5 standard deviations of a score: less than one latent in a hundred
    x = torch.randn(8, d_in, dtype=sae.W_enc.dtype, generator=torch.Generator().manual_seed(0))
    sae.decode(sae.encode(x))  # what SAELens and torch load at their first call is not ours
    before = settled_rss()
    dm.accelerate(sae)
    sae(x)
    sae.decode(sae.encode(x))
    assert dm.stats(sae).fast, dm.stats(sae)
    return settled_rss() - before, sae.W_enc.numel() * sae.W_enc.element_size() / 2**20


def print_kept() -> None:
    """A line for each of KEPT."""
    for d_in, d_sae, dtype in KEPT:
        command = [sys.executable, __file__, "kept", str(d_in), str(d_sae), dtype]
        beyond, weights = map(float, subprocess.check_output(command).split()[-2:])
        share = f"{beyond / weights:.2f} times W_enc"
        print(f"memory {d_in} x {d_sae} {dtype}: {beyond:.0f} MB beyond the plain SAE, {share} ({weights:.0f} MB)")


def main() -> None:
    if sys.argv[1:] == ["kept"]:
        print_kept()
        return
    if sys.argv[1:2] == ["kept"]:
        print(*kept(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
        return
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
