"""W_dec . a* against mean active values: planted proportion, ranks against scipy, the command against plain least squares."""

import math

import numpy as np
import pytest
import torch
from cases.measured import measure
from cases.models import flags, settings_of, small_sae
from cases.planted import PlantedSource, coin, family_tokens, plain_map, plain_parts, planted_sae
from scipy import stats

from darkmatter_ext.experiments.latent_alignment import (
    NORMS_FROM_X,
    RECONSTRUCTION,
    alignment,
    correlations,
    decoder_rows,
    directions,
    identity_numbers,
    reconstruction_map,
    weighted_ranks,
)
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.saes.encoders import Encoded

HOOK = "blocks.1.hook_resid_post"
N, F, SILENT = 40_000, 100, 5


@pytest.mark.runs
def test_the_planted_proportion_of_alignment_and_value_comes_back(tmp_path):
    """x = z W with orthonormal rows W and sparse z of mean active value m_i; ||e||^2 = 1 + sum_i m_i z_i: a* = sum_i m_i w_i,
    so W . a* is m. Five more latents, whose rows are copies, never fire."""
    generator = torch.Generator().manual_seed(0)
    size = torch.linspace(1, 5, F)
    active = torch.rand(N, F, generator=generator) < 0.1
    z = active * size * (0.5 + torch.rand(N, F, generator=generator))
    rows = torch.linalg.qr(torch.randn(F, F, generator=generator)).Q
    signs = coin(torch.randn(F, F, generator=generator))

    def codes(x):
        own = (x @ rows.T).clamp(min=0)
        return torch.cat([own * (own > 0.1), torch.zeros(len(x), SILENT)], dim=1)  # without the rounding of x W^T

    def x_hat(x):
        squared = 1 + (codes(x)[:, :F] * size).sum(1)
        return x - squared.sqrt()[:, None] * coin(x @ signs) / F**0.5

    sae = planted_sae("s", HOOK, x_hat, codes, F + SILENT)
    settings = Measure(drop_positions=0, split="contexts", max_norm_ratio=0)
    site = measure(PlantedSource({HOOK: z @ rows}), [sae], settings, folder=tmp_path)[HOOK]
    latents = site.latents["s"]
    w_dec = torch.cat([rows, rows[:SILENT]])
    own = alignment(
        w_dec, {"error": site.norm_map("s", "error").weight}, latents.mean_active_value, latents.fired, seed=0
    )
    numbers = own.numbers(seed=0)
    torch.testing.assert_close(own.values["error"]["decoder"][:F], size.double(), rtol=0.03, atol=0.05)
    torch.testing.assert_close(own.mean_active_value[:F], size.double(), rtol=0.03, atol=0.05)
    for name in ("pearson", "spearman"):
        assert numbers[f"error/decoder/{name}"] > 0.99
        assert numbers[f"error/decoder/{name}/low"] > 0.98
        for control in ("permuted", "random"):
            assert abs(numbers[f"error/{control}/{name}"]) < 3 / math.sqrt(F)
            low, high = (numbers[f"error/{control}/{name}/{end}"] for end in ("low", "high"))
            assert max(low, -high) < 0.2
    assert (numbers["latents"], numbers["latents_never_fired"]) == (F + SILENT, SILENT)


def _independent_latents(generator, n=20_000):
    """x = sum_i z_i w_i, z_i = c_i or 0 independently, w_i orthonormal: figure 14's theory holds exactly."""
    size = torch.linspace(1, 5, F)
    z = size * (torch.rand(n, F, generator=generator) < 0.1)
    rows = torch.linalg.qr(torch.randn(F, F, generator=generator)).Q
    return size, z, rows


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_figure_14_is_found_where_it_is_planted(offset):
    """a* . w_i = c_i from Sae(x) - b_dec, whatever b_dec and the error are."""
    size, z, rows = _independent_latents(torch.Generator().manual_seed(0))
    bias = torch.full((F,), offset)

    def encode(x):
        own = ((x - bias) @ rows.T).round(decimals=3).clamp(min=0)
        return Encoded(own @ rows + bias, (own != 0).sum(1), SparseActs.from_dense(own))

    a_star = reconstruction_map((z @ rows + bias).split(3000), encode, rows)
    found = (rows.double() @ a_star.weight).flatten()
    torch.testing.assert_close(found, size.double(), rtol=1e-3, atol=1e-3)
    assert a_star.bias.tolist() == [0]
    numbers = identity_numbers(found, size, seed=0)
    assert numbers["slope"] == pytest.approx(1, abs=1e-3)
    assert numbers["identity_r2"] == pytest.approx(1, abs=1e-3)


@pytest.mark.runs
def test_a_relation_of_the_error_is_not_taken_for_figure_14(tmp_path):
    """Latents of one value, so figure 14 has nothing to show; the error's norm grows with some latents more than others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.linspace(1, 5, F)
    z = 3.0 * (torch.rand(N, F, generator=generator) < 0.1)
    rows = torch.linalg.qr(torch.randn(F, F, generator=generator)).Q
    signs = coin(torch.randn(F, F, generator=generator))

    def codes(x):
        own = (x @ rows.T).clamp(min=0)
        return own * (own > 0.1)

    def x_hat(x):
        squared = 1 + (codes(x) * weight).sum(1)
        return x - squared.sqrt()[:, None] * coin(x @ signs) / F**0.5

    sae = planted_sae("s", HOOK, x_hat, codes, F)
    settings = Measure(drop_positions=0, split="contexts", max_norm_ratio=0)
    x = z @ rows
    site = measure(PlantedSource({HOOK: x}), [sae], settings, folder=tmp_path)[HOOK]
    encode = sae.load()
    maps = {
        "error": site.norm_map("s", "error").weight,
        RECONSTRUCTION: reconstruction_map(x.split(4000), lambda part: encode({HOOK: part}), rows).weight,
    }
    own = alignment(rows, maps, site.latents["s"].mean_active_value, site.latents["s"].fired, seed=0)
    assert stats.pearsonr(own.values["error"]["decoder"], weight).statistic > 0.95  # the planted relation is there
    torch.testing.assert_close(own.values[RECONSTRUCTION]["decoder"], torch.full((F,), 3.0).double(), rtol=0.02, atol=0)


def test_the_identity_line_is_scored_by_its_definition():
    generator = torch.Generator().manual_seed(1)
    a = 1 + torch.rand(400, generator=generator, dtype=torch.float64)
    v = 0.5 * a + 0.05 * torch.randn(400, generator=generator, dtype=torch.float64)
    numbers = identity_numbers(a, v, seed=0)
    assert numbers["slope"] == pytest.approx(0.5, abs=0.01)
    assert numbers["slope/low"] < 0.5 < numbers["slope/high"]
    expected = 1 - ((v - a).square().sum() / (v - v.mean()).square().sum()).item()
    assert numbers["identity_r2"] == pytest.approx(expected)
    assert expected < 0  # a slope of 1/2 is not the identity
    assert math.isnan(identity_numbers(a[:2], v[:2], seed=0)["slope"])


def test_correlations_equal_scipys_and_their_intervals_cover():
    generator = np.random.default_rng(0)
    values, weights = generator.integers(0, 6, 40).astype(float), generator.integers(1, 4, 40)
    repeated = stats.rankdata(np.repeat(values, weights))
    own = weighted_ranks(torch.tensor(values), torch.tensor(weights, dtype=torch.float64)[None])[0]
    assert np.repeat(own.numpy(), weights).tolist() == repeated.tolist()
    inside = {"pearson": 0, "spearman": 0}
    planted = {"pearson": 0.6, "spearman": 6 / math.pi * math.asin(0.3)}  # of a bivariate normal
    for seed in range(60):
        a, noise = generator.standard_normal((2, 150))
        b = 0.6 * a + 0.8 * noise
        found = correlations(torch.tensor(a), torch.tensor(b), seed=seed, resamples=200)
        assert found["pearson"].value == pytest.approx(stats.pearsonr(a, b).statistic)
        assert found["spearman"].value == pytest.approx(stats.spearmanr(a, b).statistic)
        for name, truth in planted.items():
            inside[name] += found[name].low <= truth <= found[name].high
    assert min(inside.values()) >= 50  # 57 expected of 60
    assert math.isnan(correlations(torch.ones(2), torch.ones(2), seed=0)["pearson"].value)


def test_random_directions_have_the_norms_of_the_rows():
    rows = torch.randn(30, 5) * torch.arange(1, 31)[:, None]
    found = directions(rows, seed=1)
    torch.testing.assert_close(found["random"].norm(dim=1), rows.double().norm(dim=1))
    assert sorted(found["permuted"].norm(dim=1).tolist()) == sorted(found["decoder"].norm(dim=1).tolist())
    assert not torch.equal(found["permuted"], found["decoder"])


@pytest.mark.parametrize("more", [(), ("--parity", "released-code")], ids=["paper", "released-code"])
def test_a_run_equals_plain_least_squares(finished, more):
    out, result, _ = finished("latent-alignment", *more)
    x, saes, fit = family_tokens(settings_of(result), [HOOK])
    x, released = x[HOOK], bool(more)
    for name, sae in saes[HOOK].items():
        acts = sae.encode(x.float()).double()
        fired = (acts > 0).sum(0)
        mean = (acts.sum(0) / fired).numpy()
        assert result.arrays[f"{name}/fired"].tolist() == fired.tolist()
        vectors = {"x": x} | plain_parts(x, sae, fit, bias=not released)
        kept = fired.numpy() > 0
        for target in NORMS_FROM_X:
            predict = plain_map(x[fit], vectors[target].square().sum(1, keepdim=True)[fit], bias=not released)
            rows = sae.W_dec.double()
            expected = (predict(rows) - predict(torch.zeros_like(rows))).flatten().numpy()  # a* without the bias
            np.testing.assert_allclose(
                result.arrays[f"{name}/alignment/{target}"], expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max()
            )
            pearson = np.corrcoef(expected[kept], mean[kept])[0, 1]
            assert result.numbers[f"{name}/{target}/decoder/pearson"] == pytest.approx(pearson, abs=5e-3)
        w_dec, every = sae.W_dec.double(), slice(None) if released else fit
        data = acts[every] @ w_dec
        a_star = torch.linalg.lstsq(data, data.square().sum(1, keepdim=True), driver="gelsd").solution
        np.testing.assert_allclose(
            result.arrays[f"{name}/alignment/{RECONSTRUCTION}"],
            (w_dec @ a_star).flatten().numpy(),
            rtol=1e-2,
            atol=1e-2,
        )
        assert result.numbers[f"{name}/latents_never_fired"] == (~kept).sum()
    assert {path.name for path in out.iterdir()} == {
        "latent-alignment.json", "latent-alignment.npz", "latent-alignment_scatter.png",
        "latent-alignment_correlations.png", "report.html",
    }  # fmt: skip


@pytest.mark.runs
def test_bad_input_gives_one_line(workplace, tmp_path, refused):
    narrow = small_sae("topk", 12, 24, 0)
    narrow.save_model(tmp_path / "narrow")
    for more, message in (
        (("--sae", str(tmp_path / "narrow")), "--sae: must have d_in 16 as blocks.1.hook_resid_post, got 12"),
        (("--sae", str(tmp_path)), "--sae: must be a folder with cfg.json"),
        (("--widths", "2"), "--widths: must be at least k (4), got 2"),
    ):
        refused(flags(workplace, *more, "--out", str(tmp_path), experiment="latent-alignment"), message)
    with pytest.raises(
        ValueError, match=r"^sae: must have decoder rows W_dec of shape \[latents, 16\], got \[24, 12\]"
    ):
        decoder_rows(narrow, 16, "narrow")
    assert decoder_rows(narrow, 12, "narrow")[1] == "none"
