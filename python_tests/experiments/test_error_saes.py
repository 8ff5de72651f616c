"""SAEs on the parts of the error: the parts add up, numbers by their definition, the command, no call unasked."""

import urllib.request

import pytest
import torch
from cases.models import flags

from darkmatter_ext.activations import store
from darkmatter_ext.experiments.error_saes import fit_error_map, fvu, reconstruction_numbers, split_errors
from darkmatter_ext.measurement.decompose import TokenBatch
from darkmatter_ext.measurement.detection import Snippets
from darkmatter_ext.measurement.stored_tokens import StoredTokens
from darkmatter_ext.measurement.tokens import FIT, HELD_OUT, LeftOut
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.ops.encode import topk_encode
from darkmatter_ext.saes.encoders import Encoded, as_encoder
from darkmatter_ext.training.config import TrainingConfig
from darkmatter_ext.training.train import train


def _batches(n=4000, d=6, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 2
    train = torch.arange(n) % 3 < 2
    return x, train, [TokenBatch(x[i : i + 900], train[i : i + 900], i) for i in range(0, n, 900)]


def test_parts_add_up_and_the_planted_map_is_found():
    x, train, batches = _batches()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) / 6

    def sae(x):
        planted = x @ weight + 0.5 * (x - 2).square()
        return Encoded(x - planted, torch.zeros(len(x)), acts=None)

    found = fit_error_map(batches, sae, on_all=False)
    assert found.n_tokens == int(train.sum())
    torch.testing.assert_close(found.weight.float(), weight, rtol=0, atol=0.05)  # the square is even: no linear part
    fit, held_out = split_errors(batches, sae, found)
    assert torch.equal(held_out.activation, x[~train])
    error = x[~train] @ weight + 0.5 * (x[~train] - 2).square()
    torch.testing.assert_close(held_out.linear + held_out.nonlinear, error, rtol=1e-4, atol=1e-4)
    assert len(fit.linear) == int(train.sum())
    assert fit_error_map(batches, sae, on_all=True).n_tokens == len(x)


def test_numbers_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    y, W_enc = torch.randn(5000, 6, generator=generator), torch.randn(6, 20, generator=generator)
    b_enc = torch.zeros(20)
    b_enc[3] = -1000  # a dead latent

    def encode(x):
        acts = topk_encode(x, W_enc, b_enc, 4)
        return Encoded(acts.to_dense() @ W_enc.mT / 20, acts.l0(), acts)

    found = reconstruction_numbers(encode, y)
    dense = encode(y).acts.to_dense()
    expected = (y - dense @ W_enc.mT / 20).square().sum() / (y - y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(expected.item(), rel=1e-5)
    assert fvu(encode, y) == pytest.approx(found["fvu"])
    assert found["l0"] == pytest.approx((dense != 0).sum(1).double().mean().item())
    assert found["dead"] == pytest.approx(((dense != 0).sum(0) == 0).double().mean().item())
    assert found["dead"] >= 1 / 20


def test_snippets_are_held_out_tokens_in_a_row(tmp_path):
    tokens = torch.arange(40).view(4, 10)
    store._write_shard(tmp_path, 0, torch.zeros(4, 10, 2), tokens, torch.tensor([7, 7, 7, 8]))
    cache = store.ActivationCache(tmp_path, {"d_in": 2, "n_contexts": 4, "context_length": 10})
    roles = torch.full((4, 10), FIT, dtype=torch.uint8)
    roles[1, 2:] = HELD_OUT
    roles[3, :] = HELD_OUT
    roles[3, 5] = 0
    stored = StoredTokens(cache, roles, LeftOut(), 1.0, 1.0, 0.0)
    snippets = Snippets.cut(stored, 4, str)
    assert snippets.documents == [7, 8]
    assert snippets.tokens == [["14", "15", "16", "17"], ["30", "31", "32", "33"]]
    assert snippets.rows.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]  # places among the 17 held-out tokens
    dense = torch.zeros(17, 5)
    dense[2:4, 1] = 1  # twice on the first snippet
    dense[8, 1] = 1
    dense[0, 2] = 1  # on no snippet
    assert snippets.firing(SparseActs.from_dense(dense)).tolist() == [0, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="context_length: must hold 16 held-out tokens in a row"):
        Snippets.cut(stored, 16, str)


def test_a_run_without_a_call_to_any_network(finished, monkeypatch):
    def call(*_args, **_kwargs):
        raise AssertionError("a call to the network that nobody asked for")

    monkeypatch.setattr(urllib.request, "urlopen", call)
    out, result, _ = finished("error-saes")
    for target in ("linear", "nonlinear"):
        numbers = {key: result.numbers[f"{target}/{key}"] for key in ("fvu", "fvu/low", "fvu/high", "l0", "dead")}
        assert numbers["fvu/low"] <= numbers["fvu"] <= numbers["fvu/high"]
        assert 0 < numbers["l0"] <= 1
        assert 0 <= numbers["dead"] < 1
        assert 0 <= result.numbers[f"{target}/detection_accuracy"] <= 1
        assert len(result.series["judged"][target]["deciles"]) == 10
    (explored,) = result.series["explored"]["saes"]  # the SAE whose error it is, with what was said of its latents
    judged = {str(one["latent"]): one for one in result.series["judged"]["activation"]["latents"]}
    assert explored["name"] == "topk-64"
    assert 0 < len(explored["explanations"]) <= len(judged) == 4
    for latent, (text, score) in explored["explanations"].items():
        assert (text, score) == (judged[latent]["explanation"], judged[latent]["score"])
    assert all(0 <= one["score"] <= 1 for one in judged.values())
    assert {path.name for path in out.glob("*.png")} == {"error-saes_fvu.png", "error-saes_detection.png"}
    assert len({sae["folder"] for sae in result.series["saes"]}) == 4
    monkeypatch.setattr("darkmatter_ext.measurement.site_saes.train", None)  # training again would fail
    assert finished("error-saes", "--seed", "0").result.numbers == result.numbers


def test_released_code_fits_on_all_tokens(finished):
    notes = finished("error-saes", "--latents", "0", "--parity", "released-code").result.notes
    assert any("held-out tokens too" in note for note in notes)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--scorer", "endpoint"), "OpenAI-compatible server for scorer endpoint, got none"),
        (
            ("--scorer", "endpoint", "--endpoint", "http://127.0.0.1:9/v1"),
            "--scorer-model: must name the server's model",
        ),
        (
            ("--scorer", "endpoint", "--endpoint", "http://127.0.0.1:9/v1", "--scorer-model", "m"),
            "--endpoint: must answer chat completions, got http://127.0.0.1:9/v1 ([Errno 111] Connection refused)",
        ),
        (
            ("--endpoint", "http://127.0.0.1:9/v1"),
            "--endpoint: is asked only with scorer endpoint, got scorer offline",
        ),
        (("--scorer", "people"), "--scorer: must be offline, local or endpoint, got 'people'"),
        (("--widths", "24", "48"), "--sae, --widths: must name one SAE, got 2"),
        (("--error-width", "8"), "--error-width: must be at least error_k (32), got 8"),
        (("--training-seeds", "0"), "--training-seeds: must be at least 1, got 0"),
        (("--parity", "code"), "--parity: must be paper or released-code, got 'code'"),
    ],
)
def test_bad_settings_give_one_line(workplace, more, message, refused, tmp_path):
    arguments = flags(workplace, "--widths", "24", *more, "--out", str(tmp_path), experiment="error-saes")
    refused(arguments, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.runs
def test_sparse_structure_is_told_from_noise_of_the_same_covariance():
    """What the experiment asks of an error: an SAE explains one made of sparse features, and not its Gaussian twin."""
    d, latents, k, n = 24, 48, 2, 12_000
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(latents, d, generator=generator)
    features /= features.norm(dim=1, keepdim=True)
    active = torch.rand(n, latents, generator=generator).topk(k).indices
    strength = torch.zeros(n, latents).scatter_(1, active, 1 + torch.rand(n, k, generator=generator))
    sparse = strength @ features
    factor = torch.linalg.cholesky(torch.cov((sparse - sparse.mean(0)).T.double())).float()
    noise = sparse.mean(0) + torch.randn(n, d, generator=generator) @ factor.T
    training = TrainingConfig(d_sae=latents, k=k, steps=400, batch_size=512, learning_rate=5e-3)
    found = {}
    for name, y in (("sparse", sparse), ("noise", noise)):
        found[name] = fvu(as_encoder(train(y[:9000], training).sae), y[9000:])
    assert found["sparse"] < 0.5 * found["noise"], found
