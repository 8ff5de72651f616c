"""Files on disk: nothing half-written, folders that cannot be written, where the cache is."""

import pytest

from darkmatter_ext.runtime import storage


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
