"""Files on disk: nothing half-written, folders that cannot be written, where the cache is."""

import os

import pytest

from darkmatter_ext.runtime import storage
from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.storage import atomic_file


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path):

    def stopped_half_way():
        with storage.atomic_folder(tmp_path / "f") as part:
            (part / "one").write_text("1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped_half_way()
    assert list(tmp_path.iterdir()) == []
    with storage.atomic_folder(tmp_path / "f") as part:
        (part / "one").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "one").read_text() == "1"


def test_an_output_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: must be a folder that can be written"):
        storage.require_writable_folder("out", tmp_path / "file" / "below")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "own"))
    assert storage.cache_dir("saes") == tmp_path / "own" / "saes"
    monkeypatch.delenv("DARKMATTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_dir() == tmp_path / "darkmatter_ext"


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A rename would put a file in the place of a device, a pipe or a folder: /dev/null was one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "pipe", tmp_path / "folder"):
        with pytest.raises(InputError, match="out: must be a file that can be replaced, got"), atomic_file(target):
            pytest.fail("nothing is written")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
