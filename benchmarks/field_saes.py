"""SAEs and inputs as users have them: the healthy ones, and those on which a fast path is tempted to be slow.

Shapes: N tokens, d model dimension, F latents, k active.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from torch import Tensor

import darkmatter_ext as dm

# `topk` is SAELens' default of today; `topk_plain` is the one without the flag. A transcoder writes what it did not read.
ARCHITECTURES = ("standard", "topk", "topk_plain", "jumprelu", "gated", "transcoder")
DIRECTIONS = 24  # latents a token is made of
SINK = 300.0  # how much larger the first token is


@dataclass
class Case:
    """One SAE of each of the two kinds, sharing all weights, and the inputs of a call (more than one: in turns)."""

    plain: Any
    accelerated: Any
    inputs: list[Tensor]  # each [N, d]


@functools.lru_cache(maxsize=2)
def latent_directions(d: int, n_latents: int) -> Tensor:
    """Unit rows [F, d], float32."""
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(n_latents, d, generator=g), dim=1)


def sparse_tokens(n: int, rows: Tensor, seed: int = 1) -> Tensor:
    """x [N, d] of a few of the latents' own directions and some noise."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(rows), (n, DIRECTIONS), generator=g)
    strength = 2 + 2 * torch.randn(n, DIRECTIONS, generator=g).abs()
    return peers.embedding_bag_decode(strength, chosen, rows) + 0.05 * torch.randn(n, rows.shape[1], generator=g)


def _gaussian(n: int, rows: Tensor) -> Tensor:
    """x [N, d] without structure."""
    return torch.randn(n, rows.shape[1], generator=torch.Generator().manual_seed(2))


def _sink(x: Tensor) -> Tensor:
    return torch.cat([SINK * x[:1], x[1:]])


def _every_second(x: Tensor, other: Tensor) -> Tensor:
    """x with every second row that of `other`, from the first row on."""
    return torch.where(torch.arange(len(x))[:, None] % 2 == 0, other, x)


# Kind of data: the inputs, from N and the directions of the latents that are alive.
INPUTS: dict[str, Callable[[int, Tensor], list[Tensor]]] = {
    "sparse": lambda n, rows: [sparse_tokens(n, rows)],
    "dense": lambda n, rows: [_gaussian(n, rows)],
    "half-dead": lambda n, rows: [sparse_tokens(n, rows[len(rows) // 2 :])],
    "zeroed": lambda n, rows: [sparse_tokens(n, rows[len(rows) // 10 :])],
    "equal": lambda n, rows: [sparse_tokens(n, rows) + 2 * rows[0]],
    "sink": lambda n, rows: [_sink(sparse_tokens(n, rows))],
    "padding": lambda n, rows: [_every_second(sparse_tokens(n, rows), torch.zeros(()))],
    "mixed": lambda n, rows: [_every_second(sparse_tokens(n, rows), 3 * _gaussian(n, rows))],
    "alternating": lambda n, rows: [sparse_tokens(n, rows), 3 * _gaussian(n, rows)],
}


def make_case(architecture: str, data: str, n: int, d: int, n_latents: int, dtype: torch.dtype) -> Case:
    """An SAE of about k = min(32, F / 32) active latents on sparse data, twice, with inputs of a kind of INPUTS.

    half-dead: half the encoder's columns are zero, their biases are not. zeroed: a tenth of the latents are zero in all
    their weights, so that their score is exactly the threshold. equal: an eighth of the latents are the same one. dense:
    half the latents are active (of a topk SAE: no structure). mixed: every second token is dense. sink: the first token
    is SINK times as large. padding: every second row is zero. alternating: one sparse input, then one dense.
    """
    rows, k = latent_directions(d, n_latents), min(32, n_latents // 32)
    limit = 0.0 if data == "dense" else limit_for(sparse_tokens(64, rows), rows, k)
    if data == "equal":
        rows = torch.cat([rows[:1].expand(n_latents // 8, -1), rows[n_latents // 8 :]])
    plain = _sae(architecture, rows, limit, k, dtype)
    if data == "half-dead":
        plain.W_enc.data[:, : n_latents // 2] = 0
    elif data == "zeroed":
        _zero_latents(plain, n_latents // 10)
    accelerated = copy.copy(plain)  # another object, the same parameters and hooks
    dm.accelerate(accelerated)
    return Case(plain, accelerated, [x.to(dtype) for x in INPUTS[data](n, rows)])


def limit_for(x: Tensor, rows: Tensor, k: int) -> float:
    """What k scores a token exceed on average."""
    scores = (x @ rows.mT).flatten()
    return scores.kthvalue(scores.numel() - k * len(x)).values.item()


def _sae(architecture: str, rows: Tensor, limit: float, k: int, dtype: torch.dtype) -> Any:
    """A SAELens SAE whose latents point along `rows` and are active above `limit`."""
    from sae_lens.registry import get_sae_class

    options: dict[str, Any] = {}
    if architecture.startswith("topk"):
        options = {"k": k, "rescale_acts_by_decoder_norm": architecture == "topk"}
    elif architecture == "transcoder":
        options = {"d_out": rows.shape[1], "apply_b_dec_to_input": False}
    sae_class, cfg_class = get_sae_class(architecture.removesuffix("_plain"))
    n_latents, d = rows.shape
    name = str(dtype).removeprefix("torch.")
    sae: Any = sae_class(cfg_class(d_in=d, d_sae=n_latents, dtype=name, device="cpu", **options))
    norms = 0.5 + rows[:, :1].abs()  # that rescaling must see; equal latents have equal ones
    sae.W_enc.data = rows.mT.contiguous().to(dtype)
    sae.W_dec.data = (norms * rows).to(dtype)
    for bias in ("b_enc", "b_gate", "b_mag", "r_mag", "b_dec"):
        if getattr(sae, bias, None) is not None:
            getattr(sae, bias).data.zero_()
    if architecture == "jumprelu":
        sae.threshold.data.fill_(limit)
    elif architecture == "gated":
        sae.b_gate.data.fill_(-limit)
    elif not architecture.startswith("topk"):
        sae.b_enc.data.fill_(-limit)
    return sae


def _zero_latents(sae: Any, count: int) -> None:
    """The first `count` latents as people zero dead ones: all their weights and biases, but no thresholds."""
    sae.W_enc.data[:, :count] = 0
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # SAELens would divide zero by zero
        sae.W_dec.data[:count] = 0
    for bias in ("b_enc", "b_gate", "b_mag"):
        if getattr(sae, bias, None) is not None:
            getattr(sae, bias).data[:count] = 0
