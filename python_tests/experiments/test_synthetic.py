"""The synthetic experiment's estimator on data whose linear and nonlinear error have closed forms."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext.experiments.synthetic import ablate_weakest, attribution, measure_cells, planted_energies
from darkmatter_ext.ops.acts import SparseActs

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0)
N, D = 60_000, 8


@pytest.fixture(scope="module")
def gaussian():
    """x' of unit variance; ablations that take nothing, a linear part, and a part no linear map knows."""
    clean = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    even = clean.square() - 1  # uncorrelated with x, variance 2
    ablated = [torch.zeros_like(clean), 0.5 * clean, even]
    fit, score = slice(0, 40_000), slice(40_000, None)
    cells = measure_cells(clean, ablated, fit, score, LEVELS, 1.0, seed=1)
    return cells, planted_energies(ablated, score, LEVELS, 1.0)


def test_planted_levels_are_standard_deviations_and_come_back(gaussian):
    """x = x' + a n1: a n1 is predicted from x to a^2 / (1 + a^2) of itself; b n2 not at all."""
    cells, planted = gaussian
    for i, a in enumerate(LEVELS):
        for j, b in enumerate(LEVELS):
            linear, nonlinear = cells[i, j, 0].tolist()
            assert linear == pytest.approx(a**4 / (1 + a**2), rel=0.02, abs=0.01)
            assert nonlinear == pytest.approx(a**2 / (1 + a**2) + b**2, rel=0.02, abs=0.01)
            assert planted[i, j, 0].tolist() == pytest.approx([a**2, b**2, 0])


def test_ablations_go_where_they_belong(gaussian):
    cells, planted = gaussian
    assert planted[0, 0, 1:, 2].tolist() == pytest.approx([0.25, 2], rel=0.03)
    assert cells[0, 0, 1].tolist() == pytest.approx([0.25, 0], abs=0.01)  # linear in x'
    assert cells[0, 0, 2].tolist() == pytest.approx([0, 2], rel=0.03, abs=0.01)  # even in x'
    a = 2.0  # with noise on the activation the linear ablation is known less well: cov / var = 0.5 / (1 + a^2)
    slope = (0.5 + a**2) / (1 + a**2)  # of error = 0.5 x' + a n1 on x = x' + a n1
    total = 0.25 + a**2
    linear = slope**2 * (1 + a**2)
    assert cells[2, 0, 1].tolist() == pytest.approx([linear, total - linear], rel=0.03)


def test_the_attribution_names_the_planted_noise(gaussian):
    cells, planted = gaussian
    found = attribution(planted[:, :, :1], cells[:, :, :1])
    assert found["reconstruction_noise/share_as/nonlinear"] == pytest.approx(1, abs=0.01)
    assert found["reconstruction_noise/share_as/linear"] == pytest.approx(0, abs=0.01)
    assert found["activation_noise/correlation/linear"] > 0.99
    assert found["reconstruction_noise/correlation/nonlinear"] > 0.99
    assert abs(found["reconstruction_noise/correlation/linear"]) < 0.01
    assert found["ablation/share_as/linear"] != found["ablation/share_as/linear"]  # nothing ablated: not a number


def test_in_sample_fitting_flatters(gaussian):
    """What the released code does: on few tokens the noise of the reconstruction looks linear when scored in-sample."""
    clean = torch.randn(200, 60, generator=torch.Generator().manual_seed(5))
    nothing, every = [torch.zeros_like(clean)], slice(None)
    inside = measure_cells(clean, nothing, every, every, (0.0, 1.0), 1.0, seed=1)[0, 1, 0]
    outside = measure_cells(clean, nothing, slice(0, 100), slice(100, None), (0.0, 1.0), 1.0, seed=1)[0, 1, 0]
    assert inside[1] < 0.8
    assert outside[1] > 1


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_the_weakest_latents_are_ablated(form):
    dense = torch.tensor([[5.0, 1, 0, 2, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6])
    if form == "fixed":
        top = dense.topk(5)
        acts = SparseActs.fixed(top.values, top.indices, 6)
    else:
        acts = SparseActs.from_dense(dense)
    ones = torch.ones(6)
    expected = torch.tensor([[5.0, 0, 0, 0, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6])
    assert torch.equal(ablate_weakest(acts, 0.4, ones).to_dense(), expected)  # 2 of 5; 0 of 2
    half = ablate_weakest(acts, 0.5, ones).to_dense()
    assert half[1].tolist() == [0, 0, 7, 0, 0, 0]
    heavy = torch.tensor([1.0, 100, 1, 1, 1, 1])
    assert ablate_weakest(acts, 0.4, heavy).to_dense()[0].tolist() == [5, 1, 0, 0, 4, 0]  # weighed by the decoder
    assert torch.equal(ablate_weakest(acts, 0.0, ones).to_dense(), dense)


@pytest.mark.parametrize("more", [(), ("--parity", "released-code")], ids=["paper", "released-code"])
def test_a_run_writes_grid_and_intervals(finished, more):
    out, result, _ = finished("synthetic", *more)
    grid = torch.tensor(result.series["grids"]["topk-24"]["estimated"])
    assert grid.shape == (5, 5, 6, 2)
    assert (grid >= 0).all()
    name = "topk-24/reconstruction_noise/share_as/nonlinear"
    assert result.numbers[f"{name}/low"] <= result.numbers[name] <= result.numbers[f"{name}/high"]
    assert result.numbers[name] == pytest.approx(1, abs=0.1)
    assert (result.numbers["topk-24/unit"] == 1) == bool(more)
    assert {path.name for path in out.glob("*.png")} == {"synthetic_noise.png", "synthetic_ablation.png"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parity", "code"), "--parity: must be paper or released-code, got 'code'"),
        (("--levels", "1"), "--levels: must be at least 2 numbers of at least 0, got [1.0]"),
        (("--ablations", "1.0"), "--ablations: must be shares of at least 0 and below 1, got [1.0]"),
        (("--noise-seeds", "0"), "--noise-seeds: must be at least 1, got 0"),
        (("--unit", "-1"), "--unit: must be at least 0, got -1.0"),
    ],
)
def test_bad_settings_give_one_line(workplace, more, message, refused, tmp_path):
    refused(flags(workplace, *more, "--out", str(tmp_path), experiment="synthetic"), message)
