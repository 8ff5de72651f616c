"""Planted errors that are ordinary, harmful or harmless, and the command on a small model at two layers."""

import pytest
import torch
from cases.models import flags, small_model
from cases.planted import null_models

from darkmatter_ext import cli
from darkmatter_ext.activations.splicing import SplicedModel, SplicedTokens, splice_losses
from darkmatter_ext.experiments.pathology import gap_tables, patches, ratio_numbers
from darkmatter_ext.report.result import load_result
from darkmatter_ext.saes.encoders import Encoded

CONTEXTS, LENGTH = 80, 24


@pytest.fixture(scope="module")
def model():
    network = small_model("llama").eval()
    with torch.no_grad():
        network.lm_head.weight *= 20  # a random model is sure of nothing; this one's losses are of a trained one's size
    return SplicedModel(network, 1)


def _measured(model, error_of, covariance=None):
    """An "SAE" with a planted error in the place of a real one, through the experiment's own functions."""
    tokens = torch.randint(32, (CONTEXTS, LENGTH), generator=torch.Generator().manual_seed(3))
    own = model.activation(tokens)

    def encode(x):
        return Encoded(x - error_of(x), torch.zeros(len(x)), acts=None)

    everywhere = torch.ones(CONTEXTS, LENGTH, dtype=torch.bool)
    splices = patches(encode, null_models(covariance), seed=5)
    losses = splice_losses(model, tokens, own, everywhere, splices)
    context = torch.arange(CONTEXTS).repeat_interleave(LENGTH - 1)
    position = torch.arange(LENGTH - 1).repeat(CONTEXTS)
    token, following = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    return SplicedTokens(context, position, token, following, losses)


def _of_norm(x, direction):
    return 0.3 * x.norm(dim=1, keepdim=True) * direction / direction.norm(dim=-1, keepdim=True)


def _sensitive_direction(model, which):
    """What the unembedding sees most (0) or least (-1): the residual stream carries it there."""
    weight = model.network.lm_head.weight.detach() * model.network.model.norm.weight.detach()
    return torch.linalg.svd(weight - weight.mean(0)).Vh[which]


def _fixed_direction(model, which):
    direction = _sensitive_direction(model, which)
    generator = torch.Generator().manual_seed(11)

    def error(x):
        sign = torch.randint(2, (len(x), 1), generator=generator) * 2.0 - 1
        return _of_norm(x, sign * direction)

    return error


def test_a_random_error_is_no_pathology(model):
    """Planted truth 1: the "SAE" errs in a random direction, so every null at its distance is as bad as it."""
    generator = torch.Generator().manual_seed(12)
    tokens = _measured(model, lambda x: _of_norm(x, torch.randn(x.shape, generator=generator)))
    numbers = ratio_numbers(tokens, tokens.context, seed=0)
    for null in ("random", "error_covariance", "shuffled"):
        low, high = (numbers[f"{null}/kl_ratio/{end}"] for end in ("low", "high"))
        assert low < 1 < high, (null, low, high)
        assert high - low < 0.3  # an interval that could have left 1 out
    assert numbers["sae/kl"] > 0.01


def test_a_harmful_direction_is_found_and_its_own_covariance_excuses_it(model):
    direction = _sensitive_direction(model, 0)
    tokens = _measured(model, _fixed_direction(model, 0), covariance=torch.outer(direction, direction))
    numbers = ratio_numbers(tokens, tokens.context, seed=0)
    assert numbers["random/kl_ratio/low"] > 1.3
    assert numbers["same_angle/kl_ratio/low"] > 1.3
    assert numbers["error_covariance/kl_ratio"] == pytest.approx(1, abs=0.1)  # drawn from the same line
    assert numbers["shuffled/kl_ratio"] == pytest.approx(1, abs=0.1)


def test_a_harmless_direction_is_below_1(model):
    tokens = _measured(model, _fixed_direction(model, -1))
    assert ratio_numbers(tokens, tokens.context, seed=0)["random/kl_ratio/high"] < 0.9


def test_shrinkage_alone_is_seen_as_shrinkage(model):
    tokens = _measured(model, lambda x: 0.2 * x)
    numbers = ratio_numbers(tokens, tokens.context, seed=0)
    assert numbers["norm_only/kl_ratio"] == pytest.approx(1, abs=1e-3)  # Sae(x) = 0.8 x is x with another norm


def test_gaps_are_counted_where_they_were_planted(model):
    """A gap on one token and one position only: the tables show it there and nowhere else, with the right counts."""
    tokens = _measured(model, lambda x: 0.1 * x)
    kl = tokens.losses.kl
    kl["random"] = torch.zeros_like(kl["random"])
    kl["sae"] = 2.0 * (tokens.token == 7) + 1.0 * (tokens.position == 16)
    text = torch.cat([torch.full((3000,), 7), tokens.token])
    tables = gap_tables(tokens, tokens.context, text, str, seed=0)
    seven = next(row for row in tables["token"] if row["label"] == "7")
    assert tables["token"][0] == seven
    assert seven["count"] == int((tokens.token == 7).sum())
    assert seven["in_text"] == 3000 + seven["count"]
    expected = kl["sae"][tokens.token == 7].mean().item()
    assert seven["value"] == pytest.approx(expected, rel=1e-6)
    assert seven["low"] <= expected <= seven["high"]
    by_position = {row["label"]: row for row in tables["position"]}
    assert [row["count"] for row in tables["position"]] == [CONTEXTS * n for n in (2, 2, 4, 8, 7)]
    assert by_position["16 to 31"]["value"] > 1 / 7
    assert by_position["8 to 15"]["value"] < 0.15
    assert tables["frequency"][-1] == {**tables["frequency"][-1], "label": "1024 to 4095", "count": seven["count"]}


def test_a_run_at_two_layers(finished):
    out, result, _ = finished("pathology")
    assert [sae["layer"] for sae in result.series["saes"]] == [0, 1]
    for sae in result.series["saes"]:
        assert result.numbers[f"{sae['name']}/random/kl_ratio/low"] > 0
        assert len(result.arrays[f"{sae['name']}/sae.kl"]) == 6 * 23
        assert sum(row["count"] for row in result.series["gaps"][sae["name"]]["position"]) == 6 * 23
    assert {path.suffix for path in out.iterdir()} == {".json", ".npz", ".png", ".html"}


def test_given_saes_are_spliced_at_the_site_each_names(finished, workplace, tmp_path):
    folders = [sae["folder"] for sae in finished("pathology").result.series["saes"]]
    again = flags(
        workplace, "--sae", *folders, "--contexts", "4", "--out", str(tmp_path), experiment="pathology", hook=""
    )
    assert cli.main(again) == 0
    assert [sae["layer"] for sae in load_result(tmp_path / "pathology.json").series["saes"]] == [0, 1]


def test_dry_run_names_sites_and_nulls(workplace, capsys):
    assert cli.main([*flags(workplace, experiment="pathology"), "--layers", "0", "2", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "blocks.2.hook_resid_post" in plan
    assert "mixture of real activations" in plan
