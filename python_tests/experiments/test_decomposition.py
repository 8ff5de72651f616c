"""`decomposition` from the command line: files, numbers that hang together, runs from the cache and from given SAEs."""

import pytest
import torch
from cases.models import flags

from darkmatter_ext import cli
from darkmatter_ext.report.result import load_result


def test_a_run_writes_result_figures_and_report(finished):
    out, result, _ = finished("decomposition")
    assert {path.name for path in out.iterdir()} == {
        "decomposition.json", "decomposition.npz", "decomposition_fvu.png", "decomposition_norm_test.png",
        "decomposition_per_token.png", "report.html",
    }  # fmt: skip
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


def test_a_second_run_gives_the_same_numbers_from_the_cache(finished, workplace, monkeypatch, tmp_path):
    from darkmatter_ext.measurement import site_saes

    first = finished("decomposition").result
    monkeypatch.setattr(site_saes, "train", None)  # training again would fail
    assert cli.main(flags(workplace, "--out", str(tmp_path))) == 0
    assert load_result(tmp_path / "decomposition.json").numbers == first.numbers


def test_saes_of_a_run_can_be_measured_by_folder(finished, workplace, capsys, tmp_path):
    folders = [sae["folder"] for sae in finished("decomposition").result.series["saes"]]
    numbers = []
    for more in ([], ["--store", "True"]):
        assert cli.main(flags(workplace, "--sae", *folders, *more, "--out", str(tmp_path))) == 0
        numbers.append(load_result(tmp_path / "decomposition.json").numbers)
    streamed, stored = numbers
    assert stored["tokens/sae_training"] == 0
    assert "tokens/sae_training" not in streamed
    assert {name for name in stored if name.startswith("tokens/")} > {name for name in streamed if "tokens/" in name}
    assert streamed == pytest.approx({name: stored[name] for name in streamed}, rel=1e-4)
    assert "wrote" in capsys.readouterr().out


def test_figures_and_report_are_made_again_from_the_file(finished, tmp_path):
    result = str(finished("decomposition").folder / "decomposition.json")
    assert cli.main(["figure", result, "--out", str(tmp_path / "figures"), "--kind", "pdf"]) == 0
    assert len(list((tmp_path / "figures").glob("*.pdf"))) == 3
    assert cli.main(["report", result, "--out", str(tmp_path / "page" / "r.html")]) == 0
    assert (tmp_path / "page" / "r.html").stat().st_size > 10_000
