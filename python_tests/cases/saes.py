"""SAELens objects of every architecture with sparse latents, and what it means that two of them agree."""

import pytest
import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes import transcoder

import darkmatter_ext as dm
from darkmatter_ext.saes import packed_weights, stepping_aside

# These SAEs are all small, and it is the fast path that is tested.
stepping_aside.SMALL_DECODE = stepping_aside.SMALL_ENCODE = stepping_aside.SMALL_FORWARD = 0
stepping_aside.FEW_LATENTS = stepping_aside.AMX_WEIGHTS = 0

D_IN, D_SAE, D_OUT, K = 64, 512, 48, 8
SAES = ("topk", "jumprelu", "standard", "gated")
TRANSCODERS = {
    "transcoder": (transcoder.Transcoder, transcoder.TranscoderConfig),
    "skip_transcoder": (transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig),
    "jumprelu_transcoder": (transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig),
}
ARCHITECTURES = (*SAES, *TRANSCODERS)
# Relative to the size of the sums; SAELens' own error in these types is what is compared, ours is smaller.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_sae(architecture, dtype=torch.float32, **options):
    """A SAELens object with about 2 % of its latents active on `activations`; parameters require gradients, as loaded ones."""
    if architecture in TRANSCODERS:
        sae_class, cfg_class = TRANSCODERS[architecture]
        options = {"apply_b_dec_to_input": False, "d_out": D_OUT} | options
    else:
        sae_class, cfg_class = get_sae_class(architecture)
        if architecture == "topk":
            options = {"k": K} | options
    name = str(dtype).removeprefix("torch.")
    sae = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, dtype=name, device="cpu", **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=g) / D_IN**0.5)
        if architecture == "gated":
            sae.b_gate.sub_(2.0)
        elif "jumprelu" in architecture:
            sae.threshold.copy_(1.9 + torch.rand(D_SAE, generator=g) * 0.3)
        elif architecture != "topk":
            sae.b_enc.sub_(2.0)
    return sae


def pair(architecture="topk", dtype=torch.float32, **options):
    """A plain SAE and its accelerated equal."""
    # Two of one seed, not a deepcopy: SAELens' normalisation closures of a copy write to the original.
    plain, fast = (make_sae(architecture, dtype, **options) for _ in range(2))
    return plain, dm.accelerate(fast)


def only_fast(sae):
    """Whether every call so far was fast."""
    stats = dm.stats(sae)
    return bool(stats.fast) and not stats.fallback


def activations(*shape, dtype=torch.float32, seed=2):
    """x of unit variance, [..., d_in]."""
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def input_of(sae, x):
    """What the encoder multiplies with W_enc, without hooks."""
    seen = []
    original = type(sae).process_sae_in
    sae.process_sae_in = lambda x: seen.append(original(sae, x)) or seen[-1]
    try:
        sae.encode(x)
    finally:
        del sae.process_sae_in
    return seen[0]


def assert_same_acts(plain_sae, x, theirs, ours):
    """Same latents and values; a latent may differ only where rounding decides: at the threshold or at the k-th value."""
    assert theirs.shape == ours.shape
    assert theirs.dtype == ours.dtype
    sae_in = input_of(plain_sae, x).double()
    bias = getattr(plain_sae, "b_gate", plain_sae.b_enc)
    pre = sae_in @ plain_sae.W_enc.double() + bias.double()
    scale = sae_in.norm(dim=-1, keepdim=True) * plain_sae.W_enc.double().norm(dim=0) + bias.double().abs()
    if hasattr(plain_sae.activation_fn, "k"):
        k = plain_sae.activation_fn.k
        border = pre.topk(k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    else:
        border = getattr(plain_sae, "threshold", torch.zeros(())).double()
    slack = TOLERANCE[theirs.dtype] * scale + 1e-30
    differ = (theirs > 0) != (ours > 0)
    assert bool(((pre - border).abs() <= slack)[differ].all()), "latents differ away from any border"
    error = torch.where(differ, 0.0, (theirs.double() - ours.double()).abs())
    assert bool((error <= 2 * slack).all()), f"values differ by {float((error / slack).max())} of the slack"


def assert_close(theirs, ours, scale=1.0):
    """Equal up to SAELens' own rounding."""
    tolerance = TOLERANCE[theirs.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance * scale, atol=tolerance * scale)


@pytest.fixture(params=[False, True], ids=["views", "gather"], autouse=True)
def both_looks(request, monkeypatch):
    """Weights are compared view by view, as on the CPU, and by one gather, as on CUDA. Where a test module imports it."""
    monkeypatch.setattr(packed_weights, "_by_gather", lambda _tensor: request.param)
