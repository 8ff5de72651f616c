"""Error norms that depend on the token, the loss or the L0 alone, and the command on a small model at two layers."""

import json

import pytest
import torch
from cases.measured import measure
from cases.models import flags, settings_of
from cases.norms import HOOK, Finished, erring_sae, r2, stored

from darkmatter_ext import cli
from darkmatter_ext.activations.sources import SelectedContexts, next_token_loss
from darkmatter_ext.experiments.baselines import PREDICTORS, random_means, sae_numbers
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.report.result import load_result

CONTEXTS, LENGTH, D, VOCABULARY = 200, 32, 8, 200
FROM_LOSS = 0.7  # correlation of the planted squared norm with the loss


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """x tells an SAE the token's number, its loss and its L0; squared norms are made of one of them each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (CONTEXTS, LENGTH), generator=generator)
    table = 1 + torch.rand(VOCABULARY, generator=generator, dtype=torch.float64)
    loss = 8 + torch.randn(CONTEXTS, LENGTH, generator=generator)
    rest = torch.randn(CONTEXTS, LENGTH, generator=generator)
    l0 = torch.randint(1, 9, (CONTEXTS, LENGTH), generator=generator).float()
    columns = [tokens.float(), loss, rest, l0, *torch.randn(D - 4, CONTEXTS, LENGTH, generator=generator)]

    def erring(square):
        def error(x):
            return torch.cat([x.new_zeros(len(x), D - 1), square(x).sqrt()[:, None]], dim=1)

        return error

    saes = [
        erring_sae("token", erring(lambda x: table[x[:, 0].long()])),
        erring_sae("loss", erring(lambda x: 8 + FROM_LOSS * (x[:, 1] - 8) + (1 - FROM_LOSS**2) ** 0.5 * x[:, 2])),
        erring_sae("l0", erring(lambda x: 2 + x[:, 3]), lambda x: x[:, 3]),
    ]
    folder = tmp_path_factory.mktemp("planted")
    source = SelectedContexts(stored(folder, torch.stack(columns, dim=-1), tokens), torch.arange(CONTEXTS), loss)
    settings = Measure(drop_positions=0, token_means=True, table_contexts=0)
    site = measure(source, saes, settings, folder=folder / "run")[HOOK]
    return site, {name: sae_numbers(site, name, seed=0) for name in ("token", "loss", "l0")}


@pytest.mark.runs
def test_each_planted_cause_is_found_by_its_predictor_and_no_other(planted):
    _, numbers = planted
    own = {"token": ("token_mean", 1), "loss": ("loss", FROM_LOSS**2), "l0": ("l0", 1)}
    for name, (cause, expected) in own.items():
        noise = numbers[name]["random_mean_expected"]
        assert noise == pytest.approx(-1 / 19, abs=0.01)  # means over 200 x 31 x 0.6 / 200 = 19 fit tokens
        for predictor in ("token_mean", "loss", "l0"):
            value, low, high = (numbers[name][f"error/{predictor}{end}"] for end in ("", "/low", "/high"))
            wanted = expected if predictor == cause else noise if predictor == "token_mean" else 0
            assert value == pytest.approx(wanted, abs=0.05 if predictor == "loss" else 0.02), (name, predictor)
            assert low <= value <= high
        chance = (
            0.1 if name == "token" else 0.02
        )  # 3 times 2 / sqrt(19 x 200): the drawn means may resemble the true ones
        assert numbers[name]["error/random_mean"] == pytest.approx(noise, abs=chance), name
        parts = ("error", "linear", "nonlinear")
        assert {f"{part}/{predictor}" for part in parts for predictor in PREDICTORS} < set(numbers[name])
    assert numbers["loss"]["error/loss/low"] < FROM_LOSS**2 < numbers["loss"]["error/loss/high"]
    assert numbers["l0"]["error/scalars"] > 0.999
    assert numbers["token"]["error/probe"] < 0.2  # a table of random numbers is not linear in the token's number
    assert numbers["loss"]["error/probe"] > 0.999  # x itself has the loss and the rest


@pytest.mark.runs
def test_token_means_equal_those_of_the_sums_and_random_ones_know_nothing(planted):
    site, numbers = planted
    exact = site.token_mean_r2()
    for name, own in numbers.items():
        for part in ("error", "nonlinear"):
            assert own[f"{part}/token_mean"] == pytest.approx(exact[f"{name}/{part}"], abs=1e-5), (name, part)
    y, counts = torch.randn(5000, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 50, 4000])
    means = random_means(y, counts, seed=0)
    assert means[0] == y.mean()
    assert means[1] in y
    assert means[3].item() == pytest.approx(y.mean().item(), abs=0.08)


def _independent(tensors, error, model):
    """The baselines of a squared norm in plain torch."""
    y, fit = error.square().sum(1), tensors.fit
    network = model.eval()
    with torch.no_grad():
        logits = network(tensors.contexts).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tensors.contexts[:, 1:].flatten(), reduction="none"
    )
    loss = loss.view(len(tensors.contexts), -1)[tensors.places]
    means = torch.stack([y[fit & (tensors.ids == token)].mean() for token in tensors.ids.unique()])
    predicted = means[tensors.ids.unique(return_inverse=True)[1]]
    residual, held_out = (y - predicted)[~fit], y[~fit]
    norm = tensors.x.double().norm(dim=1, keepdim=True)
    return {
        "probe": r2(tensors.x, y, fit),
        "loss": r2(loss[:, None], y, fit),
        "x_norm": r2(norm, y, fit),
        "x": r2(norm.square(), y, fit),
        "token_mean": (1 - residual.square().sum() / (held_out - held_out.mean()).square().sum()).item(),
    }


def test_a_run_at_two_layers_equals_plain_regressions(finished, workplace):
    from transformers import AutoModelForCausalLM

    out, result, _ = finished("baselines")
    assert {path.name for path in out.iterdir()} == {"baselines.json", "baselines_r2.png", "report.html"}
    assert [sae["layer"] for sae in result.series["saes"]] == [0, 1]
    assert list(result.series["predictors"]) == list(PREDICTORS)
    result.config["hook"] = ""  # layers say it
    tensors = Finished.of(settings_of(result), HOOK)
    model = AutoModelForCausalLM.from_pretrained(workplace / "model")
    for name, expected in _independent(tensors, tensors.error(f"{HOOK}/topk-24"), model).items():
        found = result.numbers[f"{HOOK}/topk-24/error/{name}"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    for sae in result.series["saes"]:
        ends = [result.numbers[f"{sae['name']}/nonlinear/scalars{end}"] for end in ("/low", "", "/high")]
        assert ends == sorted(ends)
        assert abs(result.numbers[f"{sae['name']}/error/random_mean"]) < 0.1


@pytest.mark.slow
def test_given_saes_are_measured_at_the_site_each_names(finished, workplace, tmp_path):
    folders = [sae["folder"] for sae in finished("baselines").result.series["saes"]]
    assert cli.main(flags(workplace, "--sae", *folders, "--out", str(tmp_path), experiment="baselines", hook="")) == 0
    assert [sae["layer"] for sae in load_result(tmp_path / "baselines.json").series["saes"]] == [0, 1]


@pytest.mark.parametrize(
    ("more", "left_out"),
    [((), set()), (("--loss", "false", "--token-means", "false"), {"loss", "token_mean", "random_mean"})],
    ids=["all", "neither loss nor token means"],
)
def test_streamed_saes_have_every_predictor_asked_for(finished, workplace, tmp_path, more, left_out):
    folders = [sae["folder"] for sae in finished("baselines").result.series["saes"]]
    text = ("--model", str(workplace / "model"), "--text", str(workplace / "text.txt"), "--tokens", "6400")
    many = ["run", "baselines", "--preset", "one-pass", "--sae", *folders, *text, "--out", str(tmp_path)]
    assert cli.main([*many, *more]) == 0
    streamed = load_result(tmp_path / "baselines.json")
    assert set(streamed.series["predictors"]) == set(PREDICTORS) - left_out
    assert {sae["hook"] for sae in streamed.series["saes"]} == {"blocks.0.hook_resid_post", HOOK}


def test_the_released_codes_probe_has_a_bias_and_its_token_mean_sees_itself(finished):
    """Its script of baselines puts a column of ones beside x, and scores the token mean on the tokens it is made of."""
    result = finished("baselines", "--layers", "1", "--parity", "released-code").result
    tensors = Finished.of(settings_of(result), HOOK)
    y, norm = tensors.error("topk-24").square().sum(1), tensors.x.norm(dim=1, keepdim=True)
    assert result.numbers["topk-24/error/x_norm"] == pytest.approx(r2(norm, y, tensors.fit), rel=1e-3, abs=1e-4)
    found = result.numbers["topk-24/error/probe"]
    assert found == pytest.approx(r2(tensors.x, y, tensors.fit), rel=1e-3, abs=1e-4)
    assert abs(found - r2(tensors.x, y, tensors.fit, bias=False)) > 1e-4
    ids = tensors.ids.unique(return_inverse=True)[1]
    count = torch.bincount(ids).double()
    mean = torch.zeros_like(count).index_add_(0, ids, y.double()) / count
    expected = 1 - (y - mean[ids]).square().sum() / (y - y.mean()).square().sum()
    assert result.numbers["topk-24/error/token_mean"] == pytest.approx(expected.item(), rel=1e-3)
    assert result.config["max_norm_ratio"] == 0  # no script has a rule for norms


def test_bad_settings_give_one_line(workplace, tmp_path, refused):
    cases = [
        (("--layers", "1", "1"), "--layers: must be different numbers, got [1, 1]"),
        (("--layers", "7"), "has blocks 0 to 2, got block 7"),
        (("--sae", str(tmp_path)), "--sae: must be"),
        (("--interval-groups", "0"), "--interval-groups: must be at least 1, got 0"),
    ]
    for more, message in cases:
        arguments = flags(workplace, "--out", str(tmp_path / "out"), experiment="baselines")
        refused([*arguments, *more], message)
    assert not list(tmp_path.glob("out/*"))


def test_the_losses_of_the_measurement_are_cross_entropies():
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(next_token_loss(logits, tokens)[:, :-1].flatten(), expected)


@pytest.mark.runs
def test_stored_activations_have_no_loss_and_every_other_baseline(workplace, tmp_path):
    """Of a cache there is no model to give a loss: that predictor is left out, nothing fails after the measurement."""
    assert cli.main(flags(workplace, "--widths", "24", "--out", str(tmp_path / "first"))) == 0
    stored = load_result(tmp_path / "first" / "decomposition.json")
    caches = [meta.parent for meta in (workplace / "cache" / "activations").glob("*/meta.json")]
    folder = next(path for path in caches if json.loads((path / "meta.json").read_text())["hook"] == HOOK)
    out, sae = tmp_path / "baselines", stored.series["saes"][0]["folder"]
    run = ["run", "baselines", "--preset", "one-pass", "--cache", str(folder), "--sae", sae, "--hook", HOOK]
    assert cli.main([*run, "--out", str(out)]) == 0
    predictors = load_result(out / "baselines.json").series["predictors"]
    assert "loss" not in predictors
    assert {"probe", "token_mean", "x_norm", "l0", "random_mean"} <= set(predictors)
