"""Where the time of an op goes on a GPU: device time by kernel, launches, and what the host takes to ask for it.

    python benchmarks/gpu_profile.py [--shapes A C] [--ops topk threshold odd decode outer prepare pursuit] [--out FOLDER]

Weights are prepared; DARKMATTER_CUDA_FUSED=1 and 0 choose the screen. Not for comparing: benchmarks/gpu.py does that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import SHAPES, Problem, pursuit_problem
from gpu_timing import gpu_slug
from torch.profiler import ProfilerActivity, profile

import darkmatter_ext as dm
from darkmatter_ext.ops.decode import decoder_outer
from darkmatter_ext.runtime.storage import atomic_file

PURSUIT_STEPS = 8
ODD_TOKENS = 64
CALLS = 3


def _short(kernel: str) -> str:
    """A kernel's name without namespaces, arguments and most of its template."""
    name = kernel.split("(", maxsplit=1)[0].replace("void ", "")
    return name.replace("darkmatter::cuda::", "")[:60]


def profiled(function: Callable[[], Any]) -> dict[str, Any]:
    """Device microseconds a call by kernel, the calls to each, the call's own time, and the host's."""
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    host = (time.perf_counter() - began) / CALLS
    torch.cuda.synchronize()
    whole = (time.perf_counter() - began) / CALLS
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(CALLS):
            function()
        torch.cuda.synchronize()
    kernels = [
        {"kernel": _short(event.key), "us": event.device_time_total / CALLS, "launches": event.count / CALLS}
        for event in recorded.key_averages()
        if event.device_time_total > 0
    ]
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {"host_us": 1e6 * host, "us": 1e6 * whole, "kernels": kernels}


def sae_ops(label: str) -> dict[str, Callable[[], Any]]:
    """The ops of one shape of benchmarks/gpu.py."""
    problem = Problem.make(label)
    prepared = dm.prepare_encoder(problem.W_enc, problem.b_enc)
    acts = dm.topk_encode(problem.x, problem.W_enc, problem.b_enc, problem.k, prepared=prepared)
    threshold = acts.values[:, -1].mean()
    odd = problem.x.clone()
    odd[:: len(odd) // ODD_TOKENS] = torch.inf  # screening cannot help them
    return {
        "topk": lambda: dm.topk_encode(problem.x, problem.W_enc, problem.b_enc, problem.k, prepared=prepared),
        "threshold": lambda: dm.threshold_encode(problem.x, problem.W_enc, problem.b_enc, threshold, prepared=prepared),
        "odd": lambda: dm.topk_encode(odd, problem.W_enc, problem.b_enc, problem.k, prepared=prepared),
        "decode": lambda: dm.sparse_decode(acts, problem.W_dec),
        "outer": lambda: decoder_outer(acts, problem.x),
        "prepare": lambda: dm.prepare_encoder(problem.W_enc, problem.b_enc),
    }


def pursuit_op() -> Callable[[], Any]:
    """Gradient pursuit of benchmarks/gpu.py, a few steps."""
    x, dictionary = pursuit_problem()
    prepared = dm.prepare_dictionary(dictionary)
    return lambda: dm.pursuit(x, prepared, PURSUIT_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "C"], choices=list(SHAPES), help="shapes of gpu.py")
    parser.add_argument(
        "--ops", nargs="+", default=["topk", "threshold", "odd", "decode", "outer", "prepare", "pursuit"]
    )
    parser.add_argument("--label", default="", help="appended to the name of the JSON file")
    parser.add_argument("--out", type=Path, help="folder for a JSON file named after the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_profile.py needs a CUDA device, and torch sees none")
    found: dict[str, Any] = {}
    with torch.no_grad():
        for label in arguments.shapes:
            torch.cuda.empty_cache()
            ops = sae_ops(label)
            found |= {f"{label} {name}": profiled(op) for name, op in ops.items() if name in arguments.ops}
            del ops
        torch.cuda.empty_cache()
        if "pursuit" in arguments.ops:
            found[f"pursuit, {PURSUIT_STEPS} steps"] = profiled(pursuit_op())
    for name, call in found.items():
        print(f"{name}: {call['us']:.0f} us, of which the host asks {call['host_us']:.0f}")
        for kernel in call["kernels"][:8]:
            print(f"    {kernel['us']:9.1f} us  {kernel['launches']:5.0f} x  {kernel['kernel']}")
    if arguments.out is not None:
        with atomic_file(arguments.out / f"{gpu_slug()}-profile{arguments.label}.json") as part:
            part.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
