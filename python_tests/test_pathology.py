"""Null models by their definition, and the pathology experiment on planted errors: ordinary, harmful, harmless."""

import pytest
import torch
from test_activations import _small_model

from darkmatter_ext.activations.splicing import SplicedModel, SplicedTokens, splice_losses
from darkmatter_ext.experiments.pathology import gap_tables, patches, ratio_numbers
from darkmatter_ext.measurement.nulls import NULLS, NullModels, at_distance_of, norm_only, same_angle
from darkmatter_ext.saes.encoders import Encoded

CONTEXTS, LENGTH = 80, 24


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _models(covariance=None, seed=1):
    return NullModels.from_covariance(torch.eye(16) if covariance is None else covariance, _normal(64, 16, seed=seed))


def test_nulls_keep_what_they_say_they_keep():
    x = 3 * _normal(500, 16) + 1
    x_hat = 0.8 * x + 0.5 * _normal(500, 16, seed=1)
    distance = (x_hat - x).norm(dim=1)
    functions = _models().functions(seed=0)
    assert list(functions) == list(NULLS)
    points = {name: function(x, x_hat) for name, function in functions.items()}
    for name, point in points.items():
        if name != "norm_only":
            torch.testing.assert_close((point - x).norm(dim=1), distance, rtol=1e-4, atol=1e-4)
            assert ((point - x_hat).norm(dim=1) > 1e-3).all(), name
    for name in ("same_angle", "norm_only"):
        torch.testing.assert_close(points[name].norm(dim=1), x_hat.norm(dim=1), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(points["same_angle"], x), cosine(x_hat, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cosine(points["norm_only"], x), torch.ones(500))


def test_random_directions_have_no_preferred_one_and_covariance_directions_do():
    x, x_hat = torch.zeros(20_000, 16), torch.zeros(20_000, 16)
    x_hat[:, 0] = 1
    spread = torch.diag(torch.arange(1.0, 17).square())
    functions = _models(spread).functions(seed=0)
    moments = functions["random"](x, x_hat).square().mean(0)
    torch.testing.assert_close(moments, torch.full((16,), 1 / 16), rtol=0.1, atol=0)
    drawn = _normal(20_000, 16, seed=9) * torch.arange(1.0, 17)
    expected = (drawn / drawn.norm(dim=1, keepdim=True)).square().mean(0)  # the same law, drawn another way
    torch.testing.assert_close(functions["error_covariance"](x, x_hat).square().mean(0), expected, rtol=0.1, atol=1e-3)


def test_mixtures_stay_where_activations_vary():
    plane = torch.linalg.qr(_normal(16, 2)).Q
    activations = 5 + _normal(64, 2, seed=3) @ plane.mT
    x, x_hat = _normal(50, 16), _normal(50, 16, seed=2)
    moved = NullModels.from_covariance(torch.eye(16), activations).functions(seed=0)["mixture"](x, x_hat) - x
    torch.testing.assert_close(moved @ plane @ plane.mT, moved, rtol=1e-4, atol=1e-4)


def test_a_direction_along_x_and_equal_points_are_finite():
    x = _normal(5, 16)
    assert same_angle(x, 0.5 * x, _normal(5, 16, seed=4)).isfinite().all()
    torch.testing.assert_close(at_distance_of(x, x, _normal(5, 16, seed=4)), x)
    assert norm_only(torch.zeros(2, 16), torch.ones(2, 16)).isfinite().all()
    with pytest.raises(ValueError, match="activations: must be at least 2 for a mixture, got 1"):
        NullModels.from_covariance(torch.eye(16), _normal(1, 16))


@pytest.fixture(scope="module")
def model():
    network = _small_model("llama").eval()
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
    splices = patches(encode, _models(covariance), seed=5)
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
    numbers = ratio_numbers(tokens, seed=0)
    for null in ("random", "error_covariance", "shuffled"):
        low, high = (numbers[f"{null}/kl_ratio/{end}"] for end in ("low", "high"))
        assert low < 1 < high, (null, low, high)
        assert high - low < 0.3  # an interval that could have left 1 out
    assert numbers["sae/kl"] > 0.01


def test_a_harmful_direction_is_found_and_its_own_covariance_excuses_it(model):
    direction = _sensitive_direction(model, 0)
    numbers = ratio_numbers(
        _measured(model, _fixed_direction(model, 0), covariance=torch.outer(direction, direction)), seed=0
    )
    assert numbers["random/kl_ratio/low"] > 1.3
    assert numbers["same_angle/kl_ratio/low"] > 1.3
    assert numbers["error_covariance/kl_ratio"] == pytest.approx(1, abs=0.1)  # drawn from the same line
    assert numbers["shuffled/kl_ratio"] == pytest.approx(1, abs=0.1)


def test_a_harmless_direction_is_below_1(model):
    assert ratio_numbers(_measured(model, _fixed_direction(model, -1)), seed=0)["random/kl_ratio/high"] < 0.9


def test_shrinkage_alone_is_seen_as_shrinkage(model):
    numbers = ratio_numbers(_measured(model, lambda x: 0.2 * x), seed=0)
    assert numbers["norm_only/kl_ratio"] == pytest.approx(1, abs=1e-3)  # Sae(x) = 0.8 x is x with another norm


def test_gaps_are_counted_where_they_were_planted(model):
    """A gap on one token and one position only: the tables show it there and nowhere else, with the right counts."""
    tokens = _measured(model, lambda x: 0.1 * x)
    kl = tokens.losses.kl
    kl["random"] = torch.zeros_like(kl["random"])
    kl["sae"] = 2.0 * (tokens.token == 7) + 1.0 * (tokens.position == 16)
    text = torch.cat([torch.full((3000,), 7), tokens.token])
    tables = gap_tables(tokens, text, str, seed=0)
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
