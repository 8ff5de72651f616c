"""accelerate on sparsify's and dictionary_learning's objects: the libraries themselves are the oracle."""

import copy
import io
import pickle

import pytest
import torch
from cases import lives
from cases.children import run_python
from cases.peers import (
    CODERS,
    DICTIONARIES,
    KINDS,
    LIMIT,
    AutoEncoderTopK,
    F,
    GatedAutoEncoder,
    K,
    TopKTrainer,
    activations,
    assert_close,
    assert_same_acts,
    dense,
    is_coder,
    make,
    pair,
    parts,
    sparse_coder,
)

import darkmatter_ext as dm

pytestmark = pytest.mark.skipif(not lives.SCREENS, reason="no fast path on this processor")


SIXTEEN_BITS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]


def only_fast(sae, *methods):
    """Every call so far was fast, of these methods; no token was handed over."""
    stats = dm.stats(sae)
    assert not stats.fallback, str(stats)
    assert stats.fast.keys() == set(methods), str(stats)


@pytest.mark.runs
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tokens_as_the_library(kind, dtype):
    if (kind, dtype) == ("JumpReluAutoEncoder", torch.float16):
        pytest.skip("left to the library, whose float16 may be NaN")
    plain, fast = pair(kind, dtype, f=4096)
    x = activations(1000, dtype=dtype)
    theirs, ours = plain.encode(x), fast.encode(x)
    acts = dense(plain, theirs)
    same = assert_same_acts(plain, x, acts, dense(fast, ours))
    assert 0 < (acts != 0).float().mean() < 0.05
    rounds = dtype in (torch.bfloat16, torch.float16)  # theirs rounds what it compares; borders are met
    assert same.float().mean() >= (0.5 if rounds else 0.99)
    if is_coder(plain):
        assert ours._fields == theirs._fields
        assert ours.top_indices.dtype == theirs.top_indices.dtype
        assert_close(plain, plain.decode(*theirs[:2]), fast.decode(*theirs[:2]))
        assert_close(plain, plain(x).sae_out[same], fast(x).sae_out[same])
        assert_close(plain, theirs.pre_acts, ours.pre_acts, scale=100)
        only_fast(fast, "encode")
    else:
        assert_close(plain, plain.decode(acts), fast.decode(acts))
        assert_close(plain, plain(x)[same], fast(x)[same])
        for one, other in zip(plain(x, output_features=True), fast(x, output_features=True), strict=True):
            assert_close(plain, one[same], other[same], scale=100)
        only_fast(fast, "encode", "decode", "forward")
    assert dm.stats(fast).tokens_handed_over == 0


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind, shape):
    plain, fast = pair(kind)
    x = activations(*shape)
    assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(fast, fast.encode(x)))
    if not is_coder(plain):
        assert_close(plain, plain(x), fast(x)) if x.numel() else None
        assert plain(x).shape == fast(x).shape


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sinks_padding_nan_and_dense_tokens(kind):
    plain, fast = pair(kind)
    x = activations(20)
    x[3] *= 300
    x[5] = 0
    x[7, 2] = float("nan")
    x[9, 2] = float("inf")
    theirs, ours = dense(plain, plain.encode(x)), dense(fast, fast.encode(x))
    assert_same_acts(plain, x, theirs, ours)
    for row in (7, 9):
        assert torch.equal(theirs[row].isnan().sum(), ours[row].isnan().sum())
    rows = [row for row in range(20) if row not in (7, 9)]
    if not is_coder(plain):
        assert_close(plain, plain(x)[rows], fast(x)[rows], scale=100)
    for _ in range(3):
        loud = 30 * activations(6)
        assert_same_acts(plain, loud, dense(plain, plain.encode(loud)), dense(fast, fast.encode(loud)))


# Options of single calls


@torch.no_grad()
@pytest.mark.parametrize("threshold", [LIMIT, -1.0, 0.0])
def test_topk_by_its_threshold(threshold):
    plain, fast = pair("AutoEncoderTopK")
    x = activations(30)
    for sae in (plain, fast):
        sae.threshold = torch.tensor(threshold)
    for call in (lambda sae: sae.encode(x, use_threshold=True), lambda sae: sae.encode(x, False, True)):
        assert_same_acts(plain, x, call(plain), call(fast), threshold=threshold)
    if threshold == LIMIT:
        only_fast(fast, "encode")


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("AutoEncoderTopK", {"return_topk": True}, "dense pre-activations are wanted (return_topk)"),
        ("BatchTopKSAE", {"return_active": True}, "dense pre-activations are wanted (return_active)"),
        ("BatchTopKSAE", {"use_threshold": False}, "the k largest of the whole batch"),
        ("JumpReluAutoEncoder", {"output_pre_jump": True}, "dense pre-activations are wanted (output_pre_jump)"),
    ],
)
def test_calls_that_are_the_librarys_own(kind, options, reason):
    plain, fast = pair(kind)
    x = activations(12)
    theirs, ours = plain.encode(x, **options), fast.encode(x, **options)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (theirs, ours)), strict=True):
        assert torch.equal(one, other)
    assert reason in str(dm.stats(fast))
    assert "by dictionary_learning" in str(dm.stats(fast))


@torch.no_grad()
def test_ghost_mode_is_the_librarys_own():
    plain, fast = pair("AutoEncoder")
    x = activations(5)
    for one, other in zip(plain(x, ghost_mask=torch.ones(F)), fast(x, ghost_mask=torch.ones(F)), strict=True):
        assert_close(plain, one, other)
    assert "ghost mask" in str(dm.stats(fast))


@pytest.mark.parametrize("call", [lambda sae, x: sae.encode(x, 1, 2, 3), lambda sae, x: sae.encode(x, nothing=1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_the_library_has_not_fails_as_it_did(kind, call):
    for sae in pair(kind):
        with pytest.raises(TypeError):
            call(sae, activations(2))


def test_arguments_by_name():
    for kind, name in (("AutoEncoder", "f"), ("AutoEncoderTopK", "x")):
        plain, fast = pair(kind)
        x = activations(9)
        with torch.no_grad():
            assert_close(plain, plain.decode(**{name: plain.encode(x=x)}), fast.decode(**{name: fast.encode(x=x)}))
        only_fast(fast, "encode", "decode")
        with pytest.raises(TypeError):
            fast.decode(acts=x)


@torch.no_grad()
def test_the_configuration_of_a_sparse_coder():
    x = activations(20)
    for options, reason in (({"activation": "groupmax"}, "groupmax"), ({"k": F // 8}, "k is not from 0")):
        plain = sparse_coder(**options)
        fast = dm.accelerate(copy.deepcopy(plain))
        for one, other in zip(plain.encode(x), fast.encode(x), strict=True):
            assert torch.equal(one, other)
        assert reason in str(dm.stats(fast))


# Gradients, modes, hooks


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_librarys(kind):
    plain, fast = pair(kind)
    for sae in (plain, fast):
        out = sae(activations(9))
        (out if isinstance(out, torch.Tensor) else out.sae_out).square().sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    assert "a gradient may be wanted" in str(dm.stats(fast))
    for sae in (plain, fast):
        sae.requires_grad_(False)
    dm.refresh(fast)
    fast.encode(activations(9))
    assert dm.stats(fast).fast == {"encode": 1}
    x = activations(9).requires_grad_()
    assert not isinstance(dense(fast, fast.encode(x)).grad_fn, type(None))


@pytest.mark.parametrize("kind", KINDS)
def test_modes(kind):
    plain, fast = pair(kind)
    x = activations(9)
    with torch.inference_mode():
        found = fast.encode(x)
        assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(fast, found))
    with torch.no_grad():
        assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(fast, fast.encode(x)))
        only_fast(fast, "encode")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(dense(plain, plain.encode(x)), dense(fast, fast.encode(x)))
        assert dm.stats(fast).fallback["encode"] == {"autocast": 1}
        torch.func.vmap(lambda row: dense(fast, fast.encode(row)))(x) if not is_coder(fast) else None


@torch.no_grad()
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"])
def test_hooks_of_the_layers_run(kind, part):
    plain, fast = pair(kind)
    x = activations(9)
    for sae in (plain, fast):
        sae.seen = []
        getattr(sae, part).register_forward_hook(lambda _m, _x, out, sae=sae: sae.seen.append(out.shape) or out * 0.9)
        handle = sae.register_forward_hook(lambda _m, _x, out, sae=sae: sae.seen.append(out.shape))
    assert_close(plain, plain(x), fast(x))
    assert plain.seen == fast.seen
    assert f"{part} is hooked" in str(dm.stats(fast))
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_hooks_of_all_modules_run(kind):
    seen = []
    for sae in pair(kind):
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(type(module).__name__)
        )
        sae(activations(3))
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


# Copies, files, classes


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda sae: pickle.loads(pickle.dumps(sae))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_answers_as_its_original_and_is_fast(kind, how):
    plain, fast = pair(kind)
    x = activations(5)
    fast.encode(x)
    copied = how(fast)
    for sae in (copied, fast):
        assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(sae, sae.encode(x)))
    assert dm.stats(copied).fast == {"encode": 1}
    assert dm.stats(fast).fast == {"encode": 2}
    if how is copy.deepcopy:
        parts(copied).W_enc.mul_(-1)
        assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(fast, fast.encode(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerated_object_is_still_what_it_was(kind):
    plain, fast = pair(kind)
    assert isinstance(fast, type(plain))
    assert type(fast).__name__ == type(plain).__name__
    assert repr(fast) == repr(plain)
    assert dm.accelerate(fast) is fast
    assert dm.is_accelerated(fast)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    with torch.no_grad():
        fast.encode(activations(3))
    assert type(dm.deaccelerate(fast)) is type(plain)
    assert vars(fast).keys() == vars(plain).keys()
    with torch.no_grad():
        theirs, ours = plain.encode(activations(3)), fast.encode(activations(3))
    assert torch.equal(dense(plain, theirs), dense(fast, ours))


@torch.no_grad()
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_loading_through_the_class_of_an_accelerated_one(kind, tmp_path):
    plain, fast = pair(kind)
    torch.save(plain.state_dict(), tmp_path / "ae.pt")
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    loaded = type(fast).from_pretrained(tmp_path / "ae.pt", **options)
    x = activations(5)
    assert_same_acts(plain, x, plain.encode(x), loaded.encode(x))


@torch.no_grad()
def test_a_sparse_coder_through_its_own_files(tmp_path):
    plain, fast = pair("SparseCoder")
    fast.save_to_disk(tmp_path)
    loaded = dm.accelerate(type(fast).load_from_disk(tmp_path))
    x = activations(5)
    for sae in (fast, loaded):
        assert_same_acts(plain, x, dense(plain, plain.encode(x)), dense(sae, sae.encode(x)))


@torch.no_grad()
def test_threads_calling_at_once():
    from concurrent.futures import ThreadPoolExecutor

    for kind in ("AutoEncoderTopK", "SparseCoder"):
        plain, fast = pair(kind)
        inputs = [activations(20, seed=seed) for seed in range(6)]
        expected = [dense(plain, plain.encode(x)) for x in inputs]
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(lambda x, sae=fast: dense(sae, torch.no_grad()(sae.encode)(x)), inputs)
            for x, theirs, ours in zip(inputs, expected, found, strict=True):
                assert_same_acts(plain, x, theirs, ours)


def test_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"^sae: must be .*got GatedAutoEncoder \(of dictionary_learning AutoEncoder, "
    ):
        dm.accelerate(GatedAutoEncoder(8, 16))

    class Own(AutoEncoderTopK):
        def encode(self, x):
            return super().encode(x) * 2

    with pytest.raises(ValueError, match=r"got Own \(its encode is not that of AutoEncoderTopK\)"):
        dm.accelerate(Own(8, 16, 2))

    class Named(AutoEncoderTopK):
        pass

    assert dm.is_accelerated(dm.accelerate(Named(8, 16, 2)))
    with pytest.raises(ValueError, match=r"^save_memory: must be False for a SparseCoder"):
        dm.accelerate(make("SparseCoder"), save_memory=True)


def test_another_version_is_refused(monkeypatch):
    def encode(self, x, return_topk=False, another=1):
        return x

    class Newer(AutoEncoderTopK):
        pass

    monkeypatch.setattr(AutoEncoderTopK, "encode", encode)
    with pytest.raises(ValueError, match=r"has other arguments than x, return_topk, use_threshold: an unknown version"):
        dm.accelerate(Newer(8, 16, 2))


@pytest.mark.slow
def test_the_libraries_are_not_imported():
    code = (
        "import sys, torch, darkmatter_ext as dm\n"
        "try:\n    dm.accelerate(torch.nn.Linear(2, 2))\nexcept TypeError: pass\n"
        "assert not {'sparsify', 'dictionary_learning'} & set(sys.modules)"
    )
    run_python(code)


@pytest.mark.slow
def test_a_sparse_coder_needs_no_other_library():
    code = (
        "import sys, sparsify, darkmatter_ext as dm, torch\n"
        "before = set(sys.modules)\n"
        "sae = dm.accelerate(sparsify.SparseCoder(64, sparsify.SparseCoderConfig(num_latents=4096, k=8)))\n"
        "with torch.no_grad(): sae(torch.randn(64, 64))\n"
        "assert dm.stats(sae).fast == {'encode': 1}, str(dm.stats(sae))\n"
        "assert not {'sae_lens', 'transformer_lens', 'dictionary_learning'} & set(sys.modules) - before"
    )
    run_python(code)


# Their own use


def test_dictionary_learnings_own_trainer_with_an_accelerated_dictionary():
    """Trains as it did: every step is a new version of the weights, with gradients."""
    losses = []
    for accelerates in (False, True):
        trainer = TopKTrainer(
            steps=20, activation_dim=64, dict_size=F, k=K, layer=0, lm_name="none", seed=0, device="cpu",
            threshold_start_step=2, warmup_steps=2,
        )  # fmt: skip
        if accelerates:
            dm.accelerate(trainer.ae)
        losses.append([trainer.update(step, activations(32, seed=step)) for step in range(5)])
        losses[-1].append(trainer.ae.threshold.item())
    assert losses[0] == losses[1]
    x = activations(40)
    with torch.no_grad():
        ours = trainer.ae.encode(x)
        assert_same_acts(trainer.ae, x, dm.deaccelerate(copy.deepcopy(trainer.ae)).encode(x), ours)


@torch.no_grad()
@pytest.mark.parametrize("kind", CODERS)
def test_sparsifys_own_example(kind):
    """As in its README: latents of every layer's hidden states, kept, then saved."""
    plain, fast = pair(kind)
    kept = {}
    for name, sae in (("plain", plain), ("fast", fast)):
        latent_acts = [sae.encode(activations(10, seed=layer)) for layer in range(3)]
        file = io.BytesIO()
        torch.save([tuple(each) for each in latent_acts], file)
        file.seek(0)
        kept[name] = torch.load(file, weights_only=True)
    for one, other in zip(kept["plain"], kept["fast"], strict=True):
        assert torch.equal(one[1].sort().values, other[1].sort().values)
        assert_close(plain, one[0].sort().values, other[0].sort().values)
        assert_close(plain, one[2], other[2])
