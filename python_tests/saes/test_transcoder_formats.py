"""Transcoders of other libraries in their own layouts: the same latents, the same output, the two sites they name."""

import pytest
import torch
from cases import saes  # noqa: F401  (small SAEs may be fast)
from cases.formats import (
    D,
    F,
    K,
    activations,
    noise,
    top,
    unit,
    write_circuit_tracer,
    write_gemma_scope,
    write_sparsify,
)

from darkmatter_ext import accelerate
from darkmatter_ext.saes.encoders import as_encoder
from darkmatter_ext.saes.loading import describe_sae, load_sae


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _sites(spec):
    metadata = describe_sae(str(spec)).metadata
    return metadata["hook_name"], metadata["hook_name_out"]


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcoder(tmp_path, skip):
    folder, w = write_sparsify(tmp_path / "run", module="layers.3.mlp", transcode=True, skip_connection=skip)
    sae, x = load_sae(folder), activations()
    acts = top(torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"]))  # b_dec is not taken off
    y_hat = acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)
    _close(sae.encode(x), acts)
    _close(sae(x), y_hat)
    encoded = as_encoder(sae)(x)
    _close(encoded.x_hat, y_hat)
    _close(encoded.acts.to_dense(), acts)
    assert encoded.l0.eq(K).all()
    _close(accelerate(sae)(x), y_hat)  # SAELens' code answers: the drop-in has no fast path for these
    assert _sites(folder) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    found = describe_sae(str(folder))
    assert (found.transcodes, found.width_out, found.expected_l0) == (True, D, K)


def test_a_saved_topk_transcoder_is_read_again(tmp_path):
    folder, _ = write_sparsify(tmp_path / "run", module="layers.3.mlp", transcode=True, skip_connection=True)
    sae, x = load_sae(folder), activations()
    sae.save_model(tmp_path / "again")
    again = load_sae(tmp_path / "again")
    assert torch.equal(again(x), sae(x))
    assert _sites(tmp_path / "again") == _sites(folder)


def test_sparsify_transcoder_beside_the_library(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="sparsify, the oracle, is not installed")
    config = sparsify.SparseCoderConfig(expansion_factor=3, k=K, transcode=True, skip_connection=True)
    theirs = sparsify.SparseCoder(D, config, dtype=torch.float32).requires_grad_(False)
    for parameter, value in (
        (theirs.encoder.bias, noise(F)), (theirs.W_dec, unit(F, D, seed=3)), (theirs.b_dec, noise(D, seed=2)),
        (theirs.W_skip, noise(D, D, seed=4)),
    ):  # fmt: skip
        parameter.copy_(value)
    theirs.save_to_disk(tmp_path / "layers.1.mlp")
    x = activations(1000)
    values, indices, _ = theirs.encode(x)
    codes = torch.zeros(1000, F).scatter(-1, indices, values)
    expected = codes @ theirs.W_dec + theirs.b_dec + x @ theirs.W_skip.mT  # its decoder's kernel wants a GPU
    _close(load_sae(tmp_path / "layers.1.mlp")(x), expected)


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer(tmp_path, jumps, skip):
    more = {"activation_function.threshold": 0.3 + noise(F, seed=6).abs()} if jumps else {}
    more |= {"W_skip": noise(D, D, seed=4)} if skip else {}
    path, w = write_circuit_tracer(tmp_path / "set", layers=3, **more)
    sae, x = load_sae(path), activations()
    pre = x @ w["W_enc"].T + w["b_enc"]
    acts = pre * (pre > w["activation_function.threshold"]) if jumps else torch.relu(pre)
    y_hat = acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)
    _close(sae.encode(x), acts)
    _close(sae(x), y_hat)
    _close(as_encoder(sae)(x).x_hat, y_hat)
    assert _sites(path) == ("blocks.2.hook_resid_mid", "blocks.2.mlp.hook_out")
    assert describe_sae(str(path)).metadata["model_name"] == "meta-llama/Llama-3.2-1B"
    assert describe_sae(str(path)).name == "layer_2"


def test_circuit_tracer_of_its_first_releases_kept_decoders_as_columns(tmp_path):
    path, _ = write_circuit_tracer(tmp_path / "new")
    old, _ = write_circuit_tracer(tmp_path / "old", W_dec=unit(F, D, seed=3).T.contiguous())
    assert torch.equal(load_sae(old)(activations()), load_sae(path)(activations()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"model_kind": "cross_layer_transcoder"}}, "model_kind must be transcoder_set, got cross_layer"),
        ({"b_enc": None}, "must have W_enc, .* got none named b_enc"),
        ({"log_thresholds": noise(F)}, "must have known tensors only, got log_thresholds"),
        ({"activation_function.threshold": noise(F)}, "thresholds must be at least 0"),
    ],
)
def test_circuit_tracer_that_is_not_understood_is_refused(tmp_path, changed, message):
    path, _ = write_circuit_tracer(tmp_path / "set", **changed)
    with pytest.raises(ValueError, match=rf"^sae: .*{message}"):
        load_sae(path)


def test_gemma_scope_transcoder(tmp_path):
    path = "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_9"
    folder, w = write_gemma_scope(tmp_path, path)
    sae, x = load_sae(folder), 2 * activations()
    pre = x @ w["W_enc"] + w["b_enc"]
    _close(sae(x), torch.relu(pre) * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"])
    assert _sites(folder) == ("blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out")
    assert describe_sae(str(folder)).architecture == "jumprelu_transcoder"
