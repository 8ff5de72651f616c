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
