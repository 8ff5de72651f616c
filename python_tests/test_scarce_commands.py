"""Commands in too little memory, in a cache that cannot be written, and two at once: the same answer, or one clear line.

`DARKMATTER_SCARCE=1` (`make nightly`) takes every experiment; without it one, and `train`.
"""

import os
import signal

import pytest
import torch
from cases.children import reports
from cases.models import make_workplace
from cases.runs import SETTINGS

NAMES = ("train", *SETTINGS) if os.environ.get("DARKMATTER_SCARCE") else ("train", "decomposition")

# Where memory ends while libc or CPython itself needs some: an abort, libc's own exit, and a wait for a thread that never says
# that it has begun.
ENDED_BY_THE_SYSTEM = (-signal.SIGABRT, 127, -signal.SIGALRM)


def _runs(tmp_path, name, fault, ended_by_the_system=()):
    (tmp_path / "work").mkdir()
    arguments = (make_workplace(tmp_path / "work"), tmp_path, name, fault)
    found = reports("scarce_command", *arguments, DARKMATTER_PROGRESS="0", DARKMATTER_DEBUG="")
    for run in found:
        if run["exit"] in ended_by_the_system:
            assert run.get("room"), run
            continue
        assert not run["traceback"], run
        if run["exit"] == 0:
            assert run["same"], run
            assert run["lines"] == [], run
        else:
            assert run["exit"] == 2, run
            assert len(run["lines"]) == 1, run
            assert run["same"] is not False or name == "train", run  # a training that stopped leaves its checkpoint
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="the libraries of CUDA take more addresses than the test gives"
)
@pytest.mark.parametrize("name", NAMES)
def test_too_little_memory(name, tmp_path):
    """Below the least, nothing begins. Were it to begin, it or the system ends it; started again, it gives the numbers."""
    found = _runs(tmp_path, name, "little-memory", ENDED_BY_THE_SYSTEM)
    *below, enough = [run for run in found if "limit" in run]
    assert len(below) == 3
    assert all("the limit of address space: must be at least 4096 MiB" in run["lines"][0] for run in below)
    assert enough["exit"] == 0
    rooms = [run for run in found if "room" in run]
    least, most = rooms[0], rooms[-1]
    assert most["room"] > least["room"] > 0
    assert least["exit"] != 0
    assert any("memory" in line for run in rooms for line in run["lines"])  # torch does not say why it loads no library
    assert most["exit"] == 0
    assert all(run["exit"] == 0 for run in rooms if run["room"] == 0)  # goes on with what a failed one left


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_cannot_be_written(name, tmp_path):
    """Empty, it is told before anything is computed; with everything in it, it serves. Between, it is told or serves."""
    empty, part, whole = _runs(tmp_path, name, "read-only-cache")
    assert "DARKMATTER_CACHE: must be a folder that can be written" in empty["lines"][0]
    assert part["exit"] == 0 or "must be a folder that can be written" in part["lines"][0]
    assert whole["exit"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_at_once(name, tmp_path):
    """The second waits for the first where both would write the same state, and both give the answer."""
    found = _runs(tmp_path, name, "two-at-once")
    assert len(found) > 4
    assert all(run["exit"] == 0 for run in found)
