"""Error norms that predict each other by a planted amount, and the command on a small model."""

import pytest
import torch
from cases.measured import measure
from cases.models import flags, saved_sae, settings_of
from cases.norms import HOOK, Finished, erring_sae, r2, stored

from darkmatter_ext import cli
from darkmatter_ext.estimators.intervals import r2_interval
from darkmatter_ext.experiments.per_token import PRESETS, pair_numbers, shuffled_r2
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.report.result import load_result

SHARED, FROM_NONLINEAR = 0.8, 0.36  # correlation of the second error norm with the first, and with its nonlinear part
CONTEXTS, LENGTH, D = 240, 64, 12


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """x holds what the norms are made of: the linear part's length, independent normal numbers, a large norm of its own."""
    z = torch.randn(CONTEXTS, LENGTH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, nonlinear = 10 + z[..., 0], 5 + 0.5 * z[..., 1]
    second = (
        12 + SHARED * z[..., 0] + FROM_NONLINEAR * z[..., 1] + (1 - SHARED**2 - FROM_NONLINEAR**2) ** 0.5 * z[..., 2]
    )
    linear = (first.square() - nonlinear.square()).sqrt()
    columns = [linear, nonlinear, second, z[..., 3], z[..., 4], 100 + 10 * z[..., 5]]
    x = torch.cat([torch.stack(columns, dim=-1), torch.zeros(CONTEXTS, LENGTH, D - 6)], dim=-1).float()

    def one(x):  # linear error along axis 0; along axis 1 a sign that no linear map of x knows
        error = torch.zeros_like(x)
        error[:, 0], error[:, 1] = x[:, 0], x[:, 1] * (x[:, 3] * x[:, 4]).sign()
        return error

    def two(x):
        error = torch.zeros_like(x)
        error[:, 2] = x[:, 2]
        return error

    folder = tmp_path_factory.mktemp("planted")
    source = stored(folder, x, torch.zeros(CONTEXTS, LENGTH, dtype=torch.int64))
    saes = [erring_sae("one", one), erring_sae("two", two)]
    return measure(source, saes, Measure(drop_positions=0), folder=folder / "run")[HOOK]


def test_the_planted_share_and_gain_come_back(planted):
    numbers = pair_numbers(planted, "one", "two")
    gain = 100 * FROM_NONLINEAR**2 / (1 - SHARED**2)
    for name, expected, room in (("r2", SHARED**2, 0.02), ("gain", gain, 2.5), ("gain_from_x", 0, 0.3)):
        value, low, high = (numbers[f"{name}/one/two{end}"] for end in ("", "/low", "/high"))
        assert value == pytest.approx(expected, abs=room), name
        assert low < value < high, name
        assert high - low < 4 * room, name
    r2_more = planted.scalar_fit(["one/error_norm", "one/nonlinear_norm"], ["two/error_norm"]).r2
    r2_one = planted.scalar_fit(["one/error_norm"], ["two/error_norm"]).r2
    assert numbers["gain/one/two"] == pytest.approx(100 * (r2_more - r2_one) / (1 - r2_one), rel=1e-8)  # the definition
    assert planted.scalar_interval(["x_norm"], "two/error_norm").value == pytest.approx(0, abs=0.01)


def test_another_tokens_norm_says_nothing():
    norms = 5 + torch.randn(6000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    contexts = torch.arange(6000) // 60
    found = shuffled_r2(norms, contexts, seed=0)
    assert found.value == pytest.approx(0, abs=0.003)
    assert found.low < 0 < found.high


def test_the_interval_of_an_r2_holds_the_planted_one_about_as_often_as_it_says():
    """Contexts of different size whose tokens share an effect, in ten groups; y = p + noise of a quarter of its variance."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        size = torch.randint(5, 40, (60,), generator=generator)
        shared = torch.randn(60, 2, generator=generator).repeat_interleave(size, 0)
        own = torch.randn(len(shared), 2, generator=generator)
        predicted, noise = (0.5**0.5 * (shared + own)).unbind(1)
        y = 7 + 3**0.5 * predicted + noise
        found = r2_interval(y, 7 + 3**0.5 * predicted, torch.arange(60).repeat_interleave(size) % 10)
        covered += found.low <= 0.75 <= found.high
        residual, total = noise.double().square().sum(), (y.double() - y.double().mean()).square().sum()
        assert found.value == pytest.approx((1 - residual / total).item(), abs=1e-6)
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("more", [(), ("--parity", "released-code")], ids=["paper", "released-code"])
def test_a_run_regresses_every_pair(finished, more):
    out, result, _ = finished("per-token", *more)
    names = {"per-token.json", "per-token.npz", "per-token_matrices.png", "per-token_curves.png", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    assert [sae["d_sae"] for sae in result.series["saes"]] == [24, 48]  # smaller first, however given
    tensors = Finished.of(settings_of(result), HOOK)
    assert int((~tensors.fit).sum()) == result.numbers["tokens/held_out"]
    norms = {name: tensors.error(name).norm(dim=1) for name in ("topk-24", "topk-48")}
    given = {"r2/topk-24/topk-48": ("topk-24", "topk-48"), "r2/topk-48/topk-24": ("topk-48", "topk-24")}
    for key, (first, second) in given.items():
        expected = r2(norms[first][:, None], norms[second], tensors.fit)
        assert result.numbers[key] == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    again = tensors.error("topk-24-seed1").norm(dim=1)  # the ceiling: another seed of the same width
    assert result.series["ceilings"] == [["topk-24", "topk-24-seed1"], ["topk-48", "topk-48-seed1"]]
    expected = r2(norms["topk-24"][:, None], again, tensors.fit)
    assert result.numbers["r2/topk-24/topk-24-seed1"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    other = r2(norms["topk-24"][:, None], norms["topk-48"], tensors.fit, bias=False)
    assert abs(result.numbers["r2/topk-24/topk-48"] - other) > 1e-3  # the bias makes a difference
    x_norm = tensors.x.norm(dim=1, keepdim=True)
    expected = r2(x_norm, norms["topk-48"], tensors.fit)
    assert result.numbers["x_norm/topk-48"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert abs(result.numbers["shuffled/topk-48"]) < 0.02
    assert result.numbers["gain/topk-24/topk-48/low"] < result.numbers["gain/topk-24/topk-48/high"]
    squares = result.series["excerpt"]["squared_norms"]["topk-48"]["error"]
    shown = norms["topk-48"][tensors.places[0] == tensors.places[0][~tensors.fit][0]][: len(squares)]
    assert squares == pytest.approx(shown.square().tolist(), rel=1e-4)
    assert any("b* without bias" in note for note in result.notes) == bool(more)


def test_streamed_saes_are_in_order_of_width(finished, workplace, tmp_path):
    folders = [sae["folder"] for sae in finished("per-token").result.series["saes"]]
    text = ("--model", str(workplace / "model"), "--text", str(workplace / "text.txt"), "--tokens", "6400")
    many = ["run", "per-token", "--preset", "one-pass", "--sae", *folders, *text]
    assert cli.main([*many, "--out", str(tmp_path)]) == 0
    streamed = load_result(tmp_path / "per-token.json")
    assert [sae["d_sae"] for sae in streamed.series["saes"]] == [24, 48]


@pytest.mark.runs
def test_saes_that_cannot_be_compared_are_refused_in_one_line(workplace, tmp_path, refused):
    one, other = (saved_sae(tmp_path / f"sae-{layer}", hook_name=f"blocks.{layer}.hook_resid_post") for layer in (0, 1))
    many = ["run", "per-token", "--preset", "one-pass", "--model", str(workplace / "model")]
    several = (
        "--sae: must be of one site, errors of several are not on one scale, got blocks.0.hook_resid_post and blocks.1"
    )
    cases = [
        (
            flags(workplace, "--widths", "24", experiment="per-token"),
            "--widths: must name at least two widths, one predicts",
        ),
        (
            flags(workplace, "--sae", one, experiment="per-token", hook=""),
            "--sae: must name at least two SAEs, one predicts the other",
        ),
        (flags(workplace, "--sae", one, other, experiment="per-token", hook=""), several),
        ([*many, "--sae", one], "--sae: must name at least two SAEs, one predicts the other"),
        ([*many, "--widths", "32"], "--widths: must name at least two widths, one predicts the other, got [32]"),
        ([*many, "--sae", one, other], several),
    ]
    for arguments, message in cases:
        refused([*arguments, "--out", str(tmp_path / "none")], message)
    assert not list(tmp_path.glob("none/*"))


def test_plans_and_presets(workplace, capsys):
    assert cli.main([*flags(workplace, experiment="per-token"), "--dry-run"]) == 0
    assert "error norm of every SAE on that of every other" in capsys.readouterr().out
    paper = PRESETS["gemma-2-9b-l20"]
    assert [spec.rpartition("_")[2] for spec in paper.saes.sae] == ["58", "57", "55", "62", "64", "48", "57"]
    assert "gemma-2-9b-all-layers" not in PRESETS
