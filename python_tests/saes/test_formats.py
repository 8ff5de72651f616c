"""SAEs in the layouts of other libraries, written here as those libraries write them: the same codes, the same output."""

import numpy as np
import pytest
import torch
from cases import saes  # noqa: F401  (small SAEs may be fast)
from cases.formats import (
    D,
    F,
    K,
    activations,
    dictionary_weights,
    noise,
    top,
    unit,
    write_dictionary,
    write_gemma_scope,
    write_sparsify,
)

from darkmatter_ext import accelerate, stats
from darkmatter_ext.saes.formats.sparsify import module_hook
from darkmatter_ext.saes.loading import describe_sae, load_sae
from darkmatter_ext.saes.sanity import signs

# ---- sparsify: layers.N/cfg.json and sae.safetensors, the training's config.json above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparsify(tmp_path, dtype):
    folder, w = write_sparsify(tmp_path / "run", dtype=dtype)
    sae = load_sae(folder)
    assert sae.dtype == dtype  # as stored: SAELens' own loader makes bfloat16 of everything
    sae, x = load_sae(folder, dtype="float32"), activations()
    acts = top(torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]))
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), acts @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    found = describe_sae(str(folder))
    assert (found.d_in, found.d_sae, found.architecture, found.expected_l0) == (D, F, "topk", K)
    assert found.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert (found.metadata["model_name"], found.metadata["context_size"]) == ("EleutherAI/pythia-70m", 512)
    assert "prepend_bos" not in found.metadata  # its files do not say
    assert describe_sae(str(folder / "sae.safetensors")).d_sae == F


def test_sparsify_is_fast_and_raises_no_alarm(tmp_path):
    sae, x = accelerate(load_sae(write_sparsify(tmp_path / "run")[0])), activations()
    sae(x)
    assert sum(stats(sae).fast.values()) > 0
    assert signs(sae, x) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"skip_connection": True}, "skip_connection must go with transcode"),
        ({"activation": "groupmax"}, "activation must be topk, got groupmax"),
        ({"signed": True}, "got signed topk"),
    ],
)
def test_sparsify_that_is_not_understood_is_refused(tmp_path, config, reason):
    folder, _ = write_sparsify(tmp_path / "run", **config)
    for call in (describe_sae, load_sae):
        with pytest.raises(ValueError, match=r"^sae") as caught:
            call(str(folder))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("module", "model", "hook"),
    [
        ("layers.10", "", "blocks.10.hook_resid_post"),
        ("gpt_neox.layers.3", "EleutherAI/pythia-70m", "blocks.3.hook_resid_post"),
        ("transformer.h.7", "gpt2", "blocks.7.hook_resid_post"),
        ("layers.10.mlp", "meta-llama/Llama-3.2-1B", "blocks.10.hook_mlp_out"),
        (
            "layers.10.mlp",
            "google/gemma-2-2b",
            "blocks.10.mlp.hook_out",
        ),  # before the norm that hook_mlp_out comes after
        ("layers.10.self_attn", "", None),
        ("embed_tokens", "", None),
    ],
)
def test_the_hook_point_of_a_module(module, model, hook):
    assert module_hook(module, model) == hook


def test_sparsify_beside_the_library(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="sparsify, the oracle, is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        theirs = sparsify.SparseCoder(
            D, sparsify.SparseCoderConfig(expansion_factor=3, k=K), dtype=dtype
        ).requires_grad_(False)
        theirs.encoder.bias.copy_(noise(F))
        theirs.b_dec.copy_(noise(D, seed=2))
        folder = tmp_path / str(dtype) / "layers.1"
        theirs.save_to_disk(folder)
        ours, x = load_sae(folder), activations(1000).to(dtype)
        values, indices, _ = theirs.encode(x)
        codes = torch.zeros(1000, F, dtype=dtype).scatter(-1, indices, values)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        same = ((ours.encode(x) > 0) == (codes > 0)).all(-1)
        assert same.float().mean() > (0.999 if dtype == torch.float32 else 0.9)  # ties of bfloat16 fall either way
        torch.testing.assert_close(ours.encode(x)[same], codes[same], **tolerance)
        decoded = codes @ theirs.W_dec + theirs.b_dec  # what its decoder computes; the kernel itself wants a GPU
        torch.testing.assert_close(ours.decode(codes), decoded, **tolerance)


# ---- dictionary_learning: ae.pt and config.json


def _auto_encoder(x, w):
    return torch.relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]), w["decoder.weight"].T, w["bias"]


def _auto_encoder_new(x, w):
    return torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"]), w["decoder.weight"].T, w["decoder.bias"]


def _gated(x, w):
    pre = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    open_ = (pre + w["gate_bias"] > 0).float()
    return open_ * torch.relu(w["r_mag"].exp() * pre + w["mag_bias"]), w["decoder.weight"].T, w["decoder_bias"]


def _top_k(x, w):
    pre = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return top(pre), w["decoder.weight"].T, w["b_dec"]


def _batch_top_k(x, w):
    pre = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return pre * (pre > w["threshold"]), w["decoder.weight"].T, w["b_dec"]


def _jump_relu(x, w):
    pre = x @ w["W_enc"] + w["b_enc"]
    return torch.relu(pre * (pre > w["threshold"])), w["W_dec"], w["b_dec"]


_K = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.2)}
_GATES = {name: noise(F, seed=seed) for seed, name in enumerate(("r_mag", "gate_bias", "mag_bias"))}
_JUMP = {"W_enc": unit(F, D).T.contiguous(), "W_dec": unit(F, D), "threshold": 1 + noise(F).abs()}
DICTIONARIES = {
    "AutoEncoder": (_auto_encoder, dictionary_weights() | {"bias": noise(D, seed=3)}),
    "AutoEncoderNew": (_auto_encoder_new, dictionary_weights() | {"decoder.bias": noise(D, seed=3)}),
    "GatedAutoEncoder": (_gated, dictionary_weights(bias=False) | {"decoder_bias": noise(D, seed=3)} | _GATES),
    "AutoEncoderTopK": (_top_k, dictionary_weights() | {"b_dec": noise(D, seed=3)} | _K),
    "BatchTopKSAE": (_batch_top_k, dictionary_weights() | {"b_dec": noise(D, seed=3)} | _K),
    "JumpReluAutoEncoder": (_jump_relu, _JUMP | {"b_enc": noise(F), "b_dec": noise(D, seed=3)}),
}


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(tmp_path, kind):
    encode, weights = DICTIONARIES[kind]
    trainer = {"k": K} if "TopK" in kind else {}
    folder = write_dictionary(tmp_path / "sae", kind, weights, **trainer)
    sae, x = load_sae(folder), activations()
    acts, W_dec, b_dec = encode(x, weights)
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), acts @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
    found = describe_sae(folder)
    assert (found.d_in, found.d_sae) == (D, F)
    assert found.expected_l0 == (K if "TopK" in kind else None)
    assert (found.metadata["hook_name"], found.metadata["context_size"]) == ("blocks.1.hook_resid_post", 128)
    assert describe_sae(f"{folder}/ae.pt").architecture == found.architecture
    accelerate(sae)
    torch.testing.assert_close(sae(x), acts @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
    if kind == "AutoEncoderTopK":  # the others are dense on so small an SAE
        assert sum(stats(sae).fast.values()) > 0


def test_dictionary_learning_that_does_not_fit_together_is_refused(tmp_path):
    _, weights = DICTIONARIES["AutoEncoderTopK"]
    wrong_k = write_dictionary(tmp_path / "k", "AutoEncoderTopK", weights, k=K + 1)
    with pytest.raises(ValueError, match=r"sae: .* \(k of ae.pt must be that of config.json, 5, got 4\)"):
        load_sae(wrong_k)
    with pytest.raises(ValueError, match=r"dict_class must be one of AutoEncoder, .* got IdentityDict"):
        describe_sae(write_dictionary(tmp_path / "id", "IdentityDict", weights))
    unsaid = write_dictionary(tmp_path / "mlp", "AutoEncoderTopK", weights, k=K, submodule_name="mlp_out_layer_1")
    assert "hook_name" not in describe_sae(unsaid).metadata  # a run asks for --hook


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", {"encoder.weight": Evil()})
    with pytest.raises(ValueError, match="sae: must be a complete SAE in dictionary_learning format"):
        load_sae(folder)


# ---- Gemma Scope: params.npz in google/gemma-scope-2b-pt-res/layer_N/width_16k/average_l0_M


@pytest.mark.parametrize(
    ("path", "hook", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "blocks.20.hook_resid_post", "google/gemma-2-2b"),
        ("models--google--gemma-scope-9b-it-res/snapshots/ab/layer_9/average_l0_71", "blocks.9.hook_resid_post",
         "google/gemma-2-9b-it"),
        ("layer_5_study/embedding/gemma-scope-2b-pt-res/layer_20/average_l0_71", "blocks.20.hook_resid_post",
         "google/gemma-2-2b"),
        ("gemma-scope-27b-pt-att/layer_3/average_l0_71", "blocks.3.attn.hook_z", "google/gemma-2-27b"),
        ("gemma-scope-2b-pt-mlp/layer_0/average_l0_71", "blocks.0.hook_mlp_out", "google/gemma-2-2b"),
    ],
)  # fmt: skip
def test_gemma_scope(tmp_path, path, hook, model):
    folder, w = write_gemma_scope(tmp_path, path)
    sae, x = load_sae(folder), 2 * activations()
    h = x @ w["W_enc"] + w["b_enc"]  # b_dec is not taken off
    acts = torch.relu(h) * (h > w["threshold"])
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), acts @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    found = describe_sae(str(folder / "params.npz"))
    assert (found.d_in, found.d_sae, found.architecture, found.expected_l0) == (D, F, "jumprelu", 71)
    assert (found.metadata["hook_name"], found.metadata["model_name"]) == (hook, model)
    assert (found.metadata["context_size"], found.metadata["prepend_bos"]) == (1024, True)


def test_gemma_scope_is_fast_and_raises_no_alarm(tmp_path):
    d, f = 64, 1024
    wide = {
        "W_enc": unit(f, d).T,
        "W_dec": unit(f, d),
        "b_enc": noise(f),
        "b_dec": noise(d),
        "threshold": 2 + 0 * noise(f),
    }
    folder, w = write_gemma_scope(tmp_path, "gemma-scope-2b-pt-res/layer_2/average_l0_24", **wide)
    sae, x = load_sae(folder), torch.randn(300, d, generator=torch.Generator().manual_seed(5))
    plain = sae(x)
    accelerate(sae)
    torch.testing.assert_close(sae(x), plain, rtol=1e-5, atol=1e-5)
    assert sum(stats(sae).fast.values()) > 0
    assert not any("threshold" in sign for sign in signs(sae, x))
    assert torch.equal(w["threshold"], sae.threshold)


@pytest.mark.parametrize("path", ["gemma-scope-2b-pt-res/layer_5/average_l0_9", "gemma-scope-2b-pt-res/embedding/l0_9"])
def test_gemma_scope_weights_are_those_of_saelens(tmp_path, path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder, _ = write_gemma_scope(tmp_path, path)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: folder / "params.npz")
    repository, _, name = path.partition("/")
    overrides = {"d_in": D, "d_sae": F}
    config, theirs, _ = loaders.gemma_2_sae_huggingface_loader(repository, name, cfg_overrides=overrides)
    ours = load_sae(folder).state_dict()
    for weight in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=1e-6, atol=0)
    assert describe_sae(str(folder)).metadata["hook_name"] == config["hook_name"]


def test_gemma_scope_elsewhere_says_no_more_than_its_file(tmp_path):
    folder, _ = write_gemma_scope(tmp_path, "mine")
    assert describe_sae(str(folder)).metadata.keys().isdisjoint({"hook_name", "model_name", "prepend_bos"})
    assert load_sae(folder).cfg.d_sae == F


def test_gemma_scope_that_is_scaled_is_refused(tmp_path):
    scaled = {"scaling_factor": torch.full((D,), 2.0)}
    folder, _ = write_gemma_scope(tmp_path, "gemma-scope-2b-pt-res/layer_1", **scaled)
    with pytest.raises(ValueError, match="scaling_factor must be 1"):
        load_sae(folder)


def test_gemma_scope_without_thresholds_is_refused(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res"
    folder.mkdir()
    np.savez(
        folder / "params.npz", w_enc=np.zeros((D, F)), w_dec=np.zeros((F, D)), b_enc=np.zeros(F), b_dec=np.zeros(D)
    )
    with pytest.raises(
        ValueError, match=r"params.npz must have W_enc, W_dec, b_enc, b_dec, threshold, got none named thr"
    ):
        load_sae(folder)
