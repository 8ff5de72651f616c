"""Null models by their definition."""

import pytest
import torch
from cases.planted import normal, null_models

from darkmatter_ext.measurement.nulls import NULLS, NullModels, at_distance_of, norm_only, same_angle


def test_nulls_keep_what_they_say_they_keep():
    x = 3 * normal(500, 16) + 1
    x_hat = 0.8 * x + 0.5 * normal(500, 16, seed=1)
    distance = (x_hat - x).norm(dim=1)
    functions = null_models().functions(seed=0)
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
    functions = null_models(spread).functions(seed=0)
    moments = functions["random"](x, x_hat).square().mean(0)
    torch.testing.assert_close(moments, torch.full((16,), 1 / 16), rtol=0.1, atol=0)
    drawn = normal(20_000, 16, seed=9) * torch.arange(1.0, 17)
    expected = (drawn / drawn.norm(dim=1, keepdim=True)).square().mean(0)  # the same law, drawn another way
    torch.testing.assert_close(functions["error_covariance"](x, x_hat).square().mean(0), expected, rtol=0.1, atol=1e-3)


def test_mixtures_stay_where_activations_vary():
    plane = torch.linalg.qr(normal(16, 2)).Q
    activations = 5 + normal(64, 2, seed=3) @ plane.mT
    x, x_hat = normal(50, 16), normal(50, 16, seed=2)
    moved = NullModels.from_covariance(torch.eye(16), activations).functions(seed=0)["mixture"](x, x_hat) - x
    torch.testing.assert_close(moved @ plane @ plane.mT, moved, rtol=1e-4, atol=1e-4)


def test_a_direction_along_x_and_equal_points_are_finite():
    x = normal(5, 16)
    assert same_angle(x, 0.5 * x, normal(5, 16, seed=4)).isfinite().all()
    torch.testing.assert_close(at_distance_of(x, x, normal(5, 16, seed=4)), x)
    assert norm_only(torch.zeros(2, 16), torch.ones(2, 16)).isfinite().all()
    with pytest.raises(ValueError, match="activations: must be at least 2 for a mixture, got 1"):
        NullModels.from_covariance(torch.eye(16), normal(1, 16))
