"""accelerate under everything else a SAELens object goes through: transforms, compile, copies, threads."""

import contextlib
import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases.saes import ARCHITECTURES, D_IN, D_SAE, SAES, activations, assert_close, make_sae, only_fast, pair
from sae_lens import SAE, HookedSAETransformer
from sae_lens.registry import get_sae_training_class
from transformer_lens import HookedTransformerConfig

import darkmatter_ext as dm
from darkmatter_ext.saes import architectures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Transforms


@pytest.mark.runs
@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize(
    "transform",
    [
        lambda sae, x: torch.func.vmap(sae)(x),
        lambda sae, x: torch.func.jacrev(lambda row: sae.decode(sae.encode(row)))(x[0]),
        lambda sae, x: torch.func.jvp(sae.encode, (x,), (torch.ones_like(x),))[1],
        lambda sae, x: torch.func.grad(lambda row: sae(row).square().sum())(x[0]),
        lambda sae, x: torch.func.functional_call(sae, {"b_dec": torch.ones(D_IN)}, (x,)),
    ],
    ids=["vmap", "jacrev", "jvp", "grad", "functional_call"],
)
def test_transforms(architecture, transform):
    plain, fast = pair(architecture)
    x = activations(3)
    assert_close(transform(plain, x), transform(fast, x), scale=10)


@pytest.mark.runs
@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("route", ["forward", "encode", "decode"])
def test_jacobian_by_batched_gradients(architecture, route):
    plain, fast = pair(architecture)
    x = activations(2)
    jacobians = []
    for sae in (plain, fast):
        function = {"forward": sae, "encode": sae.encode, "decode": lambda x, s=sae: s.decode(s.encode(x))}[route]
        jacobians.append(torch.autograd.functional.jacobian(function, x, vectorize=True))
    assert_close(*jacobians, scale=10)


def test_forward_mode_gradients():
    from torch.autograd import forward_ad

    plain, fast = pair()
    tangents = []
    for sae in (plain, fast):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(activations(3), torch.ones(3, D_IN))
            tangents.append(forward_ad.unpack_dual(sae(dual)).tangent)
    assert_close(*tangents, scale=10)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SAES)
def test_compile_without_graph_breaks(architecture):
    plain, fast = pair(architecture)
    x = activations(5)
    for name in ("forward", "encode"):
        compiled = torch.compile(getattr(fast, name), fullgraph=True, backend="aot_eager")
        assert_close(getattr(plain, name)(x), compiled(x), scale=10)


def test_modes():
    plain, fast = pair("jumprelu")
    x = activations(5)
    with torch.inference_mode():
        assert_close(plain(x), fast(x), scale=10)
    assert_close(plain(x), fast(x), scale=10)  # what was packed in inference mode serves outside it
    fast(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert_close(plain(x), fast(x), scale=10)
    assert only_fast(fast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(x), fast(x))
    assert dm.stats(fast).fallback["forward"] == {"autocast": 1}


def test_other_dtypes_of_the_input():
    plain, fast = pair("jumprelu")
    for dtype in (torch.bfloat16, torch.float64):
        x = activations(5, dtype=dtype)
        assert plain(x).dtype == fast(x).dtype
        assert_close(plain(x), fast(x), scale=10)
    assert only_fast(fast)


def test_integers_and_wrong_shapes_fail_as_they_did():
    for x in (activations(2)[:, :-1], torch.ones(2, 3, D_IN + 1)):
        for sae in pair():
            with pytest.raises(RuntimeError):
                sae(x)
    for sae in pair():
        with pytest.raises(RuntimeError):
            sae.decode(torch.zeros(2, D_SAE + 1))


def test_sparse_tensors_go_to_saelens():
    plain, fast = pair()
    for sae in (plain, fast):
        sae.activation_fn.use_sparse_activations = True
    x = activations(4)
    acts = fast.encode(x)
    assert acts.is_sparse
    assert_close(plain.decode(plain.encode(x)), fast.decode(acts), scale=10)


# Copies, files, devices


@pytest.mark.parametrize("architecture", SAES)
def test_copies_and_files(architecture, tmp_path):
    plain, fast = pair(architecture)
    x = activations(5)
    fast(x)
    copied = copy.deepcopy(fast)
    assert dm.is_accelerated(copied)
    assert not dm.stats(copied).fast  # counts and packed weights of its own
    with torch.no_grad():
        copied.W_enc.mul_(-1)
    assert_close(plain(x), fast(x), scale=10)
    fast.save_model(tmp_path)
    for loaded in (SAE.load_from_disk(tmp_path), type(fast).load_from_disk(tmp_path)):
        assert not dm.is_accelerated(loaded)
        assert_close(plain(x), loaded(x), scale=10)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    assert plain.cfg.to_dict() == fast.cfg.to_dict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda sae: copy.deepcopy(copy.deepcopy(sae))])
def test_a_copy_answers_as_its_original_and_is_fast(architecture, how):
    plain, fast = pair(architecture)
    x = activations(5)
    fast(x)
    copied = how(fast)
    for sae in (copied, fast):
        assert_close(plain.encode(x), sae.encode(x), scale=10)
        assert_close(plain(x), sae(x), scale=10)
    assert dm.stats(copied).fast == {"encode": 1, "forward": 1}
    assert dm.stats(fast).fast == {"encode": 1, "forward": 2}


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
@pytest.mark.parametrize("fold", ["fold_W_dec_norm", "fold_activation_norm_scaling_factor"])
def test_folding_a_copy_changes_the_copy_alone(architecture, fold):
    plain, fast = pair(architecture, apply_b_dec_to_input=False)
    x = activations(20)
    fast(x)
    pairs = [(sae, copy.deepcopy(sae)) for sae in (plain, fast)]
    for _, copied in pairs:
        getattr(copied, fold)(*([] if fold == "fold_W_dec_norm" else [3.0]))
    (_, theirs), (_, ours) = pairs
    assert_close(theirs.encode(x / 3), ours.encode(x / 3), scale=10)
    assert_close(theirs(x / 3), ours(x / 3), scale=10)
    assert_close(plain(x), fast(x), scale=10)
    assert only_fast(fast)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_accelerated_object_is_still_what_it_was(architecture):
    plain, fast = pair(architecture)
    assert isinstance(fast, type(plain))
    assert type(fast).__name__ == type(plain).__name__
    assert repr(fast) == repr(plain)
    assert dm.accelerate(fast) is fast
    assert dm.is_accelerated(fast)
    assert not dm.is_accelerated(plain)
    built = type(fast)(fast.cfg)
    assert isinstance(built, type(plain))
    assert built(activations(2)).shape == plain(activations(2)).shape
    assert type(dm.deaccelerate(fast)) is type(plain)
    assert vars(fast).keys() == vars(plain).keys()
    assert dm.deaccelerate(plain) is plain
    assert torch.equal(plain(activations(2)), fast(activations(2)))


def test_meta_then_loaded():
    plain = make_sae("jumprelu")
    cfg = copy.deepcopy(plain.cfg)
    cfg.device = "meta"
    fast = dm.accelerate(type(plain)(cfg))
    assert fast(activations(2).to("meta")).device.type == "meta"
    fast.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=True)
    x = activations(6)
    assert_close(plain(x), fast(x), scale=10)
    assert dm.stats(fast).fast == {"forward": 1}


@pytest.mark.parametrize("architecture", SAES)
def test_strided_weights(architecture):
    plain, fast = pair(architecture)
    for name in ("W_enc", "W_dec"):
        weight = getattr(fast, name).detach()
        setattr(fast, name, torch.nn.Parameter(weight.mT.contiguous().mT))
    x = activations(6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(plain.decode(plain.encode(x)), fast.decode(fast.encode(x)), scale=10)
            assert_close(plain(x), fast(x), scale=10)
    fast(x).sum().backward()
    plain(x).sum().backward()
    assert_close(plain.W_dec.grad, fast.W_dec.grad, scale=100)
    assert only_fast(fast)


def test_parametrised_weights_go_to_saelens():
    plain, fast = pair()
    x = activations(4)
    for sae in (plain, fast):
        torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", torch.nn.Softplus(), unsafe=True)
    assert torch.equal(plain(x), fast(x))
    assert "parametrised" in str(dm.stats(fast))
    torch.nn.utils.parametrize.remove_parametrizations(fast, "W_dec")
    assert_close(plain(x), fast(x), scale=10)
    assert dm.stats(fast).fast == {"forward": 1}
    torch.nn.utils.parametrize.register_parametrization(fast, "W_dec", torch.nn.Identity())
    assert not dm.is_accelerated(dm.deaccelerate(fast))
    assert_close(plain(x), fast(x), scale=10)


# Threads


def test_threads_calling_at_once():
    plain, fast = pair("jumprelu")
    inputs = [activations(30, seed=seed) for seed in range(8)]
    expected = [plain(x).detach() for x in inputs]
    start = threading.Barrier(4)

    def work(which):
        if which < 4:
            start.wait()
        return [fast(inputs[(which + i) % 8]).detach() for i in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for which, results in enumerate(pool.map(work, range(8))):
            for i, result in enumerate(results):
                assert_close(expected[(which + i) % 8], result, scale=10)
    assert dm.stats(fast).fast == {"forward": 64}


# What cannot be accelerated


def test_refused_with_the_reason():
    training_class, cfg_class = get_sae_training_class("gated")
    training = training_class(cfg_class(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(ValueError, match=r"^sae: must be .*GatedTrainingSAE \(a training class"):
        dm.accelerate(training)

    class Own(type(make_sae("topk"))):
        def encode(self, x):
            return super().encode(x) * 2

    with pytest.raises(ValueError, match=r"got Own \(its encode or decode is not one of SAELens'"):
        dm.accelerate(Own(make_sae("topk").cfg))
    with pytest.raises(TypeError, match=r"^sae: must be a SAELens SAE, .* got Linear"):
        dm.accelerate(torch.nn.Linear(2, 2))
    for function in (dm.stats, dm.refresh):
        with pytest.raises(TypeError, match=r"^sae: must be accelerated"):
            function(make_sae("topk"))


def test_a_method_set_on_the_object_wins():
    plain, fast = pair()
    x = activations(3)
    for sae in (plain, fast):
        sae.encode = lambda x, sae=sae: type(sae).encode(sae, x) * 2
    assert_close(plain(x), fast(x), scale=10)


# In a language model


@pytest.fixture(scope="module")
def model():
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_ctx=16, d_head=16, d_vocab=50, act_fn="gelu", device="cpu", seed=0
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return HookedSAETransformer(cfg)


HOOK = "blocks.0.hook_resid_post"


@pytest.mark.runs
@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("use_error_term", [False, True])
def test_in_a_hooked_transformer(model, architecture, use_error_term):
    tokens = torch.arange(24).reshape(2, 12)
    scale = model.run_with_cache(tokens)[1][HOOK].std().item()
    found = {}
    for sae in pair(architecture):
        sae.cfg.metadata.hook_name = HOOK
        with torch.no_grad():
            sae.W_enc.div_(scale)
        seen = found[dm.is_accelerated(sae)] = []
        for _ in range(3):  # the second and third reuse the first pass for the error term
            model.add_sae(sae, use_error_term=use_error_term)
            logits, cache = model.run_with_cache(tokens, names_filter=lambda name: "acts_pre" not in name)
            model.reset_saes()
            seen += [logits, cache[f"{HOOK}.hook_sae_acts_post"], cache[f"{HOOK}.hook_sae_output"]]
        ablate = (f"{HOOK}.hook_sae_acts_post", lambda acts, hook: acts * 0)
        model.add_sae(sae, use_error_term=use_error_term)
        seen.append(model.run_with_hooks(tokens, fwd_hooks=[ablate]))
        model.reset_saes()
    for theirs, ours in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert only_fast(sae)


def test_the_error_term_costs_one_encode(monkeypatch):
    from sae_lens.saes.sae import _disable_hooks

    _, fast = pair("jumprelu")
    encodes = []
    original = architectures.try_threshold_encode
    monkeypatch.setattr(architectures, "try_threshold_encode", lambda *a, **k: encodes.append(1) or original(*a, **k))

    def with_error_term(x):
        acts = fast.encode(x)
        out = fast.decode(acts)
        with torch.no_grad(), _disable_hooks(fast):
            clean = fast.decode(fast.encode(x))
        return out + (x - clean)

    x = activations(10)
    assert_close(x, with_error_term(x), scale=10)  # the first time it is not known that a second pass will come
    encodes.clear()
    assert_close(x, with_error_term(x), scale=10)
    assert len(encodes) == 1
    other = x.clone()
    fast.encode(x)
    other[0] += 1
    with torch.no_grad(), _disable_hooks(fast):
        changed = fast.encode(other)
    assert_close(dm.deaccelerate(fast).encode(other), changed)  # another input is another pass
