"""The command line: what it lists and plans, and every bad input: one line, exit code 2, nothing half-written."""

import json
import subprocess
import sys

import pytest
from cases.explored import explored_result, packed_head
from cases.models import flags, saved_sae

import darkmatter_ext as dm
from darkmatter_ext import cli
from darkmatter_ext.experiments import names
from darkmatter_ext.measurement.error import NORM_TARGETS

NUMBERS = {
    f"sae-0/{key}": 0.5
    for key in (
        "l0",
        "fvu",
        "fvu_nonlinear",
        "linear_share",
        "r2_vec",
        *(f"r2_norm/{target}" for target in NORM_TARGETS),
    )
}

pytestmark = pytest.mark.usefixtures("own_cache")


def test_dry_run_prints_the_plan_and_does_nothing(workplace, capsys, tmp_path):
    assert cli.main(flags(workplace, "--dry-run", "--seed", "7", "--out", str(tmp_path / "no"))) == 0
    plan = capsys.readouterr().out
    assert "16000 tokens in contexts of 32" in plan
    assert "seed 7" in plan
    assert "48 latents, k 4, 30 steps" in plan
    assert not (tmp_path / "no").exists()


@pytest.mark.runs
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
    (["run", "decomposition", "--sae-dtype", "bfloat16"], "--sae-dtype: must be float32 for SAEs trained here"),
    (["run", "decomposition", "--frozen", "all"], "--frozen: must be one of decoder, encoder, soft-decoder, got 'all'"),
    (
        ["run", "decomposition", "--architectures", "relu"],
        "--architectures: must be one of topk, batchtopk, jumprelu, matryoshka",
    ),
    (["run", "decomposition", "--sae-seeds", "0"], "--sae-seeds: must be at least 1, got 0"),
    (["demo", "--speed", "9"], "unrecognized arguments: --speed 9"),
    (["figure", "/nowhere.json"], "RESULT: must be a result file, got /nowhere.json"),
    (["report"], "the following arguments are required: RESULT"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: value[:50] if isinstance(value, str) else None
)
def test_bad_arguments_give_one_line_and_exit_code_2(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(arguments, message)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.runs
def test_bad_files_are_told_before_or_without_a_result(workplace, tmp_path, refused):
    binary = tmp_path / "tokens.bin"
    binary.write_bytes(bytes(range(256)))
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases = [
        (["--text", str(binary)], "--text: must be UTF-8 text"),
        (["--text", str(tmp_path / "none.txt")], "--text: must be a readable file"),
        (["--model", str(tmp_path)], "--model: must be a causal language model"),
        (["--tokens", "10000000"], "--tokens: the text gives"),
        (["--hook", "blocks.9.hook_resid_post"], "--hook: "),
        (["--drop-positions", "32"], "--drop-positions: must be from 0 to 31"),
        (["--device-map", "auto"], "--device-map: must be left out where activations are stored"),
        (["--split", "rows"], "--split: must be documents, contexts or tokens"),
        (["--out", str(blocked / "below")], "--out: must be a folder that can be written"),
    ]
    for more, message in cases:
        out = tmp_path / "never"
        refused(flags(workplace, "--out", str(out), *more), message)
        assert not out.exists() or list(out.iterdir()) == []


def test_an_sae_of_another_site_is_refused(workplace, tmp_path, refused):
    for sae, message in (
        (saved_sae(tmp_path / "sae", d_in=20), "--sae: must have d_in 16 as blocks.1.hook_resid_post, got 20"),
        (
            saved_sae(tmp_path / "block0", hook_name="blocks.0.hook_resid_post"),
            "--sae: must be of the site blocks.1.hook_resid_post, got one of blocks.0.hook_resid_post",
        ),
    ):
        refused(flags(workplace, "--sae", sae, "--out", str(tmp_path / "out")), message)


@pytest.mark.runs
def test_report_opens_the_page_when_asked(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(cli.webbrowser, "open", opened.append)
    result = explored_result()
    result.numbers.update(NUMBERS)
    result.series["saes"] = [{"name": "sae-0", "d_sae": 64}]
    path = str(result.save(tmp_path / "r.json"))
    page = tmp_path / "page.html"
    assert cli.main(["report", path, "--out", str(page)]) == 0
    assert opened == []
    assert cli.main(["report", path, path, "--out", str(page), "--open"]) == 0
    assert opened == [page.as_uri()]
    assert page.read_text().count('class="packed"') == 2
    assert capsys.readouterr().out == f"{page}\n{page}\n"
    assert dm.page(result, path, out=tmp_path / "other.html", open=True) == tmp_path / "other.html"
    assert opened[1:] == [(tmp_path / "other.html").as_uri()]
    assert (tmp_path / "other.html").read_text() == page.read_text()
    with pytest.raises(ValueError, match="results: must be at least one, got none"):
        dm.page()


@pytest.mark.runs
def test_report_takes_explanations_and_results_alone(tmp_path, capsys, refused):
    result = explored_result(saes=1)
    result.numbers.update(NUMBERS)
    result.series["saes"] = [{"name": "sae-0", "d_sae": 64}]
    path, page, said = result.save(tmp_path / "r.json"), tmp_path / "page.html", tmp_path / "said.json"
    said.write_text('{"7": "rivers"}')
    assert cli.main(["report", str(path), "--out", str(page), "--explanations", str(said)]) == 0
    assert packed_head(page)["saes"][0]["explanations"] == {"7": ["rivers", None]}
    said.write_text('{"99": "rivers"}')
    refused(
        ["report", str(path), "--out", str(page), "--explanations", f"sae-0={said}"],
        "--explanations: must be of latents 0 to 63 of sae-0, got '99' in",
    )
    (tmp_path / "r.npz").unlink()
    assert cli.main(["report", str(path), "--out", str(page)]) == 0
    assert "r.npz, kept beside this result, was not there" in page.read_text()
    assert 'class="packed"' not in page.read_text()
    assert list(tmp_path.glob("*.png")) == []  # figures are inside


@pytest.mark.runs
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
