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


def test_a_stamp_is_of_what_is_in_a_file_not_of_the_clock(tmp_path):
    """Weights of one shape have one size; a copy, an archive or a clock set back gives them one time too."""
    long_ago = (10**9, 10**9)
    (tmp_path / "sae").mkdir()
    for name, size in (("cfg.json", 20), ("weights", 3 * storage.SMALL_FILE)):
        (tmp_path / "sae" / name).write_bytes(bytes(size))
        os.utime(tmp_path / "sae" / name, (2 * 10**9, 2 * 10**9))  # the newest there is
    stamps = {storage.stamp(tmp_path / "sae")}
    assert storage.stamp(tmp_path / "sae") in stamps
    for file, size in (("cfg.json", 20), ("weights", 3 * storage.SMALL_FILE)):
        for content in (b"\1" * size, b"\2" * size):
            (tmp_path / "sae" / file).write_bytes(content)
            os.utime(tmp_path / "sae" / file, long_ago)
            stamps.add(storage.stamp(tmp_path / "sae"))
            stamps.add(storage.stamp(tmp_path / "sae" / file))
    assert len(stamps) == 9
    (tmp_path / "sae" / "weights").rename(tmp_path / "sae" / "other")
    assert storage.stamp(tmp_path / "sae") not in stamps


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_has_a_stamp(tmp_path):
    (tmp_path / "secret").write_text("1")
    (tmp_path / "secret").chmod(0)
    assert storage.stamp(tmp_path) == storage.stamp(tmp_path)
