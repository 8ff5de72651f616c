"""What each part of SAE error costs, on planted errors whose parts are known, and the command on a small model."""

import math

import pytest
import torch
from cases.models import flags, small_model

from darkmatter_ext import cli
from darkmatter_ext.activations.splicing import SplicedModel, SplicedTokens, TokenLosses, splice_losses
from darkmatter_ext.estimators.least_squares import LinearMap
from darkmatter_ext.experiments.downstream import SETTINGS, loss_numbers, recovery_numbers, verdict
from darkmatter_ext.measurement.sae_splices import sae_splices
from darkmatter_ext.saes.encoders import Encoded, as_encoder, random_dictionary, shuffled_sae

CONTEXTS, LENGTH = 60, 20


def _own_text(network):
    """Contexts that the model itself writes: of random tokens it predicts none better than another model does."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (CONTEXTS, 1), generator=generator)
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            following = network(tokens).logits[:, -1].softmax(-1).multinomial(1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def _splice(error_of, linear_of, seed=0):
    """The four settings of an "SAE" with a known error and its known linear part, on a small model."""
    network = small_model("llama").eval()
    with torch.no_grad():
        network.lm_head.weight *= 20
    model = SplicedModel(network, 1)
    tokens = _own_text(network)
    own = model.activation(tokens)

    def encode(x):
        return Encoded(x - error_of(x), torch.zeros(len(x)), acts=None)

    splices = sae_splices(encode, linear_of, seed=seed)
    named = {f"s/{name}": splice for name, splice in splices.items()}
    losses = splice_losses(model, tokens, own, torch.ones(CONTEXTS, LENGTH, dtype=torch.bool), named)
    context = torch.arange(CONTEXTS).repeat_interleave(LENGTH - 1)
    position = torch.arange(LENGTH - 1).repeat(CONTEXTS)
    return SplicedTokens(context, position, tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), losses)


def _linear(scale):
    weight = scale * torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(8))).Q.double()
    return LinearMap(weight, torch.zeros(16, dtype=torch.float64), 16, 1000)


def test_an_error_that_is_all_linear_is_recovered_by_its_linear_part():
    linear = _linear(0.5)
    tokens = _splice(lambda x: linear(x).to(x.dtype), linear)
    numbers = recovery_numbers(tokens, tokens.context, "s")
    for quantity in ("ce_recovered", "kl_recovered"):
        assert numbers[f"s/linear/{quantity}"] == pytest.approx(100, abs=0.1)
        assert numbers[f"s/nonlinear/{quantity}"] == pytest.approx(0, abs=0.1)
    assert numbers["s/shuffled/kl_recovered/high"] < 0  # another token's part only adds error


def test_an_error_that_is_all_nonlinear_is_recovered_by_the_rest():
    generator = torch.Generator().manual_seed(4)
    nothing = LinearMap(torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64), 16, 1000)
    noise = 0.3 * torch.randn(CONTEXTS * LENGTH, 16, generator=generator)
    tokens = _splice(lambda x: noise, nothing)
    numbers = recovery_numbers(tokens, tokens.context, "s")
    for quantity in ("ce_recovered", "kl_recovered"):
        assert numbers[f"s/linear/{quantity}"] == pytest.approx(0, abs=0.1)
        assert numbers[f"s/nonlinear/{quantity}"] == pytest.approx(100, abs=0.1)


def test_recovery_is_a_ratio_of_sums_over_documents():
    """Against the definition on planted losses, documents of different weight; the interval holds the planted value."""
    generator = torch.Generator().manual_seed(1)
    context = torch.arange(40).repeat_interleave(10)
    original = 2 + torch.rand(400, generator=generator)
    increase = torch.rand(400, generator=generator) * (1 + context % 4)
    spliced = {"s/sae": original + increase, "s/linear": original + 0.25 * increase, "s/nonlinear": original + increase}
    spliced["s/shuffled"] = original + 2 * increase
    spliced["s/nonlinear"] = original + torch.where(context % 2 == 0, 0.0, increase)
    kl = {name: loss - original for name, loss in spliced.items()}
    tokens = SplicedTokens(context, context, context, context, TokenLosses(original, spliced, kl))
    numbers = recovery_numbers(tokens, context, "s")
    assert numbers["s/linear/ce_recovered"] == pytest.approx(75, abs=1e-3)
    assert numbers["s/linear/ce_recovered/low"] == pytest.approx(75, abs=1e-2)
    assert numbers["s/shuffled/ce_recovered"] == pytest.approx(-100, abs=1e-3)
    even = (increase[context % 2 == 0].sum() / increase.sum()).item() * 100
    assert numbers["s/nonlinear/ce_recovered"] == pytest.approx(even, abs=1e-3)
    assert numbers["s/nonlinear/ce_recovered/low"] < even - 5 < even + 5 < numbers["s/nonlinear/ce_recovered/high"]
    assert loss_numbers(tokens, context, "s/sae", seed=0)["s/sae/ce_increase"] == pytest.approx(
        increase.mean().item(), rel=1e-5
    )


def test_a_share_of_an_increase_that_may_be_none_is_not_a_number():
    """A good SAE: its CE increase is noise about 0 over documents, its KL is not."""
    generator = torch.Generator().manual_seed(2)
    document = torch.arange(12).repeat_interleave(20)
    original = 2 + torch.rand(240, generator=generator)
    increase = torch.randn(12, generator=generator)[document] + 0.01
    losses = {name: original + factor * increase for name, factor in zip(SETTINGS, (1, 0.5, 0.5, 1), strict=True)}
    spliced = {f"s/{name}": loss for name, loss in losses.items()}
    kl = {f"s/{name}": (loss - original).abs() for name, loss in losses.items()}
    tokens = SplicedTokens(document, document, document, document, TokenLosses(original, spliced, kl))
    numbers = recovery_numbers(tokens, document, "s")
    assert all(math.isnan(numbers[f"s/linear/ce_recovered{end}"]) for end in ("", "/low", "/high"))
    assert numbers["s/linear/kl_recovered"] == pytest.approx(50)
    assert "cannot be told" in verdict(60, numbers["s/linear/ce_recovered/low"], numbers["s/linear/ce_recovered/high"])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (55, 65, "in proportion (within 10 points)"),
        (20, 59, "less than its share"),
        (61, 90, "more than its share"),
        (-39, 870, "cannot be told, the interval is too wide"),
        (49, 65, "cannot be told, the interval is too wide"),
        (math.nan, math.nan, "cannot be told, the CE increase is not clear of 0"),
    ],
)
def test_proportion_is_said_only_when_it_is_shown(low, high, expected):
    assert verdict(60, low, high) == expected


def test_contexts_of_one_document_make_no_interval_narrower():
    """The same losses as 60 documents and as 6: what a document shares is counted once."""
    document = torch.arange(60).repeat_interleave(5) // 10
    shared = 1 + torch.randn(6, generator=torch.Generator().manual_seed(0)).square()
    increase = shared[document]
    zero = torch.zeros_like(increase)
    tokens = SplicedTokens(document, document, document, document, TokenLosses(zero, {"s": increase}, {"s": increase}))
    numbers = loss_numbers(tokens, document, "s", seed=0)
    expected = 2.5706 * shared.std().item() / 6**0.5  # Student's t with 5 degrees
    assert numbers["s/kl/high"] - numbers["s/kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.runs
def test_controls_reconstruct_badly_and_sparsely():
    from darkmatter_ext.training.config import TrainingConfig
    from darkmatter_ext.training.train import train

    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17) + 3
    settings = TrainingConfig(d_sae=64, k=4, steps=200, batch_size=256, learning_rate=3e-3)
    sae = train(x, settings).sae
    before = sae.W_dec.detach().clone()
    own = (x[:500] - sae(x[:500])).square().sum()
    random = random_dictionary(x.mean(0), 64, 4, seed=0)(x[:500])
    shuffled = as_encoder(shuffled_sae(sae, seed=0))(x[:500])
    variance = (x[:500] - x.mean(0)).square().sum()
    assert own < (x[:500] - random.x_hat).square().sum() < variance
    assert (x[:500] - shuffled.x_hat).square().sum() > variance
    assert (random.l0 <= 4).all()
    assert torch.equal(shuffled.l0, (sae.encode(x[:500]) != 0).sum(-1))
    assert torch.equal(sae.W_dec, before)  # the SAE itself is as it was


def test_a_run_keeps_every_token(finished):
    out, result, _ = finished("downstream")
    assert {path.name for path in out.iterdir()} == {
        "downstream.json", "downstream.npz", "downstream_losses.png", "downstream_recovered.png", "report.html",
    }  # fmt: skip
    n = result.numbers["spliced_tokens"]
    assert n == 6 * (32 - 8 - 1)
    columns = result.arrays
    assert all(len(column) == n for column in columns.values())
    assert len(set(columns["context"].tolist())) == result.numbers["spliced_contexts"] == 6
    assert (columns["position"].min(), columns["position"].max()) == (8, 30)
    assert (columns["next_token"][:-1] == columns["token"][1:])[columns["position"][:-1] != 30].all()
    for sae in ("topk-24", "topk-48"):
        assert {f"{sae}/{setting}.kl" for setting in SETTINGS} <= set(columns)
        increase = (columns[f"{sae}/sae.ce"] - columns["ce"]).astype("float64").mean()
        assert result.numbers[f"{sae}/sae/ce_increase"] == pytest.approx(increase, rel=1e-4, abs=1e-6)
        shares = [result.numbers[f"{sae}/{part}/share_of_fvu"] for part in ("linear", "nonlinear")]
        assert sum(shares) == pytest.approx(100)
        low, high = (result.numbers[f"{sae}/sae/kl/{end}"] for end in ("low", "high"))
        assert 0 <= low <= result.numbers[f"{sae}/sae/kl"] <= high


def test_bad_settings_give_one_line(finished, workplace, tmp_path, refused):
    for experiment, site in (("downstream", ()), ("pathology", ("--layers", "1"))):
        cases = [
            (["--contexts", "1"], "--contexts: must be at least 2"),
            (["--contexts", "4000"], "held-out contexts, got 4000"),
            (["--split", "tokens"], "--split: must be documents or contexts to splice into whole contexts"),
            (["--max-norm-ratio", "0.001"], "must leave tokens to measure, got 8 of contexts of 32 and 0.001"),
        ]
        for more, message in cases:
            refused(flags(workplace, "--out", str(tmp_path), *site, *more, experiment=experiment), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.runs
def test_tokens_that_are_not_the_stored_ones_give_one_line(workplace, tmp_path, refused, monkeypatch):
    """The activation cache with one token changed, and with the activations of two contexts exchanged."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    more = ("--tokens", "6400", "--contexts", "2", "--widths", "24", "--split", "contexts")
    arguments = flags(workplace, *more, "--out", str(tmp_path / "out"), experiment="downstream")
    assert cli.main(arguments) == 0
    shards = {path: load_file(path) for path in (tmp_path / "cache" / "activations").rglob("*.safetensors")}
    for name, spoilt, message in (
        ("tokens", lambda tokens: (tokens + 1) % 10, "tokens: must be those of the stored activations, got token"),
        ("activations", lambda x: x.roll(1, 0).contiguous(), "activations: must be those of the model at the site"),
    ):
        for path, good in shards.items():
            save_file(good | {name: spoilt(good[name])}, path)
        refused(arguments, message)
