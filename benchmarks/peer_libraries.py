"""sparsify's and dictionary_learning's own objects, plain and accelerated, side by side: medians of interleaved calls.

    pip install --no-deps eai-sparsify natsort schedulefree dictionary_learning
    python benchmarks/peer_libraries.py [--shape 1024 768 24576] [--k 32] [--dtypes float32 bfloat16] [--rounds 5]

Both sides run in every round, in one process, on the same weights and input, without gradients. The data is that of
field_saes: tokens are sums of a few latents' directions and noise, thresholds such that k latents are active on average.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from field_saes import latent_directions, limit_for, sparse_tokens
from torch import Tensor

import darkmatter_ext as dm

Call = Callable[[Any, Tensor], Any]
DICTIONARY_CALLS: dict[str, Call] = {
    "encode": lambda sae, x: sae.encode(x),
    "encode, decode": lambda sae, x: sae.decode(sae.encode(x)),
    "sae(x)": lambda sae, x: sae(x),
}
CODER_CALLS: dict[str, Call] = {
    "encode": lambda sae, x: sae.encode(x),
    "encode, decode": lambda sae, x: sae.decode(*sae.encode(x)[:2]),
    "sae(x)": lambda sae, x: sae(x),
}


def _without_nnsight() -> None:
    """dictionary_learning imports nnsight for its buffers of activations, in an old version; its classes need none of it."""
    stand_in: Any = types.ModuleType("nnsight")
    stand_in.LanguageModel = object
    sys.modules.setdefault("nnsight", stand_in)


def _saes(rows: Tensor, limit: float, k: int) -> dict[str, Any]:
    """One SAE of each class, float32, whose latents point along `rows` [F, d] and are active above `limit`."""
    import sparsify

    _without_nnsight()
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    n_latents, d = rows.shape
    coder = sparsify.SparseCoder(d, sparsify.SparseCoderConfig(num_latents=n_latents, k=k))
    saes: dict[str, Any] = {"SparseCoder": coder, "AutoEncoderTopK": AutoEncoderTopK(d, n_latents, k)}
    saes |= {"BatchTopKSAE": BatchTopKSAE(d, n_latents, k), "JumpReluAutoEncoder": JumpReluAutoEncoder(d, n_latents)}
    saes |= {"AutoEncoder": AutoEncoder(d, n_latents)}
    for sae in saes.values():
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                value = rows if parameter.shape == rows.shape else rows.mT if parameter.ndim == 2 else torch.zeros(())
                parameter.copy_(value if "threshold" not in name else torch.tensor(limit))
            if "threshold" in sae._buffers:
                sae.threshold.fill_(limit)
    saes["AutoEncoder"].encoder.bias.data.fill_(-limit)
    return saes


def _medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, interleaved."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 768, 24576), metavar=("N", "D", "F"))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--only", nargs="+", help="classes")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    n, d, n_latents = options.shape
    rows = latent_directions(d, n_latents)
    limit = limit_for(sparse_tokens(64, rows), rows, options.k)
    print(
        f"N {n}, d {d}, F {n_latents}, k {options.k}; {dm.build_info()['cpu_isa']}, {torch.get_num_threads()} threads"
    )
    print(f"{'class':<20} {'dtype':<9} {'call':<15} {'library, ms':>12} {'accelerated':>12} {'faster by':>10}  fast")
    for name, sae in _saes(rows, limit, options.k).items():
        if options.only and name not in options.only:
            continue
        for dtype in (getattr(torch, dtype) for dtype in options.dtypes):
            plain = copy.deepcopy(sae).to(dtype)
            fast = dm.accelerate(copy.deepcopy(plain))
            x = sparse_tokens(n, rows).to(dtype)
            for call_name, call in (CODER_CALLS if name == "SparseCoder" else DICTIONARY_CALLS).items():
                before = sum(dm.stats(fast).fast.values())
                calls = {side: partial(call, own, x) for side, own in (("plain", plain), ("fast", fast))}
                took = _medians(calls, options.rounds)
                fast_calls = sum(dm.stats(fast).fast.values()) - before
                print(
                    f"{name:<20} {str(dtype)[6:]:<9} {call_name:<15} {took['plain']:>12.1f} {took['fast']:>12.1f} "
                    f"{took['plain'] / took['fast']:>10.2f}  {fast_calls}",
                    flush=True,
                )


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
