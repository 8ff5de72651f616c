"""What every CUDA kernel must move and multiply at shape C, the time that takes at least, and what it takes.

    python benchmarks/gpu_budget.py

Prints the table of README.md, "Budget". The floor is bytes over bandwidth or operations over rate, whichever is longer, at
the rates that gpu_probe.py and gpu_profile.py measured on an H200. Where a kernel has run there (results/), it took so many
times its floor; on the other GPUs, and in what has not run, it is expected to take as many: a prediction, no measurement.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
N, D, F, K = 4096, 3584, 131072, 64
CANDIDATES = 1.19  # rows a token whose exact sums are made, of each of its best k
MARKED = 64  # tokens that take the exact path
LARGE_K = 1024
PURSUIT_TOKENS = 256


class Gpu(NamedTuple):
    """Rates a second: bytes of memory, bytes of L2, operations of float16 tensor cores, float64 multiply-adds."""

    memory: float
    l2: float
    half: float
    double: float


# H200: measured, but for float64 (64 a clock on each of 132 multiprocessors at 1.75 GHz). The others: data sheets, times
# the share of them that the H200 reached of its own (0.89 of 4.8 TB/s, 0.78 of 989 TFLOP/s); L2 by the clock.
H200 = Gpu(4.28e12, 5.38e12, 767e12, 14.8e12)
GPUS = {
    "H200": H200,
    "H100": Gpu(0.89 * 3.35e12, 5.38e12, H200.half, H200.double),
    "A100 80 GB": Gpu(0.89 * 2.04e12, 3.6e12, 0.78 * 312e12, 4.9e12),
}


class Part(NamedTuple):
    """One kernel, or what stands in its place: bytes and operations, and where its time on the H200 is."""

    name: str
    memory: float = 0.0
    l2: float = 0.0
    half: float = 0.0
    double: float = 0.0
    run: str = ""  # in nvidia-h200-profile.json
    kernels: tuple[str, ...] = ()
    as_part: str = ""  # not run: takes as many times its floor as that part
    hopper: bool = False
    took: float = 0.0  # milliseconds, of a run whose profile is not kept (README.md has it)

    def floor(self, gpu: Gpu) -> float:
        """Milliseconds."""
        return 1e3 * max(self.memory / gpu.memory, self.l2 / gpu.l2, self.half / gpu.half, self.double / gpu.double)


ROW = 4 * D  # bytes of a float32 row
WEIGHTS, CODES = F * ROW, 2 * F * D
PARTS = [
    Part("rounding of the tokens", memory=N * D * (4 + 4 + 2), run="C topk", kernels=("round_tokens",)),
    Part(
        "products and filter in one, top-k", half=2 * N * D * F, run="C topk", hopper=True,
        kernels=("fused_filter", "nvjet", "filter_topk", "raise_limits"),
    ),
    Part(
        "products and filter in one, threshold", half=2 * N * D * F, run="C threshold", kernels=("fused_filter",),
        hopper=True,
    ),
    Part("filter of the chunks (scores in L2)", l2=4 * N * F, took=1.5),
    Part("exact sums, top-k", memory=N * K * CANDIDATES * ROW, run="C topk", kernels=("finish_topk",)),
    Part("exact sums, k 1024", memory=N * LARGE_K * CANDIDATES * ROW, as_part="exact sums, top-k"),
    Part("exact sums, threshold", memory=N * K * CANDIDATES * ROW, run="C threshold", kernels=("finish_threshold",)),
    Part("exact sums, threshold with a capacity", memory=N * K * CANDIDATES * ROW, as_part="exact sums, threshold"),
    Part(
        f"exact path, {MARKED} tokens", memory=MARKED / 8 * WEIGHTS, double=MARKED * F * D, run="C odd", kernels=("exact_topk",)
    ),
    Part("decode", l2=N * K * ROW, run="C decode", kernels=("sparse_decode",)),
    Part("gradient of W_dec", memory=WEIGHTS, l2=N * K * ROW, run="C outer", kernels=("decoder_outer",)),
    Part("packing: transposed rows", memory=2 * WEIGHTS, run="C prepare", kernels=("transpose",)),
    Part("packing: codes and bounds", memory=2 * WEIGHTS + CODES, run="C prepare", kernels=("round_latents",)),
    Part("support with a capacity (of dense acts)", memory=2 * 4 * N * F, as_part="rounding of the tokens"),
    Part(
        "pursuit: products of 8 steps", memory=8 * CODES, half=8 * 2 * PURSUIT_TOKENS * D * F, run="pursuit, 8 steps",
        kernels=("nvjet",),
    ),
    Part("pursuit: filter", l2=8 * 4 * PURSUIT_TOKENS * F, run="pursuit, 8 steps", kernels=("filter_topk",)),
]  # fmt: skip


def measured(part: Part, profile: dict) -> float | None:
    """Milliseconds on the H200."""
    if not part.run:
        return part.took or None
    rows = profile[part.run]["kernels"]
    return sum(row["us"] for row in rows if row["kernel"].startswith(part.kernels)) / 1e3


def table() -> list[str]:
    profile = json.loads((RESULTS / "nvidia-h200-profile.json").read_text())
    times = {part.name: measured(part, profile) for part in PARTS}
    others = [name for name in GPUS if name != "H200"]
    head = [
        "part, shape C",
        "floor, H200",
        "measured, H200",
        "times the floor",
        *(f"predicted, {name}" for name in others),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for part in PARTS:
        floor, took = part.floor(H200), times[part.name]
        like = next((each for each in PARTS if each.name == part.as_part), part)
        factor = (times[like.name] or 0.0) / like.floor(H200)
        shown = f"{took:.2f}" if took else f"(predicted {floor * factor:.2f})"
        there = [
            "-" if part.hopper and name == "A100 80 GB" else f"{part.floor(GPUS[name]) * factor:.2f}" for name in others
        ]
        lines.append(f"| {part.name} | {floor:.2f} | {shown} | {factor:.1f} | " + " | ".join(there) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
