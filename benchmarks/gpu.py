"""The GPU benchmark: ours, peers and floors in one process, interleaved, device events, medians; a table and a JSON file.

    python benchmarks/gpu.py [--shapes A B C D] [--rounds 7] [--seconds 360] [--out FOLDER]

Each encode, decode and pursuit is compared with the float64 oracle on some tokens before it is timed. Before every timed run
the L2 is overwritten. Peers are re-expressed in torch (peers.py), so that a machine needs torch and nothing else. A peer
that does not fit into memory is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

import darkmatter_ext as dm
from darkmatter_ext.ops import reference
from darkmatter_ext.report.result import provenance
from darkmatter_ext.runtime.storage import atomic_file

SHAPES = {  # N, d, F, k
    "A": (4096, 768, 16384, 32),
    "B": (4096, 2304, 65536, 64),
    "C": (4096, 3584, 131072, 64),
    "D": (16384, 4096, 1048576, 128),
}
PURSUIT = (256, 3584, 131072, 16)  # N, d, F, steps
ORACLE_TOKENS = 16
DENSE_BYTES = 40e9  # a peer whose [N, F] float32 array alone is larger is not tried
FLUSH_BYTES = 256 << 20


@dataclass
class Row:
    """One line of the table."""

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    floors: dict[str, Callable[[], Any]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    flops: float = 0.0  # of ours' screen
    bytes: float = 0.0  # that ours must read or write
    extra: dict[str, Any] = field(default_factory=dict)


def _with_tf32(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return function()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def _peak(function: Callable[[], Any]) -> int:
    """Bytes allocated at the worst moment of a call, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass
class Problem:
    """An SAE and tokens on the GPU: Gaussian, the worst case for screening and for gathers."""

    label: str
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    k: int

    @classmethod
    def make(cls, label: str) -> Problem:
        n, d, n_latents, k = SHAPES[label]
        g = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(n, d, generator=g, device="cuda")
        W_dec = torch.randn(n_latents, d, generator=g, device="cuda").div_(d**0.5)
        return cls(label, x, W_dec.mT.contiguous(), torch.zeros(n_latents, device="cuda"), W_dec, k)

    def rows(self) -> Iterator[Row]:
        """encode (top-k, JumpReLU), decode and forward of this shape."""
        n, d, n_latents = len(self.x), *self.W_enc.shape
        prepared = dm.prepare_encoder(self.W_enc, self.b_enc)
        acts = dm.topk_encode(self.x, self.W_enc, self.b_enc, self.k, prepared=prepared)
        threshold = acts.values[:, -1].mean()
        name, flops = f"{self.label} {n}x{d}x{n_latents} k {self.k} float32", 2.0 * n * d * n_latents

        def topk() -> Any:
            return dm.topk_encode(self.x, self.W_enc, self.b_enc, self.k, prepared=prepared)

        def jumprelu() -> Any:
            return dm.threshold_encode(self.x, self.W_enc, self.b_enc, threshold, prepared=prepared)

        def check_topk() -> None:
            x = self.x[:: max(1, n // ORACLE_TOKENS)][:ORACLE_TOKENS]
            ours = dm.topk_encode(x, self.W_enc, self.b_enc, self.k, prepared=prepared)
            oracle = _oracle(x, self.W_enc, self.b_enc, self.k)
            assert torch.equal(ours.indices, oracle[1]), f"encode {name}: latents differ from the float64 oracle"
            torch.testing.assert_close(ours.values, oracle[0], rtol=1.2e-7, atol=0)

        fits = 4.0 * n * n_latents <= DENSE_BYTES
        half = self._half_product()
        low = (self.x.bfloat16(), self.W_enc.bfloat16(), self.b_enc.bfloat16()) if fits else None
        dense = self._dense_peers(low) if fits else {}
        extra = {"peak_bytes": _peak(topk)}
        if fits:
            extra["peak_bytes_sae_lens"] = _peak(dense["sae_lens fp32"])
        yield Row(f"encode topk {name}", topk, dense, {"fp16 matmul": half}, check_topk, flops, extra=extra)
        if fits:
            jump = {
                "sae_lens fp32": lambda: peers.sae_lens_jumprelu(self.x, self.W_enc, self.b_enc, threshold),
                "sae_lens tf32": _with_tf32(lambda: peers.sae_lens_jumprelu(self.x, self.W_enc, self.b_enc, threshold)),
            }
            yield Row(f"encode jumprelu {name}", jumprelu, jump, {"fp16 matmul": half}, flops=flops)
        del low, dense
        yield from self._decode_rows(acts, name, topk, fits)

    def _half_product(self) -> Callable[[], Any]:
        x, weight = self.x.half(), self.W_dec.half()  # any fp16 matrix of that size
        chunk = torch.empty(len(x), min(len(weight), 131072), dtype=torch.float16, device="cuda")

        def run() -> None:
            for part in weight.split(chunk.shape[1]):
                torch.mm(x, part.mT, out=chunk[:, : len(part)])

        return run

    def _dense_peers(self, low: Any) -> dict[str, Callable[[], Any]]:
        x, W_enc, b_enc, k = self.x, self.W_enc, self.b_enc, self.k
        return {
            "sae_lens fp32": lambda: peers.sae_lens_topk(x, W_enc, b_enc, k),
            "sae_lens tf32": _with_tf32(lambda: peers.sae_lens_topk(x, W_enc, b_enc, k)),
            "sae_lens bf16 (another answer)": lambda: peers.sae_lens_topk(low[0], low[1], low[2], k),
            "matmul + topk fp32": lambda: peers.matmul_topk(x, W_enc, b_enc, k),
            "sparsify fp32": lambda: peers.FusedEncoder.apply(x, self.W_dec, b_enc, k),
        }

    def _decode_rows(self, acts: Any, name: str, topk: Callable[[], Any], fits: bool) -> Iterator[Row]:
        n, d = self.x.shape
        gathered = 4.0 * n * d * (self.k + 1)

        def decode() -> Any:
            return dm.sparse_decode(acts, self.W_dec)

        def check() -> None:
            few = dm.SparseActs.fixed(acts.values[:ORACLE_TOKENS], acts.indices[:ORACLE_TOKENS], acts.d_sae)
            rows = self.W_dec[few.indices].double()
            oracle = (few.values.double()[:, :, None] * rows).sum(1).float()
            torch.testing.assert_close(dm.sparse_decode(few, self.W_dec), oracle, rtol=1.2e-7, atol=1e-12)

        others: dict[str, Callable[[], Any]] = {
            "embedding_bag": lambda: peers.embedding_bag_decode(acts.values, acts.indices, self.W_dec)
        }
        if gathered < 16e9:
            others["gathered rows (flex-sae, sparsify)"] = lambda: peers.gathered_decode(
                acts.values, acts.indices, self.W_dec
            )
        if fits:
            dense = acts.to_dense()
            others["dense matmul fp32"] = lambda: dense @ self.W_dec
        yield Row(f"decode {name}", decode, others, check=check, bytes=gathered)
        if fits:

            def forward() -> Any:
                return dm.sparse_decode(topk(), self.W_dec)

            def sae_lens() -> Any:
                return peers.sae_lens_topk(self.x, self.W_enc, self.b_enc, self.k) @ self.W_dec

            yield Row(
                f"forward topk {name}", forward, {"sae_lens fp32": sae_lens, "sae_lens tf32": _with_tf32(sae_lens)}
            )


def _oracle(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The twin's answer, latents in blocks so that the float64 weights fit."""
    h = torch.cat(
        [
            reference.pre_activations(x, W_enc[:, start : start + 65536], b_enc[start : start + 65536])
            for start in range(0, W_enc.shape[1], 65536)
        ],
        dim=1,
    )
    values, indices = h.sort(dim=1, descending=True, stable=True)
    return values[:, :k].relu(), indices[:, :k]


def pursuit_row() -> Row:
    """Gradient pursuit against the dense reference, fp32 and TF32, and the fp16 product alone, S steps."""
    n, d, n_atoms, steps = PURSUIT
    g = torch.Generator("cuda").manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(n_atoms, d, generator=g, device="cuda"), dim=1)
    x = torch.randn(n, d, generator=g, device="cuda")
    prepared = dm.prepare_dictionary(dictionary)
    x16, d16 = x.half(), dictionary.half()

    def check() -> None:
        ours = dm.pursuit(x[:4], prepared, 4).to_dense().cpu()
        oracle = reference.pursuit(x[:4].cpu(), dictionary.cpu(), 4).float()
        torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-3)

    def dense() -> Tensor:
        return peers.dense_gradient_pursuit(x, dictionary, steps)

    return Row(
        f"pursuit gradient {n}x{d}x{n_atoms}, {steps} steps",
        lambda: dm.pursuit(x, prepared, steps),
        {"dense reference fp32": dense, "dense reference tf32": _with_tf32(dense)},
        {"fp16 matmul, each step": lambda: [torch.mm(x16, d16.mT) for _ in range(steps)]},
        check,
        flops=2.0 * n * d * n_atoms * steps,
    )


def copy_row() -> Row:
    """What the memory gives: a copy, bytes read plus bytes written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return Row("copy 4 GB", lambda: target.copy_(source), {}, bytes=2.0 * source.nbytes)


def _time(function: Callable[[], Any], flush: Tensor) -> float:
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(row: Row, rounds: int, flush: Tensor) -> dict[str, Any]:
    """Check, warm up, then time every participant once a round."""
    row.check()
    participants = {"ours": row.ours, **row.peers, **{f"floor: {name}": run for name, run in row.floors.items()}}
    failed, warm = {}, {}
    for name, function in list(participants.items()):
        try:
            _time(function, flush)
            warm[name] = _time(function, flush)
        except torch.cuda.OutOfMemoryError:
            if name == "ours":
                raise
            failed[name] = "out of memory"
            del participants[name]
            torch.cuda.empty_cache()
    rounds = max(3, min(rounds, int(4000 / max(sum(warm.values()), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in participants}
    for _ in range(rounds):
        for name, function in participants.items():
            times[name].append(_time(function, flush))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["ours"]
    return {
        "row": row.name,
        "rounds": rounds,
        "median_ms": medians,
        "spread_ms": {name: [min(values), max(values)] for name, values in times.items()},
        "ratio_to_ours": {name: median / ours for name, median in medians.items() if name != "ours"},
        "not_run": failed,
        "tflops": row.flops / ours / 1e9 if row.flops else None,
        "gb_per_s": row.bytes / ours / 1e6 if row.bytes else None,
        **row.extra,
    }


def _line(found: dict[str, Any]) -> str:
    others = "; ".join(
        f"{name} {found['median_ms'][name]:.3f} ms = {ratio:.2f}x" for name, ratio in found["ratio_to_ours"].items()
    )
    rate = (
        f" {found['tflops']:.0f} TFLOP/s"
        if found["tflops"]
        else f" {found['gb_per_s']:.0f} GB/s"
        if found["gb_per_s"]
        else ""
    )
    return f"| {found['row']} | {found['median_ms']['ours']:.3f}{rate} | {others} |"


def _all_rows(shapes: list[str]) -> Iterator[Row]:
    yield copy_row()
    for label in shapes:
        torch.cuda.empty_cache()
        yield from Problem.make(label).rows()
    torch.cuda.empty_cache()
    yield pursuit_row()


def gpu_slug() -> str:
    """The GPU's name as a file name: nvidia-h200."""
    return "-".join(torch.cuda.get_device_name().lower().split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B", "C"], choices=list(SHAPES), help="shapes to run")
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--label", default="", help="appended to the name of the JSON file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=360, help="start no new row after this time")
    parser.add_argument("--out", type=Path, help="folder for a JSON file named after the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch sees none")
    began, found = time.monotonic(), []
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    print(f"{torch.cuda.get_device_name()}\n\n| row | ours, ms | others: ms and ratio to ours |\n|---|---|---|")
    with torch.no_grad():
        for row in _all_rows(arguments.shapes):
            if not row.name.startswith(arguments.only):
                continue
            if time.monotonic() - began > arguments.seconds:
                print(f"| {row.name} | not run: {arguments.seconds:.0f} seconds were over | |")
                continue
            found.append(measure(row, arguments.rounds, flush))
            print(_line(found[-1]), flush=True)
            if arguments.out is not None:  # after every row: a run that is cut keeps what it has
                _write(arguments.out / f"{gpu_slug()}{arguments.label}.json", found)


def _write(path: Path, found: list[dict[str, Any]]) -> None:
    content = {"gpu": torch.cuda.get_device_name(), "provenance": provenance("cuda"), "rows": found}
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
