"""`small-maps`: planted errors that are quadratic, of a network, shared between seeds, or noise; and the command."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext.experiments.small_maps import (
    MAPS,
    Sides,
    SmallMapsSettings,
    Tokens,
    map_numbers,
    quadratic_features,
    r2,
    random_features,
    whitening,
)

N, D = 9000, 6


def _sides(e_of, seed=0):
    """Gaussian x with an error that is a function of it, 60 documents."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    e = e_of(x)
    e = e / e.square().mean().sqrt()
    documents = torch.arange(N) // 150
    parts = [slice(0, 5000), slice(5000, 6000), slice(6000, N)]
    return Sides(*(Tokens(x[part], e[part], documents[part]) for part in parts))


SETTINGS = SmallMapsSettings(rank=D, features=128, epochs=15)


def _noise(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


def test_an_error_that_is_quadratic_is_found_quadratic():
    """e = x_i x_(i+1) and half as much noise: R2 is 1 / 1.25."""

    def products(x):
        return x * x.roll(1, 1)

    numbers = map_numbers(_sides(lambda x: products(x) + 0.5 * _noise(x)), None, SETTINGS)
    assert numbers["r2/quadratic"] == pytest.approx(0.8, abs=0.02)
    assert abs(numbers["r2/linear"]) < 0.01
    assert numbers["r2/random_features"] > 0.3
    assert numbers["r2/network"] > 0.5
    assert numbers["r2/quadratic/low"] < 0.8 < numbers["r2/quadratic/high"] + 0.02
    assert abs(numbers["r2/shuffled"]) < 0.03


def test_an_error_that_no_map_of_x_knows_is_not_predicted_but_seeds_can_share_it():
    """Noise: every map at 0 on held-out tokens. Another seed's error that is the same up to a rotation and noise: 1 / 1.25."""
    sides = _sides(_noise)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    more = torch.Generator().manual_seed(2)

    def beside(own):
        theirs = own.e @ rotation + 0.5 * torch.randn(own.e.shape, generator=more)
        return own._replace(x=torch.cat([own.x, theirs], dim=1))

    numbers = map_numbers(sides, Sides(*map(beside, sides)), SETTINGS)
    for name in ("linear", "quadratic", "random_features", "network", "shuffled"):
        assert abs(numbers[f"r2/{name}"]) < 0.02, name
    assert numbers["r2/another_seed"] == pytest.approx(0.8, abs=0.02)


def test_features_are_what_they_say():
    x = torch.tensor([[2.0, 3, 5]])
    assert quadratic_features(2)(x).tolist() == [[2, 3, 5, 4, 6, 9]]
    found = random_features(3, 4, seed=0)(x)
    assert found[:, :3].equal(x)
    assert (found[:, 3:] >= 0).all()
    many = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 4, 5, 1e-9]) + 7
    mean, components = whitening(many)
    white = (many.double() - mean) @ components
    torch.testing.assert_close(white.std(0)[:5], torch.ones(5).double(), rtol=1e-2, atol=0)
    assert white.std(0)[5] < 0.1  # a direction without variance is not blown up
    assert abs(torch.corrcoef(torch.stack([white[:, 0], many[:, 4].double()]))[0, 1]) > 0.99  # the largest first


def test_r2_is_of_energies_about_the_mean():
    e = torch.tensor([[1.0, 10], [3, 30], [5, 20]])
    tokens = Tokens(e, e, torch.tensor([0, 1, 2]))
    predicted = torch.tensor([[1.0, 20], [3, 20], [5, 20]])
    assert r2(predicted, tokens, seed=0).value == pytest.approx(1 - 200 / (8 + 200))


def test_a_run_has_every_map(finished):
    out, result, said = finished("small-maps")
    assert [sae["name"] for sae in result.series["saes"]] == ["topk-24"]
    for name in MAPS:
        low, value, high = (result.numbers[f"topk-24/r2/{name}{end}"] for end in ("/low", "", "/high"))
        assert low <= value <= high <= 1
    assert abs(result.numbers["topk-24/r2/linear"]) < 0.1
    assert "the best small map of x" in said
    assert {path.name for path in out.iterdir()} >= {"small-maps.json", "small-maps_bars.png", "report.html"}


def test_bad_settings_give_one_line(workplace, tmp_path, refused):
    for more, message in (
        (("--rank", "0"), "--rank: must be at least 1, got 0"),
        (("--epochs", "0"), "--epochs: must be at least 1, got 0"),
    ):
        refused(flags(workplace, "--out", str(tmp_path), *more, experiment="small-maps"), message)
