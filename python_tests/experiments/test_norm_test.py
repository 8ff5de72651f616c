"""The norm prediction test over a family: a planted R2, the command against plain least squares, bad input."""

import pytest
import torch
from cases.measured import measure
from cases.models import flags, saved_sae, settings_of
from cases.planted import PlantedSource, coin, family_tokens, plain_map, plain_parts, plain_r2, planted_sae

from darkmatter_ext import cli
from darkmatter_ext.experiments.norm_test import PRESETS, NormTestSettings, norm_numbers, over_saes
from darkmatter_ext.measurement.error import NORM_TARGETS
from darkmatter_ext.measurement.presets import DEMO, KS, WIDTHS
from darkmatter_ext.measurement.settings import Measure, extended, replaced
from darkmatter_ext.report.result import load_result

HOOK = "blocks.1.hook_resid_post"
N, D = 60_000, 8


@pytest.mark.runs
@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_planted_share_of_the_squared_norm_comes_back(tmp_path, noise):
    """||e||^2 = 30 + 3 x_0 + noise of known variance, e in a direction x says nothing about: R2 = 1 / (1 + noise^2)."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))

    def x_hat(x):
        squared = 30 + 3 * x[:, 0] + 3 * noise * coin(x[:, 1] + x[:, 2])
        direction = coin(x) / D**0.5
        return x - squared.sqrt()[:, None] * direction

    settings = Measure(drop_positions=0, split="contexts")
    site = measure(PlantedSource({HOOK: x}), [planted_sae("s", HOOK, x_hat)], settings, folder=tmp_path)[HOOK]
    numbers = norm_numbers(site, "s")
    expected = 1 / (1 + noise**2)
    for target in ("error", "nonlinear"):
        assert numbers[f"s/r2_norm/{target}"] == pytest.approx(expected, abs=0.02)
        assert numbers[f"s/r2_norm/{target}/high"] - numbers[f"s/r2_norm/{target}/low"] < 0.1
        assert numbers[f"s/r2_from_norm_of_x/{target}"] == pytest.approx(0, abs=0.01)
    assert numbers["s/r2_norm/x"] == pytest.approx(0, abs=0.01)  # a sum of squares of a Gaussian: nothing linear in it
    assert numbers["s/noise_floor"] == pytest.approx(-D / site.n_fit)


def test_the_demo_is_the_measurement_other_families_make():
    assert PRESETS["demo"] == extended(DEMO, NormTestSettings, widths=WIDTHS, ks=KS)
    assert PRESETS["demo"].flat() == replaced(DEMO, widths=WIDTHS, ks=KS).flat()


def test_median_and_range_are_over_saes():
    numbers = {f"{sae}/noise_floor": -0.01 * sae for sae in range(4)}
    for kind in ("r2_norm", "r2_from_norm_of_x"):
        numbers |= {f"{sae}/{kind}/{target}": float(sae**2) for sae in range(3) for target in NORM_TARGETS}
        numbers |= {f"3/{kind}/{target}": float("nan") for target in NORM_TARGETS}  # does not vary: left out
    found = over_saes(numbers, [{"name": str(sae)} for sae in range(4)])
    assert [found[f"over_saes/r2_norm/error/{end}"] for end in ("median", "least", "greatest")] == [1, 0, 4]
    assert found["noise_floor"] == -0.03


@pytest.mark.parametrize("more", [(), ("--parity", "released-code")], ids=["paper", "released-code"])
def test_a_run_equals_plain_least_squares(finished, more):
    """Every R2 of the result from stored tensors and torch.linalg.lstsq; without bias and with b* on all tokens, or not."""
    out, result, _ = finished("norm-test", *more)
    x, saes, fit = family_tokens(settings_of(result), [HOOK])
    x, saes = x[HOOK], saes[HOOK]
    assert [sae["name"] for sae in result.series["saes"]] == list(saes)
    assert (int(fit.sum()), int((~fit).sum())) == (result.numbers["tokens/fit"], result.numbers["tokens/held_out"])
    released = bool(more)
    for name in list(saes)[:2]:
        vectors = {"x": x} | plain_parts(x, saes[name], fit, bias=not released, on_all=released)
        vectors["sae_plus_nonlinear"] = vectors["sae"] + vectors["nonlinear"]
        for target in NORM_TARGETS:
            y = vectors[target].square().sum(1, keepdim=True)
            r2 = plain_r2(plain_map(x[fit], y[fit], bias=not released)(x[~fit]), y[~fit])
            assert result.numbers[f"{name}/r2_norm/{target}"] == pytest.approx(r2, abs=2e-4), (name, target)
    assert any("no bias" in note for note in result.notes) == released
    assert {path.name for path in out.iterdir()} == {
        "norm-test.json", "norm-test_violins.png", "norm-test_saes.png", "report.html",
    }  # fmt: skip


def test_one_sae_is_drawn_as_a_point(finished):
    out, result, _ = finished("norm-test", "--widths", "24", "--ks", "4")
    assert "1 SAE(s): drawn as points, a violin needs 4." in result.notes
    assert not result.series["violins"]
    assert (out / "norm-test_violins.png").exists()


@pytest.mark.runs
def test_saes_of_several_sites_are_one_family(workplace, tmp_path):
    """SAEs that exist at two layers, streamed: one violin over both, and each SAE at its own site."""
    for number, hook in enumerate(("blocks.0.hook_resid_post", HOOK) * 2):
        saved_sae(
            tmp_path / f"sae-{number}", seed=number, architecture="jumprelu", bias=-0.2, threshold=0.05, hook_name=hook
        )
    saes = [str(tmp_path / f"sae-{number}") for number in range(4)]
    out = tmp_path / "out"
    arguments = ["run", "norm-test", "--preset", "one-pass", "--sae", *saes, "--model", str(workplace / "model"), "--text",
                 str(workplace / "text.txt"), "--tokens", "8000", "--context-length", "32", "--bos", "no",
                 "--interval-groups", "3", "--out", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    result = load_result(out / "norm-test.json")
    layers = [result.numbers[f"sae-{number}/r2_norm/x"] for number in range(4)]
    assert layers[0] == layers[2] != layers[1] == layers[3]  # x does not depend on the SAE, but on the site
    assert (out / "norm-test_violins.png").exists()


@pytest.mark.parametrize("name", ["norm-test", "earlier-layers", "latent-alignment"])
@pytest.mark.parametrize("preset", ["demo", "one-pass"])
def test_help_lists_the_settings(name, preset, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", name, "--preset", preset, "--help"])
    assert stopped.value.code == 0
    assert "--interval-groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parity", "code"), "--parity: must be paper or released-code, got 'code'"),
        (("--ks", "4", "100"), "--ks: must be from 1 to the least of widths (24), got 100"),
        (("--ks", "4", "4"), "--ks: must be different numbers, got [4, 4]"),
        (("--interval-groups", "0"), "--interval-groups: must be at least 1, got 0"),
        (("--ks", "4", "--sae", "nowhere"), "--sae: must be a folder with cfg.json"),
        (("--preset", "one-pass", "--passes", "3"), "--passes: must be 1 or 2, got 3"),
    ],
)
def test_bad_settings_give_one_line(workplace, more, message, refused, tmp_path):
    arguments = flags(workplace, "--ks", "4", *more, "--out", str(tmp_path), experiment="norm-test")
    if "--preset" in more:
        arguments = ["run", "norm-test", *more, "--out", str(tmp_path)]
    refused(arguments, message)
