"""Llama Scope, Qwen Scope and OpenAI's SAEs in their own layouts, beside plain-torch definitions of their libraries."""

import json

import pytest
import torch
from cases import saes  # noqa: F401  (small SAEs may be fast)
from cases.formats import D, F, K, activations, top, unit, write_llama_scope, write_openai, write_qwen_scope
from safetensors.torch import save_file

from darkmatter_ext import accelerate, stats
from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.loading import describe_sae, load_sae
from darkmatter_ext.saes.sanity import signs


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- Llama Scope: hyperparams.json and checkpoints/final.safetensors


def llama_scope(x, w, own):
    """Latents and output from activations as they were in training: scaled, and scaled back."""
    norms = own["dataset_average_activation_norm"]
    s_in, s_out = ((D**0.5 / norms[side]) for side in ("in", "out"))
    if own["norm_activation"] == "inference":
        s_in = s_out = 1.0
    if own["norm_activation"] == "token-wise":
        s_in = s_out = D**0.5 / x.norm(dim=-1, keepdim=True)
    scaled = x * s_in - (w["decoder.bias"] if own["apply_decoder_bias_to_pre_encoder"] else 0)
    pre = scaled @ w["encoder.weight"].T + w["encoder.bias"]
    size = w["decoder.weight"].norm(dim=0) if own["sparsity_include_decoder_norm"] else torch.ones(F)
    counted = pre * size  # in units of a unit decoder
    dataset_wise = own["norm_activation"] == "dataset-wise"
    unscaled = (
        counted / s_in * (s_in / s_out if own["sparsity_include_decoder_norm"] else 1) if dataset_wise else counted
    )
    if own["act_fn"] == "jumprelu" or (own["act_fn"] == "topk" and own["jump_relu_threshold"] > 0):
        kept = unscaled > own["jump_relu_threshold"]
    elif own["act_fn"] == "topk":
        kept = top(torch.relu(counted)) > 0
    else:
        kept = pre > 0
    return kept, ((pre * kept) @ w["decoder.weight"].T + w["decoder.bias"]) / s_out


LLAMA_SCOPE = {
    "as released": {},
    "rows counted as they are": {"sparsity_include_decoder_norm": False},
    "bias taken off": {"apply_decoder_bias_to_pre_encoder": True},
    "activations as they are": {"norm_activation": "inference"},
    "every token scaled": {"norm_activation": "token-wise"},
    "TopK": {"act_fn": "topk", "jump_relu_threshold": 0.0},
    "TopK without norms": {"act_fn": "topk", "jump_relu_threshold": 0.0, "sparsity_include_decoder_norm": False},
    "TopK with a threshold": {"act_fn": "topk"},
    "ReLU": {"act_fn": "relu", "norm_activation": "inference", "sparsity_include_decoder_norm": False},
}


@pytest.mark.parametrize("changed", LLAMA_SCOPE.values(), ids=LLAMA_SCOPE)
def test_llama_scope(tmp_path, changed):
    folder, w, own = write_llama_scope(tmp_path / "Llama3_1-8B-Base-L19R-8x", **changed)
    sae, x = load_sae(folder), 0.5 * activations()
    kept, x_hat = llama_scope(x, w, own)
    assert 0 < kept.sum() < kept.numel() / 2
    assert torch.equal(sae.encode(x) > 0, kept)
    _close(sae(x), x_hat)
    _close(as_encoder(sae)(x).x_hat, x_hat)


def test_llama_scope_is_described_and_found_by_its_file(tmp_path):
    folder, w, own = write_llama_scope(tmp_path / "Llama3_1-8B-Base-L19R-8x")
    for spec in (folder, folder / "checkpoints" / "final.safetensors"):
        found = describe_sae(str(spec))
        assert (found.name, found.d_in, found.d_sae) == ("Llama3_1-8B-Base-L19R-8x", D, F)
        assert (found.architecture, found.expected_l0, found.normalize_activations) == ("jumprelu", K, "none")
        assert found.metadata["hook_name"] == "blocks.19.hook_resid_post"
        assert found.metadata["model_name"] == "meta-llama/Llama-3.1-8B"
    sae, x = accelerate(load_sae(folder)), 0.5 * activations()
    _close(sae(x), llama_scope(x, w, own)[1])
    assert not [sign for sign in signs(sae, x) if "norm" in sign or "threshold" in sign]


def test_llama_scope_in_bfloat16_stays_so(tmp_path):
    folder, w, own = write_llama_scope(tmp_path / "L1R", dtype=torch.bfloat16)
    sae, x = load_sae(folder), 0.5 * activations()
    assert sae.dtype == torch.bfloat16
    kept, x_hat = llama_scope(x, w, own)
    found = load_sae(folder, dtype="float32")
    assert ((found.encode(x) > 0) == kept).float().mean() > 0.995  # weights are rounded once, as its library does
    same = ((found.encode(x) > 0) == kept).all(-1)
    torch.testing.assert_close(found(x)[same], x_hat[same], rtol=2e-2, atol=2e-2)


def test_saelens_reads_llama_scope_with_unit_rows_as_we_do_and_no_others(tmp_path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    def theirs(folder):
        monkeypatch.setattr(loaders, "hf_hub_download", lambda *_, **more: str(folder / _name(_, more)))
        overrides = {"dtype": "float32"}
        config, weights, _ = loaders.llama_scope_sae_huggingface_loader("repo", "L", "cpu", cfg_overrides=overrides)
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=config["apply_b_dec_to_input"]))
        sae.load_state_dict(weights)
        sae.fold_activation_norm_scaling_factor(D**0.5 / 2.5)
        return sae

    def _name(args, more):
        return "checkpoints/final.safetensors" if "subfolder" in more else args[1].partition("/")[2]

    x = 0.5 * activations()
    folder, w, own = write_llama_scope(tmp_path / "any")
    assert not torch.equal(theirs(folder).encode(x) > 0, llama_scope(x, w, own)[0])  # rows of 0.5 to 2
    w["decoder.weight"] = unit(F, D).T.contiguous()
    save_file(w, folder / "checkpoints" / "final.safetensors")
    assert torch.equal(theirs(folder).encode(x) > 0, llama_scope(x, w, own)[0])
    _close(load_sae(folder)(x), theirs(folder)(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder must be false, got true"),
        ({"act_fn": "gelu"}, "act_fn must be one of jumprelu, topk, relu, got gelu"),
        ({"norm_activation": "batch-wise"}, "norm_activation must be one of .*, got batch-wise"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm must have in and out"),
        ({"jump_relu_threshold": -1.0}, "jump_relu_threshold must be at least 0, got -1"),
    ],
)
def test_llama_scope_that_is_not_understood_is_refused(tmp_path, changed, message):
    folder, _, _ = write_llama_scope(tmp_path / "L", **changed)
    for call in (describe_sae, load_sae):
        with pytest.raises(ValueError, match=rf"^sae: .*{message}"):
            call(str(folder))


# ---- Qwen Scope: layerN.sae.pt in a repository whose name says the rest


def _small_qwen(monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, "Tiny", ("Qwen/Tiny", D))
    monkeypatch.setattr(loaders, "_parse_qwen_scope_repo_id", lambda _: ("Tiny", F, K))


def test_qwen_scope(tmp_path, monkeypatch):
    _small_qwen(monkeypatch)
    folder, w = write_qwen_scope(tmp_path, layers=(0, 2, 10))
    path = folder / "layer10.sae.pt"
    sae, x = load_sae(path), activations()
    acts = top(torch.relu(x @ w["W_enc"].T + w["b_enc"]))  # b_dec is not taken off
    _close(sae.encode(x), acts)
    _close(sae(x), acts @ w["W_dec"].T + w["b_dec"])
    found = describe_sae(str(path))
    assert (found.name, found.d_in, found.d_sae, found.architecture) == ("layer10", D, F, "topk")
    assert found.metadata["hook_name"] == "blocks.10.hook_resid_post"
    assert found.metadata["model_name"] == "Qwen/Tiny"
    accelerate(sae)(x)
    assert sum(stats(sae).fast.values()) > 0


def test_qwen_scope_says_which_sae_is_wanted(tmp_path, monkeypatch):
    folder, _ = write_qwen_scope(tmp_path, layers=(0, 2, 10, 3))
    with pytest.raises(
        ValueError, match=r"must be one SAE, got .* with layer0.sae.pt, layer2.sae.pt, layer3.sae.pt, ..."
    ):
        load_sae(folder)
    found = describe_sae(str(folder / "layer2.sae.pt"))
    assert (found.d_in, found.d_sae, found.expected_l0) == (2048, 32768, 50)  # what the name says
    with pytest.raises(ValueError, match="size mismatch"):
        load_sae(folder / "layer2.sae.pt")
    elsewhere, _ = write_qwen_scope(tmp_path, repository="mine")
    with pytest.raises(ValueError, match="the path must have SAE-Res-MODEL-WnK-L0_k"):
        describe_sae(str(elsewhere))
    _small_qwen(monkeypatch)
    broken, _ = write_qwen_scope(tmp_path / "broken", b_enc=torch.zeros(F)[:0].tolist())
    with pytest.raises(ValueError, match=r"layer0.sae.pt must have W_enc, .* got none named b_enc"):
        load_sae(broken)


# ---- OpenAI: a state_dict with its activation


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(tmp_path, activation):
    path = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    w, x = write_openai(path, activation=activation), 3 + 2 * activations()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    given = (x - mean) / (std + 1e-5) if activation == "TopK" else x
    acts = torch.relu((given - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])
    acts = top(acts) if activation == "TopK" else acts
    x_hat = acts @ w["decoder.weight"].T + w["pre_bias"]
    x_hat = x_hat * std + mean if activation == "TopK" else x_hat
    for spec in (path, path.parent):
        sae = load_sae(spec)
        _close(sae.encode(x), acts)
        _close(sae(x), x_hat)
        _close(as_encoder(sae)(x).x_hat, x_hat)
    found = describe_sae(str(path))
    assert (found.name, found.d_in, found.d_sae) == ("8", D, F)
    assert found.metadata["hook_name"] == "blocks.8.hook_resid_post"
    assert found.metadata["model_name"] == "gpt2"
    assert found.expected_l0 == (K if activation == "TopK" else None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "Identity"}, "activation must be ReLU or TopK, got Identity"),
        (
            {"activation_state_dict": {"k": K, "postact_fn": "Identity"}},
            "postact_fn of TopK must be ReLU, got Identity",
        ),
        ({"pre_bias": None}, "autoencoder.pt must have .*, got none named pre_bias"),
    ],
)
def test_openai_that_is_not_understood_is_refused(tmp_path, changed, message):
    path = tmp_path / "sae" / "autoencoder.pt"
    write_openai(path, **changed)
    for call in (describe_sae, load_sae):
        with pytest.raises(ValueError, match=rf"^sae: .*{message}"):
            call(str(path))


@pytest.mark.parametrize("name", ["autoencoder.pt", "layer0.sae.pt", "ae.pt"])
def test_code_in_a_pickle_is_not_run(tmp_path, name, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    _small_qwen(monkeypatch)
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir()
    torch.save({"encoder.weight": Evil()}, folder / name)
    trainer = {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(ValueError, match="sae: must be a complete SAE in"):
        load_sae(folder / name)
