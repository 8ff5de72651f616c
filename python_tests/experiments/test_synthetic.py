"""The synthetic experiment's estimator on data whose linear and nonlinear error have closed forms."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext.experiments.synthetic import (
    Planted,
    SyntheticSettings,
    _Products,
    ablate_latents,
    ablate_tokens,
    measure_cells,
    numbers_of,
    plant,
    planted_energies,
    unpacked,
    weakest_first,
)
from darkmatter_ext.ops.acts import SparseActs

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0)
N, D = 60_000, 8


def _planted(clean, ablated, fit, score, introduced=None, released=False):
    nothing = torch.zeros_like(clean) if introduced is None else introduced
    return Planted(clean, nothing, ablated, fit, score, torch.arange(len(clean)) // 500, 1.0, released)


def _read(planted, levels=LEVELS):
    """Estimates [A, R, Q, 2] and the numbers by name."""
    sums = measure_cells(planted, levels, seed=1).sum(0)
    names, statistic = numbers_of(levels)
    return unpacked(sums, len(levels)).cells[:, :, :2].mT, dict(zip(names, statistic(sums).tolist(), strict=True))


@pytest.fixture(scope="module")
def gaussian():
    """x' of unit variance; ablations that take nothing, a linear part, and a part no linear map knows."""
    clean = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    even = clean.square() - 1  # uncorrelated with x, variance 2
    planted = _planted(clean, [torch.zeros_like(clean), 0.5 * clean, even], slice(0, 40_000), slice(40_000, None))
    return *_read(planted), planted_energies(planted, LEVELS)


def test_planted_levels_are_standard_deviations_and_come_back(gaussian):
    """x = x' + a n1: a n1 is predicted from x to a^2 / (1 + a^2) of itself; b n2 not at all."""
    cells, _, planted = gaussian
    for i, a in enumerate(LEVELS):
        for j, b in enumerate(LEVELS):
            linear, nonlinear = cells[i, j, 0].tolist()
            assert linear == pytest.approx(a**4 / (1 + a**2), rel=0.02, abs=0.01)
            assert nonlinear == pytest.approx(a**2 / (1 + a**2) + b**2, rel=0.02, abs=0.01)
            assert planted[i, j, 0].tolist() == pytest.approx([a**2, b**2, 0])


def test_ablations_go_where_they_belong(gaussian):
    cells, numbers, planted = gaussian
    assert planted[0, 0, 1:, 2].tolist() == pytest.approx([0.25, 2], rel=0.03)
    assert cells[0, 0, 1].tolist() == pytest.approx([0.25, 0], abs=0.01)  # linear in x'
    assert cells[0, 0, 2].tolist() == pytest.approx([0, 2], rel=0.03, abs=0.01)  # even in x'
    assert numbers["ablation/share_as/nonlinear"] == pytest.approx(1, abs=0.01)
    a = 2.0  # with noise on the activation the linear ablation is known less well: cov / var = 0.5 / (1 + a^2)
    slope = (0.5 + a**2) / (1 + a**2)  # of error = 0.5 x' + a n1 on x = x' + a n1
    total = 0.25 + a**2
    linear = slope**2 * (1 + a**2)
    assert cells[2, 0, 1].tolist() == pytest.approx([linear, total - linear], rel=0.03)


def test_the_encoders_own_error_is_in_every_cell_and_in_no_share():
    """introduced = x'^2 - 1, ablated = x' / 2: the cell has both, the ablation alone is all linear."""
    clean = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    planted = _planted(clean, [0.5 * clean], slice(0, 40_000), slice(40_000, None), introduced=clean.square() - 1)
    cells, numbers = _read(planted, (0.0, 1.0))
    assert cells[0, 0, 0].tolist() == pytest.approx([0.25, 2], rel=0.05)
    assert numbers["ablation/share_as/linear"] == pytest.approx(1, abs=0.01)


def test_table_1_is_of_levels_and_differences_of_fvu(gaussian):
    """Against the closed forms: the energies of the first test over the variance of x, 1 + a^2."""
    _, numbers, _ = gaussian
    a, b = torch.meshgrid(torch.tensor(LEVELS), torch.tensor(LEVELS), indexing="ij")
    variance = 1 + a**2
    linear, nonlinear = (a**2 / variance) ** 2, (a**2 / variance + b**2) / variance
    for name, level in (("activation_noise", a), ("reconstruction_noise", b)):
        for estimate, values in (("linear", linear), ("nonlinear", nonlinear)):
            expected = torch.corrcoef(torch.stack([level.flatten(), values.flatten()]))[0, 1].item()
            assert numbers[f"{name}/correlation/{estimate}"] == pytest.approx(expected, abs=0.02)
    assert numbers["reconstruction_noise/share_as/nonlinear"] == pytest.approx(1, abs=0.01)
    assert numbers["reconstruction_noise/share_as/linear"] == pytest.approx(0, abs=0.01)


def test_energies_of_cells_are_those_of_their_errors():
    parts = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(2)).double()  # introduced, 2 ablated, 2 noises
    for a, b in ((0.0, 0.0), (3.0, -2.0), (0.0, 4.0)):
        errors = parts[:, :1] + parts[:, 1:3] + (a * parts[:, 3] + b * parts[:, 4])[:, None]
        assert torch.allclose(_Products.of(parts).energy(a, b), errors.square().sum(-1), rtol=1e-12)


def test_in_sample_fitting_flatters():
    """What the released code does: on few tokens the noise of the reconstruction looks linear when scored in-sample."""
    clean = torch.randn(200, 60, generator=torch.Generator().manual_seed(5))
    nothing, every = [torch.zeros_like(clean)], slice(None)
    inside, _ = _read(_planted(clean, nothing, every, every, released=True), (0.0, 1.0))
    outside, _ = _read(_planted(clean, nothing, slice(0, 100), slice(100, None)), (0.0, 1.0))
    assert inside[0, 1, 0, 1] < 0.8
    assert outside[0, 1, 0, 1] > 1


def _orthogonal_sae(d=64):
    """An SAE that reconstructs every non-negative combination of d orthogonal directions exactly."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    rows = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3))).Q
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=d, k=d, rescale_acts_by_decoder_norm=False)).eval()
    weights = {"W_enc": rows.T, "W_dec": rows, "b_enc": torch.zeros(d), "b_dec": torch.zeros(d)}
    sae.load_state_dict({name: weight.contiguous() for name, weight in weights.items()})
    return sae, rows


@pytest.mark.runs
@pytest.mark.parametrize("ablate", ["latents", "tokens"])
def test_absent_orthogonal_features_are_all_linear_and_thresholded_ones_are_not(ablate):
    """Every feature is linear in x. One that is missing everywhere stays so; one that is missing where it is weak does not."""
    sae, rows = _orthogonal_sae()
    generator = torch.Generator().manual_seed(4)
    z = torch.rand(6000, 64, generator=generator) * (torch.rand(6000, 64, generator=generator) < 0.1)
    settings = SyntheticSettings(ablate=ablate)
    x, documents = z @ rows, torch.arange(6000) // 100
    planted = plant(sae, x, documents, slice(0, 4000), slice(4000, None), settings)
    assert planted.introduced.abs().max() < 1e-5
    _, numbers = _read(planted)
    linear, nonlinear = (numbers[f"ablation/share_as/{kind}"] for kind in ("linear", "nonlinear"))
    if ablate == "latents":
        assert (linear, nonlinear) == pytest.approx((1, 0), abs=1e-5)
    else:
        assert linear < 0.6
        assert nonlinear > 0.4


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_the_weakest_latents_are_the_same_at_every_token(form):
    dense = torch.tensor([[5.0, 1, 0, 2, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6])
    acts = SparseActs.from_dense(dense)
    if form == "fixed":
        top = dense.topk(5)
        acts = SparseActs.fixed(top.values, top.indices, 6)
    ones = torch.ones(6)
    assert weakest_first(acts, ones, slice(None)).tolist() == [1, 3, 4, 0, 2, 5]
    assert weakest_first(acts, ones, slice(0, 1)).tolist() == [2, 1, 3, 5, 4, 0]
    assert weakest_first(acts, torch.tensor([1.0, 100, 1, 1, 1, 1]), slice(None)).tolist()[-1] == 1  # by the decoder
    rest = ablate_latents(acts, 0.4, weakest_first(acts, ones, slice(None))).to_dense()
    assert torch.equal(rest, torch.tensor([[5.0, 0, 0, 0, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6]))  # 2 of 6


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_the_weakest_active_latents_of_each_token_are_ablated(form):
    dense = torch.tensor([[5.0, 1, 0, 2, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6])
    if form == "fixed":
        top = dense.topk(5)
        acts = SparseActs.fixed(top.values, top.indices, 6)
    else:
        acts = SparseActs.from_dense(dense)
    ones = torch.ones(6)
    expected = torch.tensor([[5.0, 0, 0, 0, 4, 3], [0, 0, 7, 0, 0, 6], [0.0] * 6])
    assert torch.equal(ablate_tokens(acts, 0.4, ones).to_dense(), expected)  # 2 of 5; 0 of 2
    half = ablate_tokens(acts, 0.5, ones).to_dense()
    assert half[1].tolist() == [0, 0, 7, 0, 0, 0]
    heavy = torch.tensor([1.0, 100, 1, 1, 1, 1])
    assert ablate_tokens(acts, 0.4, heavy).to_dense()[0].tolist() == [5, 1, 0, 0, 4, 0]  # weighed by the decoder
    assert torch.equal(ablate_tokens(acts, 0.0, ones).to_dense(), dense)


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


@pytest.mark.runs
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parity", "code"), "--parity: must be paper or released-code, got 'code'"),
        (("--levels", "1"), "--levels: must be at least 2 numbers of at least 0, got [1.0]"),
        (("--ablations", "1.0"), "--ablations: must be shares of at least 0 and below 1, got [1.0]"),
        (("--ablate", "rows"), "--ablate: must be latents or tokens, got 'rows'"),
        (("--noise-seeds", "0"), "--noise-seeds: must be at least 1, got 0"),
        (("--unit", "-1"), "--unit: must be at least 0, got -1.0"),
    ],
)
def test_bad_settings_give_one_line(workplace, more, message, refused, tmp_path):
    refused(flags(workplace, *more, "--out", str(tmp_path), experiment="synthetic"), message)
