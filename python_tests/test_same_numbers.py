"""The yardstick of a reorganisation: what counts as the same number, and that no experiment is left out."""

import json

import numpy as np
import pytest
import same_numbers

from darkmatter_ext import experiments

NAME = "decomposition"


def _written(folder, numbers, column, **series):
    own = folder / NAME
    own.mkdir(parents=True)
    np.savez(own / "result.npz", losses=column)
    content = {"numbers": numbers, "series": series, "arrays": "result.npz"}
    (own / "result.json").write_text(json.dumps(content))


def _compared(tmp_path, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["same_numbers.py", "compare", str(tmp_path / "a"), str(tmp_path / "b"), *more])
    return same_numbers.main()


def test_every_experiment_is_run():
    assert {run.split()[0] for run in same_numbers.RUNS.values()} == set(experiments.names())


LOSSES = np.float32([1, 2])
BEFORE = {"fvu": 0.5, "none": None, "zero": 1e-17}


@pytest.mark.parametrize(
    ("after", "column", "points", "code"),
    [
        (BEFORE, LOSSES, [1, 2], 0),
        (BEFORE | {"fvu": 0.5 + 1e-13, "zero": -1e-16}, LOSSES * np.float32(1 + 2e-7), [1, 2], 0),
        (BEFORE | {"fvu": 0.5 + 1e-11}, LOSSES, [1, 2], 1),
        (BEFORE | {"none": 0.0}, LOSSES, [1, 2], 1),
        (BEFORE | {"more": 0.0}, LOSSES, [1, 2], 1),
        (BEFORE, LOSSES * np.float32(1 + 1e-6), [1, 2], 1),
        (BEFORE, LOSSES, [1, 3], 1),
        (BEFORE, LOSSES, [1], 1),
    ],
)
def test_what_is_the_same(tmp_path, monkeypatch, after, column, points, code):
    _written(tmp_path / "a", BEFORE, LOSSES, points=[1, 2], title="one")
    _written(tmp_path / "b", after, column, points=points, title="other")
    assert _compared(tmp_path, monkeypatch) == code


def test_arrays_of_several_dimensions_are_compared_and_names_are_not(tmp_path, monkeypatch):
    for side, last, name in (("a", 4.0, "x"), ("b", 4.0, "y"), ("c", 5.0, "x")):
        _written(tmp_path / side, BEFORE, np.array([[1.0, 2.0], [3.0, last]]), points=[1], title=name)
        np.savez(tmp_path / side / NAME / "result.npz", losses=[[1.0, 2.0], [3.0, last]], names=[name])
    assert _compared(tmp_path, monkeypatch) == 0
    (tmp_path / "b").rename(tmp_path / "equal")
    (tmp_path / "c").rename(tmp_path / "b")
    assert _compared(tmp_path, monkeypatch) == 1


def test_renamed_and_mended_keys_are_excused(tmp_path, monkeypatch, capsys):
    _written(tmp_path / "a", {"old/fvu": 0.5, "count": 3.0}, LOSSES)
    _written(tmp_path / "b", {"new/fvu": 0.5, "count": 4.0}, LOSSES)
    assert _compared(tmp_path, monkeypatch) == 1
    monkeypatch.setitem(same_numbers.RENAMED, r"^(\w+/numbers)/old/", (r"\1/new/", "a better name"))
    assert _compared(tmp_path, monkeypatch) == 1
    capsys.readouterr()
    monkeypatch.setitem(same_numbers.MENDED, r"/count$", "counted one too few")
    assert _compared(tmp_path, monkeypatch) == 0
    assert "3 equal, 0 differ, 0 missing, 0 new, 1 mended" in capsys.readouterr().out


def test_a_run_without_a_result_is_told(tmp_path, monkeypatch):
    assert _compared(tmp_path, monkeypatch) == 1
    _written(tmp_path / "a", BEFORE, LOSSES)
    assert _compared(tmp_path, monkeypatch) == 1
