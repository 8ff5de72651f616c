"""Results and files: round trip, nothing half-written, errors in one line."""

import json
import math

import pytest

from darkmatter_ext.report.result import Result, load_result


def _result(**changes):
    fields = {"experiment": "decomposition", "config": {"seed": 3}, "numbers": {"a": 0.5, "b": math.nan}}
    return Result(**(fields | changes))


def test_a_result_round_trips_and_nan_becomes_null(tmp_path):
    path = _result().save(tmp_path / "r.json")
    assert json.loads(path.read_text())["numbers"] == {"a": 0.5, "b": None}
    loaded = load_result(path)
    assert loaded.numbers["a"] == 0.5
    assert math.isnan(loaded.numbers["b"])
    assert loaded.seed == 3


def test_arrays_go_beside_the_json_and_come_back(tmp_path):
    import numpy as np

    columns = {"kl": np.array([0.1, np.nan], dtype=np.float32), "token": np.array([5, 9])}
    path = _result(arrays=columns).save(tmp_path / "r.json")
    assert {entry.name for entry in tmp_path.iterdir()} == {"r.json", "r.npz"}
    loaded = load_result(path)
    assert set(loaded.arrays) == {"kl", "token"}
    for name, column in columns.items():
        np.testing.assert_array_equal(loaded.arrays[name], column)
        assert loaded.arrays[name].dtype == column.dtype
    assert load_result(_result().save(tmp_path / "none.json")).arrays == {}
    assert load_result(path, alone=True).arrays.keys() == loaded.arrays.keys()
    (tmp_path / "r.npz").rename(tmp_path / "kept.npz")
    alone = load_result(path, alone=True)
    assert alone.arrays == {}
    assert alone.notes[-1].startswith("r.npz, kept beside this result, was not there")
    (tmp_path / "kept.npz").rename(tmp_path / "r.npz")
    for spoil in (lambda npz: npz.write_bytes(b"no"), lambda npz: npz.unlink()):
        spoil(tmp_path / "r.npz")
        with pytest.raises(ValueError, match="RESULT: must have its per-token arrays beside it") as caught:
            load_result(path)
        assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_result_and_no_parts(tmp_path):
    path = _result().save(tmp_path / "r.json")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        _result(numbers={"a": object()}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a result file"),
        ("{", "must be a JSON result file"),
        ("[]", "must be a result of format 1"),
        ('{"format": 99}', "must be a result of format 1"),
        ('{"format": 1, "surprise": 2}', "must be a result file"),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_result(path)
    assert "\n" not in str(caught.value)


def test_a_notebook_shows_headlines_and_notes():
    numbers = {"a/fvu": 0.25, "a/l0": math.nan, "b/fvu": 0.5}
    made = _result(
        numbers=numbers, series={"saes": [{"name": "a"}, {"name": "b"}]}, notes=["few <tokens>"]
    )._repr_html_()
    assert "<td>a</td><td>–</td><td>0.25</td>" in made
    assert "<td>b</td><td>–</td><td>0.5</td>" in made
    assert "few &lt;tokens&gt;" in made
    assert "<table>" not in _result()._repr_html_()
