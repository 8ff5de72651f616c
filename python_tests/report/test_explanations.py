"""Explanations from files of both forms: read as they stand, given to the right SAE, refused in one line."""

import gzip
import json

import pytest
from cases.explored import explored_result

from darkmatter_ext.report.explanations import Explanation, explained_results, read_explanations
from darkmatter_ext.runtime.inputs import InputError

PLAIN = {"7": "dates", "9": {"explanation": "rivers", "score": 0.75}, "11": {"explanation": "no score"}}
WANTED = {7: Explanation("dates"), 9: Explanation("rivers", 0.75), 11: Explanation("no score")}


def _file(folder, content, name="explanations.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_plain_form_and_neuronpedias(tmp_path):
    assert read_explanations(_file(tmp_path, PLAIN), "s", 64) == WANTED
    rows = [
        {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "7", "description": "dates"},
        {"index": 9, "description": "rivers"},
        {"index": "9", "description": "second"},
    ]
    wanted = {7: Explanation("dates"), 9: Explanation("rivers")}
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "batch-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_explanations(_file(tmp_path, rows), "s", 64) == wanted
    assert read_explanations(_file(tmp_path, lines), "s", 64) == wanted
    assert read_explanations(tmp_path / "batch-0.jsonl.gz", "s", 64) == wanted
    assert read_explanations(_file(tmp_path, rows[0]), "s", 64) == {7: Explanation("dates")}  # a file of one line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON, got"),
        ("[1, 2]", "must be an object of latents, or objects with index and description, got other JSON in"),
        ('"text"', "must be an object of latents"),
        ({"64": "x"}, "must be of latents 0 to 63 of s, got '64' in"),
        ({"-1": "x"}, "must be of latents 0 to 63 of s, got '-1'"),
        ({"seven": "x"}, "must be of latents 0 to 63 of s, got 'seven'"),
        ([{"index": True, "description": "x"}], "must be of latents 0 to 63 of s, got True"),
        ({"7": 3}, "must give latent 7 a text, or explanation and a finite score, got 3"),
        ({"7": {"explanation": "x", "score": "high"}}, "must give latent 7 a text, or explanation and a finite score"),
        ('{"7": {"explanation": "x", "score": NaN}}', "must give latent 7 a text, or explanation and a finite score"),
        ({"7": {"text": "x"}}, "must give latent 7 a text, or explanation and a finite score"),
    ],
)
def test_bad_files_are_refused_in_a_line(tmp_path, content, message):
    with pytest.raises(InputError) as refused:
        read_explanations(_file(tmp_path, content), "s", 64)
    assert str(refused.value).startswith(f"explanations: {message}")
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"explanations: must be a file, got .*none.json \(No such file"):
        read_explanations(tmp_path / "none.json", "s", 64)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="explanations: must be a file, got"):
        read_explanations(tmp_path / "x.gz", "s", 64)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="must be UTF-8 text"):
        read_explanations(tmp_path / "x.json", "s", 64)


def test_an_sae_is_named_where_there_are_several(tmp_path):
    result, path = explored_result(), _file(tmp_path, PLAIN | {"63": "kept"})
    (found,) = explained_results([result], [f"sae-1={path}"])
    first, second = found.series["explored"]["saes"]
    assert "explanations" not in first
    assert second["explanations"] == {str(n): list(one) for n, one in WANTED.items()} | {"63": ["kept", None]}
    assert second["explained_by"] == "explanations.json"
    assert "explanations" not in result.series["explored"]["saes"][1]  # what was given is as it was
    (alone,) = explained_results([explored_result(saes=1)], [str(path)])
    assert alone.series["explored"]["saes"][0]["explanations"]["7"] == ["dates", None]
    with pytest.raises(InputError, match="explanations: must be SAE=FILE with SAE one of sae-0, sae-1, got"):
        explained_results([result], [str(path)])
    with pytest.raises(
        InputError, match=r"explanations: must come with a result that keeps latents \(page_megabytes\)"
    ):
        explained_results([], [str(path)])
    other = explored_result()
    other.series["explored"]["saes"][1]["folder"] = "saes/other"
    with pytest.raises(InputError, match="must be of one SAE, got sae-1, which is another in each of 2 results"):
        explained_results([result, other], [f"sae-1={path}"])
    twice = explained_results([result, explored_result()], [f"sae-1={path}"])
    assert all("explanations" in one.series["explored"]["saes"][1] for one in twice)


def test_latents_that_are_not_kept_are_left_out(tmp_path):
    result = explored_result(saes=1)
    result.arrays["page/sae0/latent/number"] = result.arrays["page/sae0/latent/number"][:8]
    (found,) = explained_results([result], [str(_file(tmp_path, PLAIN))])
    assert list(found.series["explored"]["saes"][0]["explanations"]) == ["7"]
