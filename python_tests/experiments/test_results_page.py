"""docs/results.md is made of result files: what the script writes from two small runs."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from darkmatter_ext import experiments
from darkmatter_ext.report.result import load_result

NAMES = ("norm-test", "synthetic", "adapt")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "results_page.py"


@pytest.fixture
def page(monkeypatch, tmp_path):
    """The script run on a folder of results: its text and the folder it wrote."""
    if not SCRIPT.exists():
        pytest.skip("benchmarks/ is not beside the tests")
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def write(results):
        docs = tmp_path / "docs"
        monkeypatch.setattr(sys, "argv", ["results_page.py", str(results), "--docs", str(docs)])
        docs.mkdir(exist_ok=True)
        script.main()
        return (docs / "results.md").read_text(encoding="utf-8"), docs

    write.script = script
    return write


def test_large_arrays_stay_out_of_the_docs(finished, page, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished("norm-test").folder, results / "norm-test")
    page.script.KEPT_BYTES = 10
    _, docs = page(results)
    kept = load_result(docs / "results" / "norm-test.json")
    assert kept.arrays == {}
    assert "explored" not in kept.series


@pytest.mark.slow
def test_other_settings_have_a_page_beside_the_usual_ones(finished, page, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished("scaling").folder, results / "scaling")
    shutil.copytree(finished("scaling").folder, results / "others" / "scaling-again")
    shutil.copytree(finished("synthetic").folder, results / "others" / "synthetic-again")
    _, docs = page(results)
    text = (docs / "other_settings.md").read_text(encoding="utf-8")
    result = load_result(results / "scaling" / "scaling.json")
    rows = [line for line in text.partition("## ")[0].splitlines() if line.startswith("| ") and "model" not in line[:8]]
    assert len(rows) == 1 + 2 * len(
        result.series["law"]
    )  # the line below the heading; the usual result, then the other
    assert rows[1 : len(rows) // 2 + 1] == rows[len(rows) // 2 + 1 :]
    widest = result.series["law"][-1]
    assert f"{result.numbers[f'{widest}/fvu_nonlinear']:.3f}" in rows[-1]
    for name, figure in (("scaling-again", "scaling_lines.png"), ("synthetic-again", "synthetic_noise.png")):
        assert f"(figures/{name}/{figure})" in text
        assert (docs / "figures" / name / figure).is_file()
        assert (docs / "results" / f"{name}.json").is_file()


def test_every_sentence_and_cell_is_of_the_result(finished, page, workplace, tmp_path):
    results = tmp_path / "results"
    for name in NAMES:
        shutil.copytree(finished(name).folder, results / name)
    text, docs = page(results)
    for name in NAMES:
        result = load_result(results / name / f"{name}.json")
        own = experiments.section(result)
        assert f"## {name}: {experiments.about(name)}" in text
        assert all(f"- {sentence}" in text for sentence in own.reading)
        assert all(cell in text for row in own.table.rows for cell in row)
        kept = load_result(docs / "results" / f"{name}.json")
        assert kept.numbers == result.numbers
        assert kept.arrays.keys() == result.arrays.keys()  # small ones stay
        assert str(workplace) not in str(kept.series)  # no folder of the machine that made it
    assert str(workplace) in str(load_result(results / "adapt" / "adapt.json").series)
    assert f"`{experiments.command(finished('synthetic').result)}`" in text
    assert "--noise-seeds 2" in text
    assert {path.name for path in (docs / "figures").glob("synthetic*")} == {
        "synthetic_noise.png", "synthetic_ablation.png",
    }  # fmt: skip
    assert "No result file of this version: decomposition, scaling" in text
    with pytest.raises(SystemExit):
        page(tmp_path / "none")
