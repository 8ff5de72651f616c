"""What the certified bound and the plan assume of a GPU, asked of the chip itself.

    python benchmarks/gpu_probe.py [--out FOLDER]

1. How the tensor cores add (float16 in, float32 out, through the product the screen uses): how far below the running sum a
   term may lie before it is lost, and the worst error found as a share of what csrc/cuda/screen/certificate.cuh allows.
2. The rate of a buffer that stays in L2. 3. float16 against bfloat16 matrix products on random data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_timing import gpu_slug, median_ms

from darkmatter_ext.ops.encode import screen_intervals
from darkmatter_ext.runtime.storage import atomic_file


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [n, d] times b [m, d] transposed, float16 in, float32 out."""
    return torch.mm(a, b.mT, out_dtype=torch.float32)


def kept_bits() -> dict[str, Any]:
    """1 plus fifteen times 2^-q, at the first place and after: which q still counts."""
    found = {}
    for q in range(10, 31):
        x = torch.full((128, 256), 0.0, device="cuda", dtype=torch.float16)
        w = torch.zeros(128, 256, device="cuda", dtype=torch.float16)
        x[:, 0], w[:, 0] = 1.0, 1.0
        x[:, 1:16], w[:, 1:16] = 2.0 ** -(q // 2), 2.0 ** -(q - q // 2)
        value = _product(x, w)[0, 0].double().item()
        found[str(q)] = (value - 1.0) / (15 * 2.0**-q)
    return found


def worst_error() -> dict[str, Any]:
    """Largest |error| over the accumulation error the screen allows, on data that adds up and data that cancels."""
    found = {}
    for d in (768, 2304, 3584, 4096):
        allowed = (1.25 * d + 64) * 2.0**-23
        for kind in ("gaussian", "positive", "one_large"):
            x = torch.randn(1024, d, device="cuda")
            w = torch.randn(1024, d, device="cuda")
            if kind == "positive":
                x, w = x.abs(), w.abs()
            if kind == "one_large":
                x[:, 0] *= 1000
            x, w = x.half(), w.half()
            error = (_product(x, w).double() - x.double() @ w.double().mT).abs()
            norms = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
            found[f"{d} {kind}"] = (error / norms).max().item() / allowed
    return found


def bound_share() -> dict[str, Any]:
    """Through the package's own path: largest |error| over the certified bound, and whether it ever exceeded it."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, W_enc = torch.randn(512, 2304, device="cuda").to(dtype), torch.randn(2304, 16384, device="cuda").to(dtype)
        lower, upper, screened = screen_intervals(x, W_enc, W_enc[0] * 0)
        h = x.double() @ W_enc.double()
        middle, half = (lower.double() + upper) / 2, (upper.double() - lower) / 2
        inside = ((lower <= h) & (h <= upper)).all().item()
        found[str(dtype)] = {
            "worst": ((h - middle).abs() / half).max().item(), "inside": inside, "screened": screened.all().item()
        }  # fmt: skip
    return found


def rates() -> dict[str, Any]:
    """L2: a 16 MB buffer added to itself a hundred times in a graph. Matrix products: 8192 cubed."""
    small = torch.randn(4 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    small.mul_(1.0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(100):
            small.mul_(1.0)
    found = {"l2_gb_per_s": 100 * 2 * small.nbytes / median_ms(graph.replay, 20, 3) / 1e6}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        found[f"tflops_{dtype}".replace("torch.", "")] = 2 * 8192**3 / median_ms(lambda a=a, b=b: a @ b, 20, 3) / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for a JSON file named after the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_probe.py needs a CUDA device, and torch sees none")
    torch.manual_seed(0)
    found = {
        "gpu": torch.cuda.get_device_name(),
        "share of a term 2^-q below the sum that is kept": kept_bits(),
        "worst accumulation error, share of what is allowed": worst_error(),
        "worst error of the screen, share of its bound": bound_share(),
        "rates": rates(),
    }
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        with atomic_file(arguments.out / f"{gpu_slug()}-probe.json") as part:
            part.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
