"""The drop-in on a GPU: SAELens' encode, decode and sae(x) against the accelerated ones, over SAEs, dtypes and tokens.

    python benchmarks/gpu_drop_in.py [--tokens 8 64 256 1024 4096] [--out FOLDER]

Each twice: by the ops alone, and with the rules that leave small calls to SAELens (`saes/stepping_aside.py`), whose limits
come from this table. Needs sae_lens. Times are medians with device events, so the host's part shows where it is the longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_timing import gpu_slug, median_ms

import darkmatter_ext as dm
from darkmatter_ext.runtime.storage import atomic_file
from darkmatter_ext.saes import stepping_aside

D_IN, D_SAE, K = 768, 24576, 32
LIMITS = ("SMALL_DECODE_ON_GPU", "SMALL_ENCODE_ON_GPU", "SMALL_FORWARD_ON_GPU")
CASES = [  # architecture, dtype, TF32
    ("topk", torch.float32, False),
    ("jumprelu", torch.float32, False),
    ("gated", torch.float32, False),
    ("topk", torch.bfloat16, False),
    ("jumprelu", torch.bfloat16, False),
    ("topk", torch.float32, True),
    ("jumprelu", torch.float32, True),
]


def make(architecture: str, dtype: torch.dtype) -> Any:
    """A SAELens object with about 32 of its latents active on normal tokens; the same numbers in every call."""
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class(architecture)
    options: dict[str, Any] = {"k": K} if architecture == "topk" else {}
    name = str(dtype).removeprefix("torch.")
    sae = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, dtype=name, device="cpu", **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=g) / D_IN**0.5)
        if architecture == "gated":
            sae.get_parameter("b_gate").sub_(3.0)
        elif architecture == "jumprelu":
            sae.get_parameter("threshold").copy_(2.9 + torch.rand(D_SAE, generator=g) * 0.3)
    return sae.cuda()


def rows(architecture: str, dtype: torch.dtype, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """A row for every number of tokens."""
    plain, fast = make(architecture, dtype), dm.accelerate(make(architecture, dtype))
    for n in tokens:
        x = torch.randn(n, D_IN, device="cuda", dtype=dtype)
        acts = plain.encode(x)
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "encode": (lambda x=x: plain.encode(x), lambda x=x: fast.encode(x)),
            "decode": (lambda acts=acts: plain.decode(acts), lambda acts=acts: fast.decode(acts)),
            "sae(x)": (lambda x=x: plain(x), lambda x=x: fast(x)),
        }
        yield {
            "n": n,
            "l0": (acts != 0).sum(1).float().mean().item(),
            "differs": int(((acts != 0) != (fast.encode(x) != 0)).sum()),
            "times": {name: [median_ms(theirs, 7, 2), median_ms(ours, 7, 2)] for name, (theirs, ours) in pairs.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 64, 256, 1024, 4096])
    parser.add_argument("--out", type=Path, help="folder for a JSON file named after the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_drop_in.py needs a CUDA device, and torch sees none")
    rules, found = {name: getattr(stepping_aside, name) for name in LIMITS}, []
    with torch.no_grad():
        for by_ops_alone in (True, False):
            for name, rule in rules.items():
                setattr(stepping_aside, name, stepping_aside.OnGpu(0, 0, 0) if by_ops_alone else rule)
            for architecture, dtype, tf32 in CASES:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                for row in rows(architecture, dtype, arguments.tokens):
                    about = {"arch": architecture, "dtype": str(dtype), "label": "tf32" if tf32 else ""}
                    found.append({**about, **row, "by_ops_alone": by_ops_alone})
                    times = "; ".join(f"{k} {a:.3f} / {b:.3f} ms = {a / b:.2f}x" for k, (a, b) in row["times"].items())
                    print(
                        f"{'ops ' if by_ops_alone else 'rule'} {architecture} {dtype} tf32 {tf32} N {row['n']}: {times}"
                    )
    if arguments.out is not None:
        with atomic_file(arguments.out / f"{gpu_slug()}-drop-in.json") as part:
            part.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
