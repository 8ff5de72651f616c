"""The command line end to end on a small model, and every bad input: one line, exit code 2, nothing half-written."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from small_site import flags

from darkmatter_ext import cli
from darkmatter_ext.experiments import experiment, names
from darkmatter_ext.report.result import load_result

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def finished(workplace):
    """One run, shared: (exit code, output folder)."""
    os.environ["DARKMATTER_CACHE"] = str(workplace / "cache")
    return cli.main(flags(workplace, "--out", str(workplace / "out"))), workplace / "out"


def test_a_run_writes_result_figures_and_report(finished, workplace):
    code, out = finished
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        "decomposition.json", "decomposition_fvu.png", "decomposition_norm_test.png", "decomposition_per_token.png",
        "report.html",
    }  # fmt: skip
    result = load_result(out / "decomposition.json")
    assert result.config["widths"] == [24, 48]
    assert torch.__version__.startswith(result.provenance["versions"]["torch"])
    assert len(result.provenance["text_sha256"]) == 64
    for name in ("topk-24", "topk-48"):
        assert 0 < result.numbers[f"{name}/fvu_nonlinear"] <= result.numbers[f"{name}/fvu"]
        assert result.numbers[f"{name}/l0"] <= 4
    total = sum(
        result.numbers[f"tokens/{role}"] for role in ("sae_training", "fit", "held_out", "dropped_first_positions")
    )
    assert total + result.numbers["tokens/left_out_high_norm"] == 16000
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert f"{result.numbers['topk-24/fvu']:.3f}" in page


def test_a_second_run_gives_the_same_numbers_from_the_cache(finished, workplace, monkeypatch):
    from darkmatter_ext.measurement import site_saes

    monkeypatch.setattr(site_saes, "train_topk_sae", None)  # training again would fail
    assert cli.main(flags(workplace, "--out", str(workplace / "again"))) == 0
    first, again = (load_result(path / "decomposition.json") for path in (finished[1], workplace / "again"))
    assert first.numbers == again.numbers


@pytest.mark.parametrize("method", ["gradient", "matching", "orthogonal"])
def test_pursuit_beside_the_encoder(finished, workplace, capsys, method):
    out = workplace / f"pursuit-{method}"
    assert cli.main(flags(workplace, "--method", method, "--out", str(out), experiment="pursuit")) == 0
    assert {path.name for path in out.iterdir()} == {
        "pursuit.json",
        "pursuit_widths.png",
        "report.html",
    }
    result, encoder = load_result(out / "pursuit.json"), load_result(finished[1] / "decomposition.json")
    for name in ("topk-24", "topk-48"):
        numbers = {v: result.numbers[f"{name} {v}/fvu"] for v in ("encoder", "pursuit", "refit")}
        assert numbers["encoder"] == pytest.approx(encoder.numbers[f"{name}/fvu"], rel=1e-6)
        assert numbers["refit"] <= numbers["encoder"] + 1e-9  # the best weights on the same latents
        assert result.numbers[f"{name} pursuit/l0"] <= result.numbers[f"{name} encoder/l0"] + 1e-9
    assert "topk-48 refit: FVU" in capsys.readouterr().out.replace("\n", " ")
    assert cli.main(["figure", str(out / "pursuit.json"), "--out", str(out)]) == 0


def test_saes_of_a_run_can_be_measured_by_folder(finished, workplace, capsys):
    folders = [sae["folder"] for sae in load_result(finished[1] / "decomposition.json").series["saes"]]
    numbers = []
    for more in ([], ["--store", "True"]):
        assert cli.main(flags(workplace, "--sae", *folders, *more, "--out", str(workplace / "given"))) == 0
        numbers.append(load_result(workplace / "given" / "decomposition.json").numbers)
    streamed, stored = numbers
    assert stored["tokens/sae_training"] == 0
    assert "tokens/sae_training" not in streamed
    assert {name for name in stored if name.startswith("tokens/")} > {name for name in streamed if "tokens/" in name}
    assert streamed == pytest.approx({name: stored[name] for name in streamed}, rel=1e-4)
    assert "wrote" in capsys.readouterr().out


def test_figures_and_report_are_made_again_from_the_file(finished, workplace, capsys):
    result = str(finished[1] / "decomposition.json")
    assert cli.main(["figure", result, "--out", str(workplace / "figures"), "--kind", "pdf"]) == 0
    assert len(list((workplace / "figures").glob("*.pdf"))) == 3
    assert cli.main(["report", result, "--out", str(workplace / "page" / "r.html")]) == 0
    assert (workplace / "page" / "r.html").stat().st_size > 10_000
    capsys.readouterr()


def test_dry_run_prints_the_plan_and_does_nothing(workplace, capsys, tmp_path):
    assert cli.main(flags(workplace, "--dry-run", "--seed", "7", "--out", str(tmp_path / "no"))) == 0
    plan = capsys.readouterr().out
    assert "16000 tokens in contexts of 32" in plan
    assert "seed 7" in plan
    assert "48 latents, k 4, 30 steps" in plan
    assert not (tmp_path / "no").exists()


def test_list_env_and_help(capsys):
    assert cli.main(["list"]) == 0
    assert "decomposition" in capsys.readouterr().out
    assert cli.main(["env"]) == 0
    assert "cpu_isa" in json.loads(capsys.readouterr().out)
    assert cli.main(["--help"]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert cli.main(["run"]) == 0
    assert "decomposition" in capsys.readouterr().out
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "decomposition", "--help"])
    assert caught.value.code == 0
    assert "--context-length" in capsys.readouterr().out


EVERY = [(name, preset) for name in names() for preset in experiment(name).PRESETS]


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_help_shows_every_setting_once(name, preset, capsys):
    """Whichever part a setting is in: a flag of its own name, no prefix, none twice, each with its line."""
    with pytest.raises(SystemExit):
        cli.main(["run", name, "--preset", preset, "--help"])
    lines = capsys.readouterr().out.partition("options:")[2]
    shown = re.findall(r"^ {2}(-[\w.-]+)", lines, re.MULTILINE)
    names = list(experiment(name).PRESETS[preset].flat())
    settings = [f"--{own.replace('_', '-')}" if len(own) > 1 else f"-{own}" for own in names]
    assert sorted(shown) == sorted([*settings, "-h", "--preset", "--out", "--dry-run"])


BAD = [
    (["nonsense"], "COMMAND: must be one of demo, run"),
    (["run", "nonsense"], f"EXPERIMENT: must be one of {', '.join(names())}, got 'nonsense'"),
    (["run", "pursuit", "--method", "omp"], "--method: must be one of gradient, matching, orthogonal, got 'omp'"),
    (["run", "decomposition", "--preset", "none"], "--preset: must be one of demo, one-pass, gemma-2-9b-l20, "),
    (["run", "decomposition", "--tokns", "5"], "unrecognized arguments: --tokns 5"),
    (["run", "decomposition", "--tokens", "many"], "argument --tokens: invalid"),
    (["run", "decomposition", "--tokens", "10"], "--tokens: must be at least 512, got 10"),
    (["run", "decomposition", "--fit-fraction", "1.5"], "--fit-fraction: must be between 0 and 1, got 1.5"),
    (["run", "decomposition", "--widths", "8"], "--widths: must be at least k (32), got 8"),
    (["run", "decomposition", "--hook", "layer10"], "--hook: must be like blocks.10.hook_resid_post, got 'layer10'"),
    (["run", "decomposition", "--device", "tpu"], "--device: must be cpu or cuda, got 'tpu'"),
    (["run", "decomposition", "--sae", "/nowhere"], "--sae: must be a folder with cfg.json"),
    (["demo", "--speed", "9"], "unrecognized arguments: --speed 9"),
    (["figure", "/nowhere.json"], "RESULT: must be a result file, got /nowhere.json"),
    (["report"], "the following arguments are required: RESULT"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: value[:50] if isinstance(value, str) else None
)
def test_bad_arguments_give_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.rglob("*.json"))


def test_bad_files_are_told_before_or_without_a_result(workplace, tmp_path, capsys, finished):
    binary = tmp_path / "tokens.bin"
    binary.write_bytes(bytes(range(256)))
    blocked = tmp_path / "file"
    blocked.write_text("")
    other = tmp_path / "other_width"
    other.mkdir()
    cases = [
        (["--text", str(binary)], "--text: must be UTF-8 text"),
        (["--text", str(tmp_path / "none.txt")], "--text: must be a readable file"),
        (["--model", str(tmp_path)], "--model: must be a causal language model"),
        (["--tokens", "10000000"], "--tokens: the text gives"),
        (["--hook", "blocks.9.hook_resid_post"], "--hook: "),
        (["--drop-positions", "32"], "--drop-positions: must be from 0 to 31"),
        (["--split", "rows"], "--split: must be documents, contexts or tokens"),
        (["--out", str(blocked / "below")], "--out: must be a folder that can be written"),
    ]
    for more, message in cases:
        out = tmp_path / "never"
        assert cli.main(flags(workplace, "--out", str(out), *more)) == 2, more
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
        assert not out.exists() or list(out.iterdir()) == []


def test_an_sae_of_another_site_is_refused(workplace, tmp_path, capsys):
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class("topk")
    sae_class(cfg_class(d_in=20, d_sae=30, k=2, dtype="float32", device="cpu")).save_model(tmp_path / "sae")
    assert cli.main(flags(workplace, "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out"))) == 2
    assert "--sae: must have d_in 16 as blocks.1.hook_resid_post, got 20" in capsys.readouterr().err
    cfg = cfg_class(d_in=16, d_sae=30, k=2, dtype="float32", device="cpu")
    cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae_class(cfg).save_model(tmp_path / "block0")
    assert cli.main(flags(workplace, "--sae", str(tmp_path / "block0"), "--out", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert "--sae: must be of the site blocks.1.hook_resid_post, got one of blocks.0.hook_resid_post" in error
    assert error.count("\n") == 1


def test_the_installed_command_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "darkmatter_ext", "run", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == f"darkmatter: EXPERIMENT: must be one of {', '.join(names())}, got 'nonsense'\n"
