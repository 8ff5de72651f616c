"""What one accelerated call does, counted: looks at weights, copies of weights, decisions about later calls."""

import itertools

import pytest
import torch
from cases.children import run_python
from cases.saes import D_IN, SAES, activations, assert_close, make_sae, only_fast, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import darkmatter_ext as dm
from darkmatter_ext.ops import decode
from darkmatter_ext.saes import packed_weights, stepping_aside
from darkmatter_ext.saes.architectures import FEW_PLACES
from darkmatter_ext.saes.stepping_aside import FIRST_WAIT, TOO_MANY, BackOff

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def rescaled(**options):
    return pair("topk", rescale_acts_by_decoder_norm=True, **options)


# Looks


@pytest.mark.parametrize("method", ["forward", "encode", "decode"])
def test_a_rescaled_call_looks_at_every_matrix_once(method, monkeypatch):
    plain, fast = rescaled()
    x = plain.encode(activations(6)).detach() if method == "decode" else activations(6)
    with torch.no_grad():
        getattr(fast, method)(x), getattr(fast, method)(x)
        seen, original = [], packed_weights._Watched.unchanged
        monkeypatch.setattr(
            packed_weights._Watched, "unchanged", lambda self, tensor: seen.append(tensor) or original(self, tensor)
        )
        assert_close(getattr(plain, method)(x), getattr(fast, method)(x), scale=10)
    matrices = [name for name in ("W_enc", "W_dec") for tensor in seen if tensor is getattr(fast, name)]
    assert matrices == (["W_dec"] if method == "decode" else ["W_enc", "W_dec"])


def test_a_rescaled_forward_notices_an_edit_of_the_decoder():
    plain, fast = rescaled()
    x = activations(6)
    for factor in (1.0, 3.0, 0.5):
        for sae in (plain, fast):
            sae.W_dec.data[::2] *= factor
        assert_close(plain(x), fast(x), scale=10)
    for sae in (plain, fast):  # the decoder alone: the encoder is packed with its norms
        sae.b_dec = torch.nn.Parameter(torch.ones(D_IN))
    assert_close(plain(x), fast(x), scale=10)
    for sae in (plain, fast):
        sae.cfg.rescale_acts_by_decoder_norm = False
    assert_close(plain(x), fast(x), scale=10)
    assert only_fast(fast)


# Gradients of a rescaled encode


def test_rescaled_gradients_read_the_packed_rows(monkeypatch):
    from darkmatter_ext.saes import architectures

    plain, fast = rescaled()
    x, read = activations(9), []
    monkeypatch.setattr(
        architectures, "decoder_dot", lambda x, acts, W: read.append(W) or decode.decoder_dot(x, acts, W)
    )
    for sae in (plain, fast):
        sae.encode(x).square().sum().backward()
    assert [rows.is_contiguous() for rows in read] == [True]
    for name, parameter in plain.named_parameters():
        theirs, ours = parameter.grad, getattr(fast, name).grad
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert_close(theirs, ours, scale=100)


def test_second_derivatives_of_a_rescaled_encode():
    found = []
    for sae in rescaled(dtype=torch.float64):
        x = activations(5, dtype=torch.float64).requires_grad_()
        wanted = [x, sae.W_enc, sae.W_dec, sae.b_enc]
        first = torch.autograd.grad(sae.encode(x).pow(3).sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), wanted))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


# One decision a call


def _mostly_dense(n):
    x = activations(n)
    x[: 3 * n // 4] *= 20
    return x


@pytest.mark.parametrize("hook", ["hook_sae_input", "hook_sae_acts_post"])
@pytest.mark.parametrize("architecture", SAES)
def test_a_call_with_an_error_term_decides_once(architecture, hook):
    plain, fast = pair(architecture)
    x = _mostly_dense(12)
    for sae in (plain, fast):
        sae.use_error_term = True
        getattr(sae, hook).register_forward_hook(lambda module, args, out: out * 1)
    with torch.no_grad():
        for call in range(2 * FIRST_WAIT):
            left, waited = fast._fast.back_off.left, fast._fast.back_off._wait
            out = fast(x)
            # sae_out and the error are of one arithmetic: with a hook that changes nothing their sum is x, to one rounding
            torch.testing.assert_close(out, x, rtol=3e-7, atol=3e-7 * float(x.abs().max()))
            now = fast._fast.back_off
            assert now.left == (left - 1 if left else now._wait), call
            assert now._wait <= max(FIRST_WAIT, 2 * waited)
        assert_close(plain(x), out, scale=10)


def test_calls_within_calls_decide_for_themselves():
    back_off = BackOff()
    dense = torch.ones(4, 8)
    with back_off.one_call():
        assert not back_off.steps_aside()
        with back_off.one_call():
            back_off.after_trying(4, dense)
        assert back_off.left == FIRST_WAIT
        assert not back_off.steps_aside()
        back_off.after_trying(4, dense)
        back_off.after_trying(4, dense)
        assert back_off.left == 2 * FIRST_WAIT
    assert back_off.steps_aside()
    with pytest.raises(RuntimeError), back_off.one_call():
        raise RuntimeError
    back_off.after_dense(dense)
    assert back_off.left == 2 * FIRST_WAIT - 1


def test_one_dense_token_of_few_does_not_pay_where_weights_are_read_for_it(monkeypatch):
    """The library's product of one token reads all weights, as that of eight does; weights in a cache cost nothing to read."""
    tokens_of_a_read = {"avx2": 24, "avx512_vnni": 8, "amx_int8": 1}
    for isa, read in tokens_of_a_read.items():
        monkeypatch.setattr(stepping_aside, "_tokens_of_a_read", lambda read=read: read)
        large, small = stepping_aside.READ_WEIGHTS, stepping_aside.READ_WEIGHTS - 1
        assert stepping_aside.does_not_pay(8, 1, large) == (read > 2), isa
        assert stepping_aside.does_not_pay(64, 1, large) == (read > 16), isa
        for weights in (small, large):
            assert not stepping_aside.does_not_pay(8, 0, weights)
            assert not stepping_aside.does_not_pay(1024, 1, weights)
            assert stepping_aside.does_not_pay(1024, 257, weights)
            assert stepping_aside.does_not_pay(1, 1, weights)
        assert not stepping_aside.does_not_pay(8, 1, small)


# What is packed and does not help


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("alive", "reason"), [(20, ""), (48, FEW_PLACES), (200, "")])
def test_few_latents_alive(alive, reason, rescale):
    """8 of 20 alive: exact sums of these; of 48: SAELens, and `stats` says why; of 200: screened."""
    plain, fast = (make_sae("topk", rescale_acts_by_decoder_norm=rescale) for _ in range(2))
    dm.accelerate(fast)
    for sae in (plain, fast):
        sae.W_enc.data[:, alive:] = 0
        sae.b_enc.data[:alive] += 0.5
        sae.b_enc.data[alive:] = -1
    x = activations(12).requires_grad_()
    for _ in range(3):
        assert_close(plain.encode(x), fast.encode(x), scale=10)
        assert_close(plain(x), fast(x), scale=10)
    stats = dm.stats(fast)
    assert TOO_MANY not in str(stats)
    assert {why for whys in stats.fallback.values() for why in whys} == ({reason} if reason else set())
    gradients = [torch.autograd.grad(sae(x).square().sum(), (x, sae.W_enc)) for sae in (plain, fast)]
    for theirs, ours in zip(*gradients, strict=True):
        assert_close(theirs, ours, scale=100)


LOWERED = """
import copy, torch, darkmatter_ext as dm
from cases.saes import activations, make_sae
for architecture in ("topk", "jumprelu"):
    fast = dm.accelerate(make_sae(architecture)); x = activations(8); expected = fast.encode(x)
    prepared = fast._fast.encoder._state[1]
    assert prepared.codes.numel() == 1 and prepared.screens and not dm.stats(fast).fallback
    for sae in (fast, copy.deepcopy(fast)):  # packed before, or while it is lowered
        torch.set_float32_matmul_precision("high")
        assert not prepared.screens
        sae.encode(x)
        assert "matmul precision" in str(dm.stats(sae)), dm.stats(sae)
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(sae.encode(x), expected)
        assert dm.stats(sae).fast["encode"] >= 1
"""


@pytest.mark.slow
def test_while_torch_multiplies_in_less_than_float32_saelens_answers():
    run_python(LOWERED, DARKMATTER_CPU_ISA="scalar")


@pytest.fixture
def matmul():
    """torch.backends.cuda.matmul, as it was afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    yield settings
    settings.allow_tf32 = before


def test_few_tokens_on_a_gpu_are_left_to_saelens(matmul):
    """By how the device multiplies: tensor cores make more tokens few."""
    with FakeTensorMode():
        for dtype, tf32, few, many in (
            (torch.float64, True, 256, 1024),
            (torch.float32, True, 1024, 4096),
            (torch.bfloat16, True, 2048, 4096),
            (torch.float32, False, 256, 1024),
        ):
            matmul.allow_tf32 = tf32
            for n, small in ((few, True), (many, False)):
                x = torch.empty(n, 768, dtype=dtype, device="cuda")
                assert stepping_aside.is_small_encode(x, 24576, stepping_aside.RELU_COST) == small
            x = torch.empty(few, 768, dtype=dtype, device="cuda")
            assert not stepping_aside.is_small_encode(x, 24576, stepping_aside.DenseCost(on_gpu=3.0))
        acts = torch.empty(64, 24576, device="cuda")
        assert stepping_aside.is_small_decode(acts, 24576, 768)
        assert not stepping_aside.is_small_decode(acts.expand(64, 64, 24576), 24576, 768)


def test_where_the_processor_multiplies_16_bits_in_tiles_small_weights_stay_with_the_library(monkeypatch):
    """torch's product is 8 times as fast there as in float32, if the weights stay in a cache and tokens are many."""
    monkeypatch.setattr(stepping_aside, "AMX_WEIGHTS", 1 << 23)  # as it is, see cases/saes.py
    relu, topk = stepping_aside.RELU_COST, stepping_aside.TOPK_COST
    half, single = torch.zeros(256, 768, dtype=torch.bfloat16), torch.zeros(256, 768)
    for has_tiles in (True, False):
        monkeypatch.setattr(stepping_aside, "_has_tiles", lambda has_tiles=has_tiles: has_tiles)
        assert stepping_aside.is_small_encode(half, 4096, relu) == has_tiles
        assert stepping_aside.is_small_forward(half, 4096, relu) == has_tiles
        assert stepping_aside.is_small_decode(torch.zeros(64, 4096).half(), 4096, 768) == has_tiles
        assert not stepping_aside.is_small_encode(half, 4096, topk)
        assert not stepping_aside.is_small_encode(half, 24576, relu)  # weights come from memory
        assert not stepping_aside.is_small_encode(half[:8], 4096, relu)
        assert not stepping_aside.is_small_encode(single, 4096, relu)
        assert not stepping_aside.is_small_encode(half, 4096, stepping_aside.TRAINING_COST)


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_encode_within_a_small_forward_is_small(device, has_tiles, monkeypatch):
    monkeypatch.setattr(stepping_aside, "_has_tiles", lambda: has_tiles)
    costs = [getattr(stepping_aside, f"{name}_COST") for name in ("RELU", "THRESHOLD", "TOPK", "GATED")]
    with FakeTensorMode():
        for n, d, f in itertools.product((1, 7, 64, 1000, 30000), (32, 768, 4096), (64, 2047, 2048, 16384, 262144)):
            for dtype, cost in itertools.product((torch.float32, torch.bfloat16), costs):
                x = torch.empty(n, d, dtype=dtype, device=device)
                if stepping_aside.is_small_forward(x, f, cost):
                    assert stepping_aside.is_small_encode(x, f, cost), (n, d, f, dtype, cost)


@given(n=st.integers(0, 70), f=st.integers(0, 5000), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_share_of_active_latents_is_estimated_from_a_few(n, f, share, seed):
    acts = (torch.rand(n, f, generator=torch.Generator().manual_seed(seed)) < share).float()
    shares = stepping_aside.active_shares(acts)
    assert shares.numel() == 0 if n == 0 else 1 <= shares.numel() <= 15
    if n and f >= 1000:  # at least 600 of them are looked at: 8 standard deviations
        assert (shares - share).abs().max() < 8 * (0.25 / 600) ** 0.5
    if f <= 1024 and 0 < n < 8:  # nothing is left out
        torch.testing.assert_close(shares, (acts != 0).float().mean(-1))


def test_a_mask_of_every_second_token_or_latent_hides_nothing():
    acts = torch.ones(64, 16384)
    acts[::2] = 0
    acts[:, ::16] = 0
    shares = stepping_aside.active_shares(acts)
    assert 0.2 < shares.mean() < 0.7
    assert shares.max() == pytest.approx(15 / 16, abs=0.03)
