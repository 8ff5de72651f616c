"""SAEs of sparsify and dictionary_learning, their own objects, and what it means that two of them agree.

Both libraries are optional: `pip install eai-sparsify`, and `pip install --no-deps dictionary_learning`, which asks for an old
nnsight (and with it another torch) for its buffers of activations; its classes need none of it.
"""

import contextlib
import importlib.util
import sys
import types
from dataclasses import dataclass

import pytest
import torch

import darkmatter_ext as dm
from cases.saes import TOLERANCE

D, F, K = 64, 512, 8


@contextlib.contextmanager
def _without_nnsight():
    """A stand-in for nnsight while dictionary_learning is imported, where it is not installed."""
    if importlib.util.find_spec("nnsight") is not None:
        yield
        return
    sys.modules["nnsight"] = types.ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object
    try:
        yield
    finally:
        del sys.modules["nnsight"]


with _without_nnsight(), contextlib.redirect_stdout(sys.stderr):
    sparsify = pytest.importorskip("sparsify", reason="sparsify, the oracle, is not installed")
    pytest.importorskip("dictionary_learning", reason="dictionary_learning, the oracle, is not installed")
    from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

__all__ = ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder", "TopKTrainer"]

DICTIONARIES = {
    "AutoEncoder": AutoEncoder,
    "AutoEncoderTopK": lambda d, f: AutoEncoderTopK(d, f, K),
    "BatchTopKSAE": lambda d, f: BatchTopKSAE(d, f, K),
    "JumpReluAutoEncoder": JumpReluAutoEncoder,
}


def sparse_coder(d=D, f=F, **options):
    return sparsify.SparseCoder(d, sparsify.SparseCoderConfig(**({"num_latents": f, "k": K} | options)))


CODERS = {
    "SparseCoder": sparse_coder,
    "Transcoder": lambda d, f: sparse_coder(d, f, transcode=True, skip_connection=True),
}
KINDS = (*DICTIONARIES, *CODERS)
LIMIT = 2.1  # what the pre-activations of unit variance exceed in about 2 % of the latents


@dataclass(frozen=True)
class Parts:
    """The weights of any of them, as one reads them here."""

    encoder: tuple[torch.nn.Module, str]  # owner and name of the parameter
    decoder: tuple[torch.nn.Module, str]
    W_enc: torch.Tensor  # [d, F]
    b_enc: torch.Tensor
    W_dec: torch.Tensor  # [F, d]
    b_dec: torch.Tensor
    subtracts: bool


def is_coder(sae):
    return hasattr(sae, "cfg")


def parts(sae):
    if is_coder(sae):
        encoder, decoder = (sae.encoder, "weight"), (sae, "W_dec")
        return Parts(
            encoder, decoder, sae.encoder.weight.data.mT, sae.encoder.bias, sae.W_dec, sae.b_dec, not sae.cfg.transcode
        )
    if isinstance(sae, JumpReluAutoEncoder):
        owned = (sae, "W_enc"), (sae, "W_dec")
        return Parts(*owned, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.apply_b_dec_to_input)
    owned = (sae.encoder, "weight"), (sae.decoder, "weight")
    b_dec = sae.bias if isinstance(sae, AutoEncoder) else sae.b_dec
    return Parts(*owned, sae.encoder.weight.data.mT, sae.encoder.bias, sae.decoder.weight.data.mT, b_dec, True)


def k_of(sae):
    """The k of those that choose the k largest."""
    return int(sae.cfg.k) if is_coder(sae) else int(sae.k) if isinstance(sae, AutoEncoderTopK) else None


def fresh(sae, name, draw):
    """New values for a parameter, of the size that `make` gives it."""
    owner, _, own = name.rpartition(".")
    old = getattr(sae.get_submodule(owner), own)
    value = 0.1 * torch.randn(old.shape, generator=draw)
    if name in ("encoder.weight", "W_enc"):
        value = value * 10 / D**0.5
    elif name == "threshold":
        value = LIMIT + value.abs()
    elif name == "encoder.bias" and isinstance(sae, AutoEncoder):
        value -= LIMIT
    return value.to(old.dtype)


def make(kind, dtype=torch.float32, d=D, f=F):
    """One of KINDS; with thresholds, where a threshold is used, such that about 2 % of the latents are active."""
    sae = (DICTIONARIES | CODERS)[kind](d, f)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(fresh(sae, name, draw))
        if "threshold" in sae._buffers:
            sae.threshold.fill_(LIMIT)
    return sae.to(dtype)


def pair(kind, dtype=torch.float32, **sizes):
    """A plain one and its accelerated equal."""
    return make(kind, dtype, **sizes), dm.accelerate(make(kind, dtype, **sizes))


def activations(*shape, dtype=torch.float32, seed=2, d=D):
    return torch.randn(*shape, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(sae, found):
    """Dense acts [..., F] of what encode gives."""
    if isinstance(found, torch.Tensor):
        return found
    shape = (*found.top_acts.shape[:-1], sae.num_latents)
    return torch.zeros(shape, dtype=found.top_acts.dtype).scatter(-1, found.top_indices, found.top_acts)


@torch.no_grad()
def wrong_latents(sae, x, theirs, ours, *, threshold=None):
    """How two dense acts of x differ beyond rounding: (latents away from any border, largest error in units of rounding).

    `threshold`: what was used instead of the k largest. Also returns the tokens with the same latents.
    """
    own = parts(sae)
    theirs, ours = (acts.detach().reshape(-1, acts.shape[-1]).double() for acts in (theirs, ours))
    sae_in = ((x - own.b_dec) if own.subtracts else x).detach().reshape(-1, x.shape[-1]).double()
    W_enc, b_enc = own.W_enc.double(), own.b_enc.double()
    pre = sae_in @ W_enc + b_enc
    size = sae_in.norm(dim=-1, keepdim=True) * W_enc.norm(dim=0) + b_enc.abs()
    slack = TOLERANCE[own.W_enc.dtype] * size + 1e-30
    k = None if threshold is not None else k_of(sae)
    if k is not None and k < pre.shape[-1]:
        border = pre.topk(k + 1, dim=-1).values[:, -2:].mean(-1, keepdim=True)
    else:
        border = torch.as_tensor(getattr(sae, "threshold", 0.0) if threshold is None else threshold)
        border = border.double().clamp(min=0)
    finite = sae_in.isfinite().all(-1, keepdim=True)
    differ = ((theirs != 0) != (ours != 0)) & finite
    on_border = ((pre - border).abs() <= slack) | (pre.abs() <= slack)
    error = ((theirs - ours).abs() / slack).where(~differ & finite, torch.zeros(()).double())
    error = error.nan_to_num(0.0 if torch.equal(theirs.isnan(), ours.isnan()) else float("inf"))
    return (
        int((differ & ~on_border).sum()),
        float(error.max()) if error.numel() else 0.0,
        ~differ.any(-1) & finite[:, 0],
    )


def assert_same_acts(sae, x, theirs, ours, **options):
    assert theirs.dtype == ours.dtype
    assert theirs.shape == ours.shape
    wrong, error, same = wrong_latents(sae, x, theirs, ours, **options)
    assert wrong == 0, "latents differ away from any border"
    assert error <= 1, f"values differ by {error:.3g} of what rounding may do"
    return same


def assert_close(sae, theirs, ours, scale=10.0):
    """Reconstructions, losses: equal up to the rounding of the sums."""
    tolerance = scale * TOLERANCE[parts(sae).W_enc.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, float(theirs.abs().max())))
