"""Shapes, data and SAEs of the CPU benchmark, each checked against the float64 oracle before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from torch import Tensor

import darkmatter_ext as dm
from darkmatter_ext.ops import reference
from darkmatter_ext.ops.decode import find_support

SHAPES = (  # N, d, F, k
    (1024, 768, 24576, 32),
    (1024, 2304, 16384, 64),
    (256, 2304, 65536, 64),
    (64, 768, 24576, 32),
    (1, 2304, 65536, 64),
)
ORACLE_TOKENS = 64  # tokens a check compares with the float64 oracle, spread over the batch


@dataclass
class Row:
    """One line of the table: ours, the peers it is compared with, the floors it stands on."""

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    floors: dict[str, Callable[[], Any]]
    check: Callable[[], None]


def gaussian(n: int, d: int, n_latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [N, d] and W_enc [d, F] without any structure: the worst case for screening."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g).to(dtype), (torch.randn(d, n_latents, generator=g) / d**0.5).to(dtype)


def sae_like(n: int, d: int, n_latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x made of 48 of the latents' own unit directions plus noise, as an SAE's activations are."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_latents, d, generator=g), dim=1)
    chosen = torch.randint(n_latents, (n, 48), generator=g)
    strength = 2 + torch.randn(n, 48, generator=g).abs() * 2
    x = peers.embedding_bag_decode(strength, chosen, directions) + 0.05 * torch.randn(n, d, generator=g)
    return x.to(dtype), directions.mT.contiguous().to(dtype)


DATA = {"gaussian": gaussian, "sae_like": sae_like}


@dataclass
class Problem:
    """An SAE and a batch of activations, for every operation."""

    label: str
    x: Tensor  # [N, d]
    sae: Any  # SAELens object
    k: int
    architecture: str

    @classmethod
    def make(cls, data: str, shape: tuple[int, int, int, int], architecture: str, dtype: torch.dtype) -> Problem:
        n, d, n_latents, k = shape
        x, W_enc = DATA[data](n, d, n_latents, dtype)
        sae = _sae(architecture, W_enc, k)
        if architecture == "jumprelu":  # a threshold that leaves k latents a token on average
            sample = x[:64].float() @ W_enc.float()
            sae.threshold.data.fill_(sample.flatten().kthvalue(sample.numel() - k * len(sample)).values.item())
        name = str(dtype).removeprefix("torch.")
        return cls(f"{architecture} {data} {n}x{d}x{n_latents} k{k} {name}", x, sae, k, architecture)

    def encode(self, prepared: dm.PreparedEncoder) -> dm.SparseActs:
        sae = self.sae
        if self.architecture == "topk":
            return dm.topk_encode(self.x, sae.W_enc, sae.b_enc, self.k, prepared=prepared)
        return dm.threshold_encode(self.x, sae.W_enc, sae.b_enc, sae.threshold, prepared=prepared)

    def check(self, acts: dm.SparseActs) -> None:
        """Active sets and values of some tokens against the float64 oracle (last bit of the rounding aside)."""
        rows = torch.linspace(0, len(self.x) - 1, min(ORACLE_TOKENS, len(self.x))).long()
        torch.testing.assert_close(acts.to_dense()[rows], self.oracle(self.x[rows]).to_dense(), rtol=2e-7, atol=1e-12)

    def oracle(self, x: Tensor) -> dm.SparseActs:
        """The defined answer, from float64 pre-activations."""
        sae = self.sae
        if self.architecture == "topk":
            return reference.topk_encode(x, sae.W_enc, sae.b_enc, self.k)
        return reference.threshold_encode(x, sae.W_enc, sae.b_enc, sae.threshold)

    def encode_row(self) -> Row:
        """Encode alone, weights prepared as SAELens' weights are."""
        sae, x = self.sae, self.x
        prepared = dm.prepare_encoder(sae.W_enc, sae.b_enc)
        weight, low, x_low = sae.W_enc.mT.contiguous(), sae.W_enc.mT.bfloat16().contiguous(), x.bfloat16()
        others: dict[str, Callable[[], Any]] = {"sae_lens encode": lambda: sae.encode(x)}
        if self.architecture == "topk":
            others["torch matmul + topk"] = lambda: peers.matmul_topk(x, sae.W_enc, sae.b_enc, self.k)
        floors = {"bf16 matmul, chunked": lambda: peers.chunked_matmul(x_low, low)}
        if x.dtype != torch.bfloat16:
            floors["matmul, chunked"] = lambda: peers.chunked_matmul(x, weight)
        return Row(
            f"encode  {self.label}",
            lambda: self.encode(prepared),
            others,
            floors,
            lambda: self.check(self.encode(prepared)),
        )

    def forward_row(self) -> Row:
        """Encode and decode, sparse in between, against SAELens' forward."""
        sae, x = self.sae, self.x
        prepared = dm.prepare_encoder(sae.W_enc, sae.b_enc)

        def ours() -> Tensor:
            return dm.sparse_decode(self.encode(prepared), sae.W_dec, sae.b_dec)

        def check() -> None:
            oracle = reference.sparse_decode(self.oracle(x), sae.W_dec, sae.b_dec)
            torch.testing.assert_close(ours(), oracle, rtol=2e-7, atol=1e-12)

        return Row(f"forward {self.label}", ours, {"sae_lens forward": lambda: sae(x)}, {}, check)

    def decode_row(self) -> Row:
        """Decode alone, from the active latents."""
        sae = self.sae
        acts = self.encode(dm.prepare_encoder(sae.W_enc, sae.b_enc))
        dense = acts.to_dense()
        others: dict[str, Callable[[], Any]] = {"sae_lens decode": lambda: sae.decode(dense)}
        if not acts.is_ragged:
            others["embedding_bag"] = lambda: peers.embedding_bag_decode(acts.values, acts.indices, sae.W_dec)

        def check() -> None:
            oracle = reference.sparse_decode(acts, sae.W_dec, sae.b_dec)
            torch.testing.assert_close(dm.sparse_decode(acts, sae.W_dec, sae.b_dec), oracle, rtol=2e-7, atol=1e-12)

        return Row(f"decode  {self.label}", lambda: dm.sparse_decode(acts, sae.W_dec, sae.b_dec), others, {}, check)

    def training_row(self) -> Row:
        """Forward and backward to all weights and x: what a training step does besides the optimiser."""
        sae = self.sae.requires_grad_(True)
        x = self.x.clone().requires_grad_()
        leaves = [sae.W_enc, sae.b_enc, sae.W_dec, x]
        weight = sae.W_enc.mT

        def gradients(x_hat: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad((x_hat * self.x).sum(), leaves)

        def ours() -> tuple[Tensor, ...]:
            acts = dm.topk_encode(x, sae.W_enc, sae.b_enc, self.k)
            return gradients(dm.sparse_decode(acts, sae.W_dec))

        def sparsify() -> tuple[Tensor, ...]:
            return gradients(peers.sparsify_step(x, weight, sae.b_enc, sae.W_dec, self.k))

        def check() -> None:
            for mine, theirs in zip(ours(), sparsify(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

        others = {"sae_lens forward + backward": lambda: gradients(sae(x)), "sparsify's way": sparsify}
        return Row(f"train   {self.label}", ours, others, {}, check)

    def drop_in_row(self) -> Row:
        """The calls existing scripts make, dense latents returned: encode, then decode."""
        sae, fast, x = self.sae, self.accelerated(), self.x
        return Row(
            f"drop-in encode, decode  {self.label}",
            lambda: fast.decode(fast.encode(x)),
            {"sae_lens": lambda: sae.decode(sae.encode(x))},
            {},
            lambda: self.check_drop_in(fast),
        )

    def drop_in_forward_row(self) -> Row:
        """sae(x) itself: no dense latents between."""
        sae, fast, x = self.sae, self.accelerated(), self.x
        label = f"drop-in sae(x)  {self.label}"
        return Row(label, lambda: fast(x), {"sae_lens": lambda: sae(x)}, {}, lambda: self.check_drop_in(fast))

    def error_term_row(self) -> Row:
        """Encode and decode twice, the second time without hooks, as HookedSAETransformer does with use_error_term."""
        from sae_lens.saes.sae import _disable_hooks

        def with_error_term(sae: Any) -> Tensor:
            out = sae.decode(sae.encode(self.x))
            with torch.no_grad(), _disable_hooks(sae):
                clean = sae.decode(sae.encode(self.x))
            return out + (self.x - clean)

        fast = self.accelerated()
        return Row(
            f"drop-in error term  {self.label}",
            lambda: with_error_term(fast),
            {"sae_lens": lambda: with_error_term(self.sae)},
            {},
            lambda: self.check_drop_in(fast),
        )

    def accelerated(self) -> Any:
        """A copy of the SAE that shares its weights, accelerated."""
        fast = copy.deepcopy(self.sae)
        for name, parameter in self.sae.named_parameters():
            getattr(fast, name).data = parameter.data
        return dm.accelerate(fast)

    def check_drop_in(self, fast: Any) -> None:
        """Every method fast, latents and reconstructions those of the oracle (its rounded acts decoded again)."""
        self.check(find_support(fast.encode(self.x)))
        acts = fast.encode_sparse(self.x)
        oracle = reference.sparse_decode(acts, self.sae.W_dec, self.sae.b_dec)
        torch.testing.assert_close(fast(self.x), oracle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast.decode(acts.to_dense()), oracle, rtol=1e-5, atol=1e-5)
        assert not dm.stats(fast).fallback, dm.stats(fast)

    def support_row(self) -> Row:
        """Finding the support of dense acts."""
        dense = self.encode(dm.prepare_encoder(self.sae.W_enc, self.sae.b_enc)).to_dense()

        def check() -> None:
            assert torch.equal(dm.find_support(dense).col_indices, dense.nonzero()[:, 1])

        return Row(f"support {self.label}", lambda: dm.find_support(dense), {"torch nonzero": dense.nonzero}, {}, check)


def _sae(architecture: str, W_enc: Tensor, k: int) -> Any:
    """A SAELens SAE with these encoder weights and their transpose as decoder."""
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class(architecture)
    options: dict[str, Any] = {"k": k} if architecture == "topk" else {}
    d, n_latents = W_enc.shape
    dtype = str(W_enc.dtype).removeprefix("torch.")
    cfg = cfg_class(d_in=d, d_sae=n_latents, dtype=dtype, device="cpu", apply_b_dec_to_input=False, **options)
    sae = sae_class(cfg)
    sae.W_enc.data, sae.W_dec.data = W_enc, W_enc.mT.contiguous()
    return sae


def demo_problems() -> list[Problem]:
    """The demo's own SAEs on its own held-out activations, when the demo has run on this machine."""
    from darkmatter_ext.measurement.presets import DEMO
    from darkmatter_ext.measurement.run import prepare
    from darkmatter_ext.measurement.tokens import HELD_OUT
    from darkmatter_ext.runtime.progress import Stages

    inputs, k = prepare(DEMO, Stages(show=False)), DEMO.saes.k
    x = inputs.stored[inputs.one_site].with_role(HELD_OUT)[:1024]
    problems = []
    for trained in inputs.saes:
        sae = trained.load()
        sae.cfg.apply_b_dec_to_input = False  # centred here, so that every row has the same form
        label = f"topk demo {trained.name} {len(x)}x{sae.cfg.d_in}x{sae.cfg.d_sae} k{k} float32"
        problems.append(Problem(label, x - sae.b_dec, sae, k, "topk"))
    return problems
