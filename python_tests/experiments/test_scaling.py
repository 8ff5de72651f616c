"""`scaling`: planted FVU over width found again, the breakdown, and the command line against the two-pass decomposition."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.measured import measure, store_activations
from cases.models import flags, saved_sae, settings_of

from darkmatter_ext import cli
from darkmatter_ext.activations.sources import CacheSource
from darkmatter_ext.estimators.intervals import Interval
from darkmatter_ext.estimators.power_law import fit_power_law
from darkmatter_ext.experiments import scaling
from darkmatter_ext.experiments.scaling import at_fixed_l0, breakdown, paired_numbers
from darkmatter_ext.measurement.decompose import decompose_stream
from darkmatter_ext.measurement.run import prepare
from darkmatter_ext.measurement.settings import Measure, replaced
from darkmatter_ext.measurement.stored_tokens import MeasuredBatches
from darkmatter_ext.measurement.training_text import training_sample
from darkmatter_ext.ops.acts import SparseActs
from darkmatter_ext.report.result import load_result
from darkmatter_ext.runtime.progress import Stages
from darkmatter_ext.saes.encoders import Encoded, Encoder

HOOK, D = "blocks.0.hook_resid_post", 8
WIDTHS = (64, 128, 256, 512, 1024, 2048)
PLANTED = {"c": 0.09, "a": 1.1, "m": -0.5, "nonlinear": 0.05}


def _planted_encoder(width):
    """An error with a linear part beta x and a nonlinear part no linear map of standard normal x predicts, (x^2 - 1) / sqrt 2.

    FVU = beta^2 + s^2 follows the planted law, FVU_nonlinear = s^2 is the same at every width.
    """
    s = math.sqrt(PLANTED["nonlinear"])
    beta = math.sqrt(PLANTED["c"] + PLANTED["a"] * width ** PLANTED["m"] - s**2)

    def encode(x):
        error = beta * x + s * (x.square() - 1) / math.sqrt(2)
        acts = SparseActs.from_dense(torch.ones(len(x), 3))
        return Encoded(x - error, torch.full((len(x),), 3), acts)

    return encode


@pytest.mark.runs
def test_a_planted_law_and_its_parts_are_recovered_from_activations(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, D, generator=generator)
    store_activations(tmp_path / "cache", HOOK, x, torch.zeros(300, 64, dtype=torch.int64), torch.arange(300))
    saes = [Encoder.of_site(f"w{width}", HOOK, width, lambda width=width: _planted_encoder(width)) for width in WIDTHS]
    settings = Measure(drop_positions=0, block_contexts=100, split="contexts", max_norm_ratio=0)
    site = measure(CacheSource.open([tmp_path / "cache"]), saes, settings, folder=tmp_path / "run")[HOOK]
    numbers = {}
    for width in WIDTHS:
        own, fvu = f"w{width}", PLANTED["c"] + PLANTED["a"] * width ** PLANTED["m"]
        numbers |= {f"{own}/{key}": value for key, value in site.decomposition(own).numbers().items()}
        intervals = site.intervals(own)
        assert numbers[f"{own}/fvu"] == pytest.approx(fvu, rel=0.02)
        assert numbers[f"{own}/fvu_nonlinear"] == pytest.approx(PLANTED["nonlinear"], rel=0.03)
        assert numbers[f"{own}/r2_vec"] == pytest.approx(1 - PLANTED["nonlinear"] / fvu, abs=0.01)
        assert intervals["fvu"].low < fvu < intervals["fvu"].high
    listed = [{"name": f"w{width}", "d_sae": width} for width in WIDTHS]
    law = fit_power_law(WIDTHS, [numbers[f"w{width}/fvu"] for width in WIDTHS])
    assert law.c.value == pytest.approx(PLANTED["c"], abs=0.004)
    assert law.m.value == pytest.approx(PLANTED["m"], abs=0.03)
    mean = site.contrast({f"w{width}": 1 / len(WIDTHS) for width in WIDTHS})["fvu_nonlinear"]
    assert mean.value == pytest.approx(sum(numbers[f"w{width}/fvu_nonlinear"] for width in WIDTHS) / len(WIDTHS))
    parts = breakdown(law, listed, numbers, mean, pursued=False)
    widest_less_narrowest = paired_numbers(site, listed)
    planted = PLANTED["a"] * (WIDTHS[-1] ** PLANTED["m"] - WIDTHS[0] ** PLANTED["m"])
    assert widest_less_narrowest["paired/fvu"] == pytest.approx(planted, abs=0.003)
    assert abs(widest_less_narrowest["paired/fvu_nonlinear"]) < 1e-4  # the same nonlinear error, token by token
    unpaired = site.intervals("w64")["fvu_nonlinear"]
    paired = [widest_less_narrowest[f"paired/fvu_nonlinear/{end}"] for end in ("low", "high")]
    assert paired[1] - paired[0] < 0.1 * (unpaired.high - unpaired.low)
    assert parts["breakdown/linear"] == pytest.approx(PLANTED["c"] - PLANTED["nonlinear"], abs=0.005)
    assert parts["w64/breakdown/absent"] == pytest.approx(PLANTED["a"] * 64 ** PLANTED["m"], abs=0.005)
    for width in WIDTHS:  # the four parts are the curve
        name = f"w{width}/breakdown"
        total = parts[f"{name}/absent"] + parts["breakdown/linear"] + parts[f"{name}/encoder"] + parts[f"{name}/rest"]
        assert total == pytest.approx(law(width))


def test_pursuit_takes_the_encoders_part():
    law = fit_power_law([64, 128, 256, 512], [0.3, 0.25, 0.22, 0.2])
    listed = [{"name": "a", "d_sae": 64}, {"name": "b", "d_sae": 512}]
    numbers = {
        "a/fvu_nonlinear": 0.11,
        "b/fvu_nonlinear": 0.09,
        "a pursuit/fvu_nonlinear": 0.1,
        "b pursuit/fvu_nonlinear": 0.07,
    }
    parts = breakdown(law, listed, numbers, Interval(0.1, 0.09, 0.12), pursued=True)
    c = law.c
    assert parts["breakdown/linear"] == pytest.approx(c.value - 0.1)
    assert parts["breakdown/linear/high"] == pytest.approx(c.value - 0.1 + math.hypot(c.high - c.value, 0.01))
    assert (parts["a/breakdown/encoder"], parts["b/breakdown/encoder"]) == pytest.approx((0.0, 0.03))
    assert (parts["a/breakdown/rest"], parts["b/breakdown/rest"]) == (0.1, 0.07)


def test_saes_at_one_l0_are_the_nearest_of_each_width():
    saes = [
        {"name": name, "d_sae": width} for name, width in (("a", 64), ("b", 64), ("c", 128), ("d", 256), ("dead", 512))
    ]
    numbers = {"a/l0": 20.0, "b/l0": 35.0, "c/l0": 43.0, "d/l0": 30.0, "dead/l0": 0.0}
    assert [sae["name"] for sae in at_fixed_l0(saes, numbers, 32)] == ["b", "d"]
    assert [sae["name"] for sae in at_fixed_l0(saes, numbers, 40)] == ["b", "c"]


def test_the_command_measures_a_family_as_the_decomposition_does(finished):
    """Widths 24 to 64 with k 4: every number of every SAE equals the two-pass stream's, and the files are there."""
    out, found, said = finished("scaling")
    assert "FVU(W) = c + a W^m" in said
    inputs = prepare(replaced(settings_of(found), ks=(), k=4), Stages(show=False))
    functions = {sae.name: lambda batch, encode=sae.own: encode(batch.x) for sae in inputs.saes}
    expected = decompose_stream(MeasuredBatches(inputs.stored[inputs.one_site]), functions)
    for width in (24, 32, 48, 64):
        for key in ("fvu", "fvu_nonlinear", "r2_vec", "r2_norm/error", "l0"):
            value = found.numbers[f"topk-{width}-k4/{key}"]
            assert value == pytest.approx(expected[f"topk-{width}"].numbers()[key], rel=1e-4), (width, key)
        interval = [found.numbers[f"topk-{width}-k4/fvu/{end}"] for end in ("low", "high")]
        assert interval[0] < found.numbers[f"topk-{width}-k4/fvu"] < interval[1]
        pursued = found.numbers[f"topk-{width}-k4 pursuit/fvu"]
        assert 0 < pursued < 1
        rest = found.numbers[f"topk-{width}-k4/breakdown/rest"]
        assert rest == found.numbers[f"topk-{width}-k4 pursuit/fvu_nonlinear"]
        x = training_sample(inputs.stored[inputs.one_site], int(found.numbers["tokens/held_out"]), seed=0)
        rest = (x - inputs.sae(f"topk-{width}").load()(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert found.numbers[f"topk-{width}-k4/fvu_training_text"] == pytest.approx(rest.item(), rel=1e-4)
        assert f"topk-{width}-k4-seed1/fvu" in found.numbers
        assert found.numbers[f"topk-{width}-k4-seed1/fvu"] != found.numbers[f"topk-{width}-k4/fvu"]
    figures = scaling._lines(found)
    assert {sae["name"] for _, own in figures for sae in own} == {
        sae["name"] for sae in found.series["saes"] if sae["frozen"] == "none"
    }  # no control in a figure over width
    assert {sae["frozen"] for sae in found.series["saes"] if sae["d_sae"] == 32} == {"none", "decoder", "soft-decoder"}
    assert found.numbers["topk-32-k4-frozen-decoder/fvu"] > found.numbers["topk-32-k4/fvu"]
    assert found.numbers["law/widths"] == 8  # two seeds of four widths, no control
    assert {"law_training_text/c", "paired/fvu_nonlinear/low"} <= set(found.numbers)
    assert "on the text the SAEs were trained on" in said
    assert found.series["law"] == [f"topk-{width}-k4" for width in (24, 32, 48, 64)]
    shuffled, random = (found.numbers[f"topk-64-k4 {name}/fvu"] for name in ("shuffled decoder", "random directions"))
    assert min(shuffled, random) > found.numbers["topk-64-k4/fvu"]
    below = {f"breakdown/linear{end}": value for end, value in (("", -0.3), ("/low", -0.4), ("/high", -0.2))}
    crossed = dataclasses.replace(found, numbers=found.numbers | below)
    assert "what remains at any width cannot be split" in scaling.reading(crossed)[-2]
    axes = scaling.stacked_breakdown(crossed).axes[0]  # parts below 0 do not stack
    assert (len(axes.collections), "no split" in axes.texts[0].get_text()) == (0, True)
    names = {
        "scaling.json",
        "scaling_lines.png",
        "scaling_contours.png",
        "scaling_breakdown.png",
        "scaling.npz",
        "report.html",
    }
    assert {path.name for path in out.iterdir()} == names


@pytest.mark.runs
def test_architectures_side_by_side(finished):
    """Each has its own line and its own flatness; the law stays with the first."""
    more = ("--architectures", "topk", "batchtopk", "--with-pursuit", "false", "--sae-seeds", "1", "--ks", "4")
    _, found, said = finished("scaling", *more)
    assert found.series["law"] == [f"topk-{width}" for width in (24, 32, 48, 64)]
    assert found.series["others"] == {"batchtopk": [f"batchtopk-{width}" for width in (24, 32, 48, 64)]}
    change = found.numbers["batchtopk-64/fvu_nonlinear"] - found.numbers["batchtopk-24/fvu_nonlinear"]
    assert found.numbers["paired/batchtopk/fvu_nonlinear"] == pytest.approx(change)
    low, high = (found.numbers[f"paired/batchtopk/fvu_nonlinear/{end}"] for end in ("low", "high"))
    assert low < change < high
    assert f"batchtopk, 24 to 64 latents: FVU from {found.numbers['batchtopk-24/fvu']:.3f}" in " ".join(said.split())
    drawn = scaling._lines(found)
    assert [(label.split(", ")[1], [sae["d_sae"] for sae in saes]) for label, saes in drawn] == [
        ("topk", [24, 32, 48, 64]),
        ("batchtopk", [24, 32, 48, 64]),
    ]
    panels = scaling.contours(found).axes[:4]  # the colour bars are after them
    assert all(len(panel.collections[-1].get_offsets()) == 4 for panel in panels)
    without = dataclasses.replace(found, series=found.series | {"others": {"batchtopk": ["batchtopk-24"]}})
    assert "batchtopk: SAEs at the law's L0 at 1 of the widths: nothing to compare." in scaling.reading(without)


@pytest.mark.slow
def test_too_few_widths_at_one_l0_give_no_law_and_say_so(finished):
    _, result, said = finished("scaling", "--widths", "24", "48", "--ks", "4", "--with-pursuit", "false")
    assert "No power law: it needs 4 widths at L0 about 4, there are 2" in said
    assert not any(key.startswith("law/") for key in result.numbers)


def test_the_released_codes_positions(monkeypatch):
    """Its scaling script leaves out the first position only (and the last, as everywhere)."""
    seen = []
    monkeypatch.setattr(scaling, "prepare", lambda settings, _stages: seen.append(settings) or 1 / 0)
    settings = replaced(scaling.PRESETS["demo"], parity="released-code")
    with pytest.raises(ZeroDivisionError):
        scaling.run(settings, None)
    assert (seen[0].measure.drop_positions, settings.measure.drop_positions) == (1, 8)


BAD = [
    (["--widths", "24"], "--widths: must name at least 2 widths to see how error scales, got [24]"),
    (["--l0", "0"], "--l0: must be above 0, got 0.0"),
    (["--ks", "4", "30"], "--ks: must be from 1 to the least of widths (24), got 30"),
    (["--ks", "4", "4"], "--ks: must be different numbers, got [4, 4]"),
    (["--parity", "code"], "--parity: must be paper or released-code, got 'code'"),
    (["--interval-groups", "0"], "--interval-groups: must be at least 1, got 0"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_settings_give_one_line(workplace, tmp_path, refused, more, message):
    refused(flags(workplace, "--ks", "4", *more, "--out", str(tmp_path), experiment="scaling"), message)


@pytest.mark.runs
def test_given_saes_must_be_of_two_widths_and_of_the_site(workplace, tmp_path, refused):
    for name, width, hook in (("a", 24, "blocks.1.hook_resid_post"), ("b", 24, "blocks.1.hook_resid_post"),
                              ("c", 48, "blocks.0.hook_resid_post")):  # fmt: skip
        saved_sae(tmp_path / name, d_sae=width, hook_name=hook)
    for names, message in (
        ("ab", "--sae: must be SAEs of at least 2 widths to see how error scales, got [24]"),
        ("ac", "--sae: must be of the site blocks.1.hook_resid_post, got"),
    ):
        saes = ["--sae", *(str(tmp_path / name) for name in names)]
        refused(flags(workplace, *saes, "--out", str(tmp_path / "out"), experiment="scaling"), message)


def _saved(folder, widths, hook="blocks.1.hook_resid_post"):
    """Given SAEs of these widths."""
    return [saved_sae(folder / f"sae-{width}", d_sae=width, seed=width, hook_name=hook) for width in widths]


def _stream(workplace, saes):
    return ["run", "scaling", "--preset", "one-pass", "--sae", *saes, "--model", str(workplace / "model"), "--text",
            str(workplace / "text.txt"), "--tokens", "8000", "--context-length", "32", "--l0", "4",
            "--with-pursuit"]  # fmt: skip


def _counted(monkeypatch, module, name):
    """The calls of a function, which still does its work."""
    work, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *given, **more: calls.append(given) or work(*given, **more))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("store", [False, True])
def test_three_measurements_load_every_sae_once_and_tokenise_once(workplace, tmp_path, monkeypatch, store):
    """SAEs, pursuit and controls are measured of inputs made once; a checkpoint has a folder for each set of encoders."""
    from darkmatter_ext.measurement import opening, site_saes

    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    loaded = _counted(monkeypatch, site_saes, "load_sae")
    tokenised = _counted(monkeypatch, opening, "tokenize_contexts" if store else "text_rows")
    ran = _counted(monkeypatch, opening, "activation_caches") if store else []
    saes, folder = _saved(tmp_path, (24, 32, 48, 64)), tmp_path / "run"
    more = ["--store", str(store), "--checkpoint", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main([*_stream(workplace, saes), *more]) == 0
    assert [spec for spec, *_ in loaded] == saes
    assert (len(tokenised), len(ran)) == (1, int(store))
    sets = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("run.json")}
    assert sets == {".", "pursuit", "shuffled decoder-random directions"}
    assert (folder / "contexts").exists() != store
    first = load_result(tmp_path / "out" / "scaling.json").numbers
    loaded.clear()
    assert cli.main([*_stream(workplace, saes), *more]) == 0  # from the states of all three
    assert load_result(tmp_path / "out" / "scaling.json").numbers == first
    assert len(tokenised) == (2 if store else 1)  # streamed: the contexts are kept with the states


@pytest.mark.slow
def test_a_budget_of_memory_loads_saes_again_and_changes_no_number(workplace, tmp_path, monkeypatch):
    from darkmatter_ext.measurement import site_saes

    loaded = _counted(monkeypatch, site_saes, "load_sae")
    saes, numbers = _saved(tmp_path, (24, 32)), []
    of_both = 2 * 4 * 16 * (24 + 32)  # bytes
    for number, gigabytes in enumerate((0, 2 * of_both / 1e9, 1e-9)):
        loaded.clear()
        own = ["--sae-memory-gb", str(gigabytes), "--checkpoint", str(tmp_path / f"run-{number}")]
        stream = [word for word in _stream(workplace, saes) if word != "--with-pursuit"]
        assert cli.main([*stream, *own, "--out", str(tmp_path / "out")]) == 0
        numbers.append((load_result(tmp_path / "out" / "scaling.json").numbers, len(loaded)))
    (free, once), (enough, kept), (tight, often) = numbers
    assert once == 2
    assert kept == 10  # the controls load the widest for each of their own, the page each for latents, rows and KL
    assert often > 2 * 8000 / 32 / 32  # every block of both readings
    assert enough == free == tight


@pytest.mark.runs
def test_saes_of_several_sites_are_told_before_the_model_runs(workplace, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(scaling, "prepare", None)
    saes = [*_saved(tmp_path, (24,)), *_saved(tmp_path, (48,), "blocks.0.hook_resid_post")]
    message = (
        "--sae: must be of one site to see how error scales, got blocks.1.hook_resid_post and blocks.0.hook_resid_post"
    )
    refused([*_stream(workplace, saes), "--out", str(tmp_path / "out")], message)


@pytest.mark.slow
def test_two_processes_measure_several_times_and_agree_with_one(workplace, tmp_path):
    """SAEs, pursuit and controls are three measurements: all in one process group of a torchrun."""
    own = _stream(workplace, _saved(tmp_path, (24, 32, 48, 64)))
    command = Path(sys.executable).with_name("darkmatter")
    assert cli.main([*own, "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node=2", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(command)]  # fmt: skip
    shared = [*own, "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "two")]
    done = subprocess.run([*torchrun, *shared], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (load_result(tmp_path / name / "scaling.json").numbers for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9, nan_ok=True)
    assert one["sae-64 pursuit/fvu"] < one["sae-64 shuffled decoder/fvu"]
