"""The GPU benchmark: ours, peers and floors in one process, interleaved, device events, medians; a table and a JSON file.

    python benchmarks/gpu.py [--rows A B C D small training ..] [--only encode] [--rounds 7] [--seconds 360] [--out FOLDER]

Each encode, decode and pursuit is compared with the float64 oracle on some tokens before it is timed; how is in
gpu_timing.py. Peers are re-expressed in torch (peers.py), so that a machine needs torch and nothing else; the shapes that
they publish are in gpu_published.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_published
import peers
import torch
from gpu_timing import Row, flush_buffer, gpu_slug, line, measure, peak, with_tf32, write
from torch import Tensor

import darkmatter_ext as dm
from darkmatter_ext.ops import reference

SHAPES = {  # N, d, F, k
    "A": (4096, 768, 16384, 32),
    "B": (4096, 2304, 65536, 64),
    "C": (4096, 3584, 131072, 64),
    "D": (16384, 4096, 1048576, 128),
}
PURSUIT = (256, 3584, 131072, 16)  # N, d, F, steps
ORACLE_TOKENS = 16
DENSE_BYTES = 40e9  # a peer whose [N, F] float32 array alone is larger is not tried


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
        extra = {"peak_bytes": peak(topk)}
        if fits:
            extra["peak_bytes_sae_lens"] = peak(dense["sae_lens fp32"])
        yield Row(f"encode topk {name}", topk, dense, {"fp16 matmul": half}, check_topk, flops, extra=extra)
        if fits:
            jump = {
                "sae_lens fp32": lambda: peers.sae_lens_jumprelu(self.x, self.W_enc, self.b_enc, threshold),
                "sae_lens tf32": with_tf32(lambda: peers.sae_lens_jumprelu(self.x, self.W_enc, self.b_enc, threshold)),
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
            "sae_lens tf32": with_tf32(lambda: peers.sae_lens_topk(x, W_enc, b_enc, k)),
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
                f"forward topk {name}", forward, {"sae_lens fp32": sae_lens, "sae_lens tf32": with_tf32(sae_lens)}
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


def pursuit_problem() -> tuple[Tensor, Tensor]:
    """Tokens x [N, d] and a dictionary [F, d] of unit rows."""
    n, d, n_atoms, _ = PURSUIT
    g = torch.Generator("cuda").manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(n_atoms, d, generator=g, device="cuda"), dim=1)
    return torch.randn(n, d, generator=g, device="cuda"), dictionary


def pursuit_row() -> Iterator[Row]:
    """Gradient pursuit against the dense reference, fp32 and TF32, and the fp16 product alone, S steps."""
    n, d, n_atoms, steps = PURSUIT
    x, dictionary = pursuit_problem()
    prepared = dm.prepare_dictionary(dictionary)
    x16, d16 = x.half(), dictionary.half()

    def check() -> None:
        ours = dm.pursuit(x[:4], prepared, 4).to_dense().cpu()
        oracle = reference.pursuit(x[:4].cpu(), dictionary.cpu(), 4).float()
        torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-3)

    def dense() -> Tensor:
        return peers.dense_gradient_pursuit(x, dictionary, steps)

    yield Row(
        f"pursuit gradient {n}x{d}x{n_atoms}, {steps} steps",
        lambda: dm.pursuit(x, prepared, steps),
        {"dense reference fp32": dense, "dense reference tf32": with_tf32(dense)},
        {"fp16 matmul, each step": lambda: [torch.mm(x16, d16.mT) for _ in range(steps)]},
        check,
        flops=2.0 * n * d * n_atoms * steps,
    )


def copy_row() -> Iterator[Row]:
    """What the memory gives: a copy, bytes read plus bytes written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    yield Row("copy 4 GB", lambda: target.copy_(source), {}, bytes=2.0 * source.nbytes)


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "copy": copy_row,
    **{label: lambda label=label: Problem.make(label).rows() for label in SHAPES},
    "pursuit": pursuit_row,
    **gpu_published.ROWS,
}


def _rows(name: str) -> Iterator[Row]:
    torch.cuda.empty_cache()
    return ROWS[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[name for name in ROWS if name != "D"], choices=list(ROWS))
    parser.add_argument("--only", default="", help="of these, the rows whose name begins so")
    parser.add_argument("--label", default="", help="appended to the name of the JSON file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=360, help="start no new row after this time")
    parser.add_argument("--out", type=Path, help="folder for a JSON file named after the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch sees none")
    began, found = time.monotonic(), []
    flush = flush_buffer()
    print(f"{torch.cuda.get_device_name()}\n\n| row | ours, ms | others: ms and ratio to ours |\n|---|---|---|")
    with torch.no_grad():
        for row in (row for name in arguments.rows for row in _rows(name)):
            if not row.name.startswith(arguments.only):
                continue
            if time.monotonic() - began > arguments.seconds:
                print(f"| {row.name} | not run: {arguments.seconds:.0f} seconds were over | |")
                continue
            found.append(measure(row, arguments.rounds, flush))
            print(line(found[-1]), flush=True)
            if arguments.out is not None:  # after every row: a run that is cut keeps what it has
                write(arguments.out / f"{gpu_slug()}{arguments.label}.json", found)


if __name__ == "__main__":
    main()
