"""Errors predicted from SAE outputs of earlier sites: a planted share, the command against plain least squares, bad input."""

import json
from pathlib import Path

import pytest
import torch
from cases.measured import measure
from cases.models import flags, settings_of
from cases.planted import PlantedSource, coin, family_tokens, plain_map, plain_parts, plain_r2, planted_sae

from darkmatter_ext import cli
from darkmatter_ext.experiments.earlier_layers import (
    PARTS,
    part_numbers,
    predictor_sets,
    related_hooks,
    shuffled,
)
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.measurement.site_saes import SiteSae
from darkmatter_ext.report.result import load_result
from darkmatter_ext.saes.encoders import Encoded, random_directions

HERE, BEFORE = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
N, D = 40_000, 8
RANDOM = ("random mlp", "random attention")  # controls of the sites beside the first


class _Planted(SiteSae):
    """An SAE of the site before whose own encoder is any function of x."""

    def own_of(self, loaded):
        return loaded


def _planted_predictor(x_hat):
    def encode(x):
        return Encoded(x_hat(x), torch.ones(len(x)), acts=None)

    return _Planted("p", BEFORE, "", D, 1, "planted", None, None, lambda: encode, 0)


@pytest.mark.runs
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_planted_share_of_the_nonlinear_error_comes_back(tmp_path, share):
    """error = 0.7 x + a Q y + noise, y = (x^2 - 1) / sqrt 2: uncorrelated with x, of unit variance, and the SAE output at
    the other site; Q orthogonal, so each dimension has the planted share of its nonlinear variance from y."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    before = (x.square() - 1) / 2**0.5

    def x_hat(x):
        y = (x.square() - 1) / 2**0.5
        return x - (0.7 * x + share**0.5 * y @ rotation + (1 - share) ** 0.5 * coin(x))

    earlier = _planted_predictor(lambda y: 3 * y + 1)
    predictors = [earlier.encoder(name="previous res"), shuffled(earlier, seed=0)]
    site = measure(
        PlantedSource({HERE: x, BEFORE: before}),
        [planted_sae("s", HERE, x_hat)],
        Measure(drop_positions=0, split="contexts", interval_groups=5),
        folder=tmp_path,
        predictors={HERE: predictors},
    )[HERE]
    found = part_numbers(site, "s", predictor_sets([sae.name for sae in predictors]))
    assert found["s/r2_from/previous res/nonlinear"] == pytest.approx(share, abs=0.02)
    assert found["s/r2_from/previous res/linear"] == pytest.approx(0, abs=0.01)
    assert found["s/r2_from/previous res/error"] == pytest.approx(share / 1.49, abs=0.02)
    low, high = (found[f"s/r2_from/previous res/nonlinear/{end}"] for end in ("low", "high"))
    assert 0 < high - low < 0.05
    for part in PARTS:
        assert found[f"s/r2_from/shuffled/{part}"] == pytest.approx(0, abs=0.01)
    assert found["s/r2_from/x/nonlinear"] == pytest.approx(0, abs=0.01)
    assert found["s/r2_from/x/linear"] == pytest.approx(1, abs=1e-9)
    assert found["s/beyond_x/previous res"] == pytest.approx(share, abs=0.02)
    assert found["s/beyond_x/shuffled"] == pytest.approx(0, abs=0.01)
    assert found["s/noise_floor/previous res"] == pytest.approx(-D / site.n_fit)


def test_a_predictor_that_is_mostly_linear_in_x_is_judged_beyond_x(tmp_path):
    """z = 10 x + y with the nonlinear error y: alone z looks poor, beyond x it explains everything."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    y = (x.square() - 1) / 2**0.5
    earlier = _planted_predictor(lambda z: z)
    site = measure(
        PlantedSource({HERE: x, BEFORE: 10 * x + y}),
        [planted_sae("s", HERE, lambda x: x - (0.7 * x + (x.square() - 1) / 2**0.5))],
        Measure(drop_positions=0, split="contexts", interval_groups=5),
        folder=tmp_path,
        predictors={HERE: [earlier.encoder(name="previous res")]},
    )[HERE]
    found = part_numbers(site, "s", predictor_sets(["previous res"]))
    assert found["s/r2_from/previous res/nonlinear"] < 0.05
    assert found["s/beyond_x/previous res"] == pytest.approx(1, abs=1e-6)


def test_the_controls_are_what_they_say():
    sae = _planted_predictor(lambda y: y + 1)
    x = torch.arange(100.0)[:, None]
    first, again = (shuffled(sae, seed=3).load()({BEFORE: x}).x_hat for _ in range(2))
    assert torch.equal(first, again)  # the same in both readings of a token
    assert sorted(first.flatten().tolist()) == (x + 1).flatten().tolist()
    assert (first != x + 1).all()  # nobody keeps its own
    from cases.models import small_sae

    own = small_sae("jumprelu", 12, 40, 0)
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(1))
    found = random_directions(own, 5, seed=0)(x)
    acts, centred = found.acts.to_dense(), x - own.b_dec
    rows = torch.linalg.lstsq(
        acts, found.x_hat - own.b_dec, driver="gelsd"
    ).solution  # its decoder, from what it decodes
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(acts, torch.where(acts > 0, centred @ rows.T, 0), atol=1e-3, rtol=0)  # a tied encoder
    assert found.l0.tolist() == (acts > 0).sum(1).tolist()
    assert int(found.l0.max()) == 5


def test_earlier_sites_of_a_residual_stream():
    hooks = related_hooks("blocks.10.hook_resid_post")
    assert hooks["previous res"] == "blocks.9.hook_resid_post"
    assert (hooks["mlp"], hooks["attention"]) == ("blocks.10.hook_mlp_out", "blocks.10.attn.hook_z")
    assert related_hooks("blocks.0.hook_resid_post")["previous res"] == "blocks.0.hook_resid_pre"


def _command(workplace, out, *more, hook=HERE):
    own = ("--widths", "24", "--interval-groups", "3", *more)
    return [*flags(workplace, *own, experiment="earlier-layers", hook=hook), "--out", str(out)]


def _only(saes):
    (sae,) = saes.values()
    return sae


@pytest.mark.parametrize("more", [(), ("--parity", "released-code")], ids=["paper", "released-code"])
def test_a_run_equals_plain_least_squares(finished, more):
    out, result, _ = finished("earlier-layers", *more)
    assert result.config["hook"] == HERE
    hooks = related_hooks(HERE)
    x, saes, fit = family_tokens(settings_of(result), list(hooks.values()))
    released = bool(more)
    parts = plain_parts(x[HERE], _only(saes[HERE]), fit, bias=not released)
    outputs = {name: _only(saes[hook])(x[hook].float()).double() for name, hook in hooks.items()}
    outputs["all"] = torch.cat(list(outputs.values()), dim=1)
    outputs["x"] = x[HERE]
    for name, z in outputs.items():
        for part in PARTS:
            y = parts[part]
            r2 = plain_r2(plain_map(z[fit], y[fit], bias=not released)(z[~fit]), y[~fit])
            found = result.numbers[f"topk-24/r2_from/{name}/{part}"]
            assert found == pytest.approx(r2, abs=2e-3 if name == "all" else 2e-4), (name, part)
    assert set(result.series["predictors"]) == {*hooks, "all", "all but res", "x", "shuffled", "random", *RANDOM}
    for part in PARTS if not released else ():
        assert result.numbers[f"topk-24/r2_from/shuffled/{part}"] == pytest.approx(0, abs=0.03)
    assert {path.name for path in out.iterdir()} == {"earlier-layers.json", "earlier-layers_parts.png", "report.html"}


def _folders(workplace):
    """Hook point -> folder of an SAE that the run above trained."""
    found = {}
    for config in sorted((workplace / "cache" / "saes").glob("topk-24-*/cfg.json")):
        found[json.loads(config.read_text())["metadata"]["hook_name"]] = str(config.parent)
    return found


MLP = "blocks.1.hook_mlp_out"


def _predictors(folders):
    """Given SAEs are named by themselves, with controls beside."""
    named = [Path(folders[hook]).name for hook in (MLP, BEFORE)]
    return {"res", *named, "all", "all but res", "x", "shuffled", "random"}


@pytest.mark.slow
def test_saes_that_exist_are_taken_instead(finished, workplace, tmp_path):
    """--sae and --predictor, with the SAEs that the demo trains."""
    finished("earlier-layers")
    out, folders = tmp_path / "given", _folders(workplace)
    chosen = ("--sae", folders[HERE], "--predictor", folders[MLP], folders[BEFORE])
    assert cli.main(_command(workplace, out, *chosen)) == 0
    given = load_result(out / "earlier-layers.json")
    assert set(given.series["predictors"]) == _predictors(folders)
    assert len(given.series["saes"]) == 1
    assert given.config["sae"] == [folders[HERE]]


@pytest.mark.slow
def test_streamed_saes_that_exist_have_controls_of_their_own(finished, workplace, tmp_path):
    finished("earlier-layers")
    folders = _folders(workplace)
    chosen = ("--sae", folders[HERE], "--predictor", folders[MLP], folders[BEFORE])
    stream = ["run", "earlier-layers", "--preset", "one-pass", *chosen, "--model", str(workplace / "model"), "--text",
              str(workplace / "text.txt"), "--tokens", "16000", "--context-length", "32", "--bos", "no",
              "--interval-groups", "3", "--out", str(tmp_path / "stream")]  # fmt: skip
    assert cli.main(stream) == 0
    streamed = load_result(tmp_path / "stream" / "earlier-layers.json")
    (name,) = [sae["name"] for sae in streamed.series["saes"]]
    for part in PARTS:
        assert abs(streamed.numbers[f"{name}/r2_from/shuffled/{part}"]) < 0.03
    assert streamed.numbers[f"{name}/r2_from/x/linear"] == pytest.approx(1, abs=1e-6)
    assert set(streamed.series["predictors"]) == _predictors(folders)
    mlp = Path(folders[MLP]).name
    assert streamed.numbers[f"{name}/r2_from/{mlp}/error"] > streamed.numbers[f"{name}/r2_from/shuffled/error"]
    # another experiment of the same configuration has a state of its own, without the control
    assert cli.main(["run", "decomposition", *stream[2:-1], str(tmp_path / "other")]) == 0


def test_saes_that_do_not_fit_together_are_refused(finished, workplace, tmp_path, refused):
    finished("earlier-layers")
    folders = _folders(workplace)
    for bad, message in (
        (("--sae", folders[HERE]), "--predictor: must name at least one SAE of another site with sae, got none"),
        (("--predictor", folders[HERE]), "--sae: must be given with predictor, got none"),
        (("--sae", folders[HERE], folders[MLP], "--predictor", folders[BEFORE]), "--sae: must be of one site, got"),
        (("--sae", folders[MLP], "--predictor", folders[MLP]), f"must be of another site than sae ({MLP}), got"),
    ):
        refused(_command(workplace, tmp_path, *bad, hook=""), message)


def test_bad_settings_give_one_line(workplace, tmp_path, refused):
    for more, message in (
        (("--hook", "blocks.1.hook_mlp_out"), "--hook: must be a hook_resid_post, whose earlier sites are known, got"),
        (("--interval-groups", "0"), "--interval-groups: must be at least 1, got 0"),
        (("--sae", "a", "--predictor", "nowhere"), "--sae: must be a folder with cfg.json"),
    ):
        refused(_command(workplace, tmp_path, *more), message)
    preset = ["run", "earlier-layers", "--preset", "gpt2-small", "--out", str(tmp_path)]
    refused(preset, "--predictor: must name at least one SAE of another site with sae, got none")
