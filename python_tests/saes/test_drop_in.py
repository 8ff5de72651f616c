"""accelerate: SAELens' own answers are the oracle, over architectures, options, dtypes, shapes and hooks."""

import copy

import pytest
import torch
from cases.saes import ARCHITECTURES, D_SAE, SAES, K, activations, assert_close, assert_same_acts, make_sae, pair

import darkmatter_ext as dm
from darkmatter_ext.saes import looks, stepping_aside
from darkmatter_ext.saes.stepping_aside import FIRST_WAIT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def fast_calls(sae):
    return sum(dm.stats(sae).fast.values())


def assert_agree(plain, fast, x):
    """Encode, decode and forward, each on its own; returns the accelerated latents."""
    theirs, ours = plain.encode(x), fast.encode(x)
    assert_same_acts(plain, x, theirs, ours)
    assert_close(plain.decode(ours.detach()), fast.decode(ours), scale=10)
    if torch.equal(theirs > 0, ours > 0):
        assert_close(plain(x), fast(x), scale=10)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_saelens(architecture, dtype):
    plain, fast = pair(architecture, dtype)
    acts = assert_agree(plain, fast, activations(33, dtype=dtype))
    assert 0 < (acts > 0).float().mean() < 0.05
    assert dm.stats(fast).fast.keys() >= {"encode", "decode"}
    assert not dm.stats(fast).fallback


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_every_shape(architecture, shape):
    plain, fast = pair(architecture)
    x = activations(*shape)
    with torch.no_grad():
        assert_agree(plain, fast, x)
        assert_close(plain(x), fast(x), scale=10)
    assert dm.stats(fast).fast == {"encode": 1, "decode": 1, "forward": 1 + (1 if torch.isfinite(x).all() else 0)}


OPTIONS = [
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "expected_average_only_in"},
]


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(architecture, options):
    plain, fast = pair(architecture, **options)
    x = activations(7)
    theirs, ours = plain.encode(x), fast.encode(x)
    assert_close(plain.decode(theirs), fast.decode(ours), scale=10)
    assert_close(plain(x), fast(x), scale=10)
    assert dm.stats(fast).fast == {"encode": 1, "decode": 1, "forward": 1}


@pytest.mark.parametrize("architecture", SAES)
def test_hook_z_reshaping(architecture):
    plain, fast = (make_sae(architecture, reshape_activations="hook_z", apply_b_dec_to_input=True) for _ in range(2))
    dm.accelerate(fast)
    x = activations(3, 5).reshape(3, 5, 4, 16)
    for sae in (plain, fast):
        sae.turn_on_forward_pass_hook_z_reshaping()
    assert_close(plain.encode(x), fast.encode(x))
    assert_close(plain(x), fast(x), scale=10)
    assert fast(x).shape == x.shape
    assert fast_calls(fast) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rescale_by_decoder_norm(dtype):
    plain, fast = pair("topk", dtype, rescale_acts_by_decoder_norm=True)
    x = activations(50, dtype=dtype)
    with torch.no_grad():
        for sae in (plain, fast):  # norms from 0.5 to 2: the flag decides which latents are the largest
            sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    theirs, ours = plain.encode(x), fast.encode(x)
    assert ((theirs > 0) == (ours > 0)).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.9999)
    assert_close(plain.decode(ours.detach()), fast.decode(ours), scale=10)
    same = ((theirs > 0) == (ours > 0)).all(-1)
    assert_close(theirs[same], ours[same], scale=10)
    assert_close(plain(x[same]), fast(x[same]), scale=10)
    assert dm.stats(fast).fast == {"encode": 1, "decode": 1, "forward": 1}


def test_rescale_reads_the_decoder_at_every_call():
    plain, fast = pair("topk", rescale_acts_by_decoder_norm=True)
    x = activations(20)
    before = fast(x)
    for sae in (plain, fast):
        sae.W_dec.data[::3] *= 4
    assert_close(plain(x), fast(x), scale=10)
    assert not torch.allclose(before, fast(x))
    for sae in (plain, fast):
        sae.fold_W_dec_norm()
    assert_close(plain(x), fast(x), scale=10)
    for sae in (plain, fast):
        sae.cfg.rescale_acts_by_decoder_norm = False
    assert_close(plain(x), fast(x), scale=10)
    assert not dm.stats(fast).fallback
    for sae in (plain, fast):
        sae.cfg.rescale_acts_by_decoder_norm = True
        sae.W_dec.data[5] = 0  # SAELens divides by its norm
    torch.testing.assert_close(plain(x), fast(x), equal_nan=True)


HOOKS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"]


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_changes_what_it_sees(architecture, name):
    plain, fast = pair(architecture)
    x = activations(6)
    results = [
        sae.run_with_hooks(x, fwd_hooks=[(name, lambda tensor, hook: tensor * 0.9 + 0.01)]) for sae in (plain, fast)
    ]
    assert_close(*results, scale=20)
    assert_close(plain(x), fast(x), scale=10)  # and the hook is gone
    if name != "hook_sae_acts_pre":
        assert fast_calls(fast) >= 2


@pytest.mark.parametrize("architecture", SAES)
def test_run_with_cache_sees_every_activation(architecture):
    plain, fast = pair(architecture)
    x = activations(6)
    (out, cache), (fast_out, fast_cache) = plain.run_with_cache(x), fast.run_with_cache(x)
    assert list(cache.keys()) == list(fast_cache.keys())
    assert_close(out, fast_out, scale=10)
    for name in cache:
        assert_close(cache[name], fast_cache[name], scale=10)
    assert "hook_sae_acts_pre" in str(dm.stats(fast))


@pytest.mark.parametrize("architecture", SAES)
def test_hooks_run_once_each_and_in_saelens_order(architecture):
    seen = {}
    for sae in pair(architecture):
        order = seen[dm.is_accelerated(sae)] = []
        sae.use_error_term = True
        names = [*HOOKS, "hook_sae_error"]
        names.remove("hook_sae_acts_pre")
        for name in names:
            sae.add_hook(name, lambda tensor, hook, order=order: order.append((hook.name, tuple(tensor.shape))))
        sae(activations(4))
    assert seen[True] == seen[False]


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("hook", [None, "hook_sae_input", "hook_sae_acts_post", "hook_sae_recons"])
def test_error_term(architecture, hook):
    x, results, errors = activations(6), [], []
    for sae in pair(architecture):
        sae.use_error_term = True
        sae.add_hook("hook_sae_error", lambda tensor, hook: errors.append(tensor.clone()))
        hooks = [] if hook is None else [(hook, lambda tensor, hook: tensor * 0.5)]
        results.append(sae.run_with_hooks(x, fwd_hooks=hooks, reset_hooks_end=False))
    assert_close(*results, scale=10)
    assert_close(*errors, scale=10)
    if hook is None:
        torch.testing.assert_close(results[1], x)


RESCALED = ("topk", {"rescale_acts_by_decoder_norm": True})


@pytest.mark.parametrize(("architecture", "options"), [*((name, {}) for name in ARCHITECTURES), RESCALED])
@pytest.mark.parametrize("route", ["forward", "encode-decode", "acts"])
def test_gradients(architecture, options, route):
    x = activations(9)
    found = []
    for sae in pair(architecture, **options):
        own = x.clone().requires_grad_()
        acts = None
        if route == "forward":
            loss = sae(own).square().sum()
        else:
            acts = sae.encode(own)
            acts.retain_grad()
            weights = torch.linspace(0.5, 1.5, acts.numel()).reshape(acts.shape)
            loss = (acts * weights).sum() if route == "acts" else (sae.decode(acts).square()).sum()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        found.append(gradients | {"x": own.grad, "acts": None if acts is None else acts.grad})
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("architecture", "options"), [*((name, {}) for name in SAES), RESCALED])
def test_second_gradients(architecture, options):
    x = activations(4, dtype=torch.float64)
    found = []
    for sae in pair(architecture, torch.float64, **options):
        own = x.clone().requires_grad_()
        loss = sae.decode(sae.encode(own)).square().sum()
        (first,) = torch.autograd.grad(loss, own, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [own, sae.W_enc, sae.W_dec]))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sparse_calls(architecture):
    plain, fast = pair(architecture)
    x = activations(2, 5)
    acts = fast.encode_sparse(x)
    assert acts.shape == (2, 5, D_SAE)
    assert_same_acts(plain, x, plain.encode(x), acts.to_dense())
    assert_close(plain.decode(acts.to_dense()), fast.decode_sparse(acts), scale=10)
    assert_close(plain(x), fast.forward_fused(x), scale=10)
    assert dm.stats(fast).fast == {"encode_sparse": 1, "decode_sparse": 1, "forward": 1}
    with pytest.raises(TypeError, match="acts: must be SparseActs"):
        fast.decode_sparse(acts.to_dense())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("latents", [[3], [5, 1, 5, 500], [], torch.arange(D_SAE)], ids=["one", "some", "none", "all"])
def test_encode_of_some_latents(architecture, latents):
    plain, fast = pair(architecture)
    x = activations(2, 40)
    index = torch.as_tensor(latents, dtype=torch.int64)
    assert_close(plain.encode(x)[..., index], fast.encode(x, latents=latents))
    assert dm.stats(fast).fast == {"encode(latents)": 1}


@pytest.mark.parametrize(
    ("latents", "error"),
    [
        ([0, D_SAE], ValueError),
        ([-1], ValueError),
        ([0.5], TypeError),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError),
    ],
)
def test_encode_of_impossible_latents(latents, error):
    with pytest.raises(error, match=r"^latents: must be"):
        pair("topk")[1].encode(activations(2), latents=latents)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
def test_dense_latents_go_to_saelens(architecture):
    plain = make_sae(architecture)
    with torch.no_grad():
        for name in ("b_enc", "b_gate", "threshold"):
            if getattr(plain, name, None) is not None:
                getattr(plain, name).fill_(0.0)
    fast = dm.accelerate(copy.deepcopy(plain))
    x = activations(50)
    assert torch.equal(plain.encode(x), fast.encode(x))
    assert torch.equal(plain(x), fast(x))
    assert not dm.stats(fast).fast
    assert "latents are active" in str(dm.stats(fast))


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
@pytest.mark.parametrize("tokens", [2, 3, 8, 64])
def test_a_sink_among_few_tokens_is_handed_over_and_the_others_are_fast(architecture, tokens):
    plain, fast = pair(architecture)
    x = activations(tokens)
    x[tokens // 2] *= 300
    assert_close(plain.encode(x), fast.encode(x), scale=100)
    assert_close(plain(x), fast(x), scale=1000)
    acts = fast.encode_sparse(x)
    assert_close(plain.encode(x), acts.to_dense(), scale=100)
    assert_close(plain.encode(x)[:, [4, 9]], fast.encode(x, latents=[4, 9]), scale=100)
    assert dm.stats(fast).fast == {"encode": 1, "forward": 1, "encode_sparse": 1, "encode(latents)": 1}
    assert dm.stats(fast).tokens_handed_over >= 3
    assert "many candidates" in str(dm.stats(fast))


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
@pytest.mark.parametrize("route", ["forward", "encode"])
def test_gradients_with_a_token_handed_over(architecture, route):
    found = []
    for sae in pair(architecture, torch.float64):
        x = activations(5, dtype=torch.float64)
        x[1] *= 30
        x.requires_grad_()
        out = getattr(sae, route)(x)
        (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum().backward()
        found.append({name: p.grad for name, p in sae.named_parameters() if p.grad is not None} | {"x": x.grad})
    assert dm.stats(sae).tokens_handed_over == 1
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_after_a_call_of_dense_tokens_saelens_answers_and_it_is_tried_again():
    _, fast = pair("jumprelu")
    x = activations(10) * 20
    waits = []
    for _ in range(59):
        before = dm.stats(fast).fallback.get("encode", {})
        fast.encode(x)
        waits.append(fast._fast.back_off.left)
        assert dm.stats(fast).fallback["encode"] != before
    assert [left for left, before in zip(waits, [0, *waits], strict=False) if before == 0] == [8, 16, 32]


def test_after_dense_tokens_sparse_ones_are_fast_again():
    _, fast = pair("jumprelu")
    fast.encode(activations(10) * 20)
    fast.encode(activations(10) * 20)
    assert "latents are active" in str(dm.stats(fast))
    before = fast_calls(fast)
    for _ in range(stepping_aside.LOOK_EVERY + 1):  # one of them is looked at, the next is fast
        fast.encode(activations(10))
    assert fast_calls(fast) > before


def test_while_latents_are_dense_most_decodes_are_not_looked_at(monkeypatch):
    """Only the calls that look at the encoder's latents again, and those after the wait."""
    plain, fast = pair("jumprelu")
    looked, look = [], looks.looks_dense
    monkeypatch.setattr(looks, "looks_dense", lambda acts, share: looked.append(acts) or look(acts, share))
    for _ in range(FIRST_WAIT + 1):
        x = activations(10) * 20
        assert_close(plain.decode(plain.encode(x)), fast.decode(fast.encode(x)))
    assert len(looked) == FIRST_WAIT // stepping_aside.LOOK_EVERY + 1
    for _ in range(2 * FIRST_WAIT):
        x = activations(10)
        assert_close(plain.decode(plain.encode(x)), fast.decode(fast.encode(x)))
    assert dm.stats(fast).fast["decode"] > FIRST_WAIT


def test_after_a_call_whose_equal_latents_are_active_in_every_token_saelens_answers():
    """The ops decide them at once, but to list a quarter of the latents costs more than a dense product."""
    plain, fast = pair("jumprelu")
    for sae in (plain, fast):
        with torch.no_grad():
            sae.W_enc[:, : D_SAE // 4] = sae.W_enc[:, :1].clone()
            sae.b_enc[: D_SAE // 4] = 100.0
    x = activations(10)
    for answered in ({"encode": 1}, {"encode": 1}):
        assert_close(plain.encode(x), fast.encode(x))
        assert dm.stats(fast).fast == answered
    assert "latents are active" in str(dm.stats(fast))
    assert dm.stats(fast).tokens_handed_over == 0


def test_a_small_dense_decode_is_saelens_own(monkeypatch):
    monkeypatch.setattr(stepping_aside, "SMALL_DECODE", 1 << 20)
    plain, fast = pair("jumprelu")
    for tokens, reason in ((1, "small"), (40, "")):
        acts = plain.encode(activations(tokens))
        assert_close(plain.decode(acts), fast.decode(acts), scale=10)
        assert reason in str(dm.stats(fast))
    assert dm.stats(fast).fast == {"decode": 1}


def test_k_of_the_activation_function_counts():
    plain, fast = pair("topk")
    x = activations(6)
    for k in (0, 1, K, 20):
        plain.activation_fn.k = fast.activation_fn.k = k
        assert_close(plain.encode(x), fast.encode(x))
        assert (fast.encode(x) > 0).sum(-1).max() <= k
    assert not dm.stats(fast).fallback
    plain.activation_fn.k = fast.activation_fn.k = D_SAE + 1
    for sae in (plain, fast):
        with pytest.raises(RuntimeError):
            sae.encode(x)


def test_a_nan_token_stays_a_nan_token():
    for architecture in ("topk", "jumprelu", "gated"):
        plain, fast = pair(architecture)
        x = activations(4)
        x[1, 3] = float("nan")
        theirs, ours = plain.encode(x), fast.encode(x)
        assert torch.equal(theirs.isnan().sum(-1), ours.isnan().sum(-1))
        assert_close(theirs[[0, 2, 3]], ours[[0, 2, 3]])


def test_tied_preactivations_compare_by_meaning():
    plain, fast = pair("topk")
    with torch.no_grad():
        for sae in (plain, fast):
            sae.W_enc.copy_(sae.W_enc[:, :1].expand(-1, D_SAE))
            sae.b_enc.fill_(0.5)
    x = activations(5)
    assert_close(plain.encode(x).sort(-1).values, fast.encode(x).sort(-1).values)


def test_a_notebook_shows_what_it_is_and_how_calls_were_answered():
    _, fast = pair("topk")
    fast(activations(3))
    made = fast._repr_html_()
    assert f"accelerated topk, {fast.cfg.d_in} → {D_SAE}, float32, cpu" in made
    assert "<p>forward: 1 fast</p>" in made
