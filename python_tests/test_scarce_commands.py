"""Commands in too little memory, in a cache that cannot be written, and two at once: the same answer, or one clear line.

`DARKMATTER_SCARCE=1` (`make nightly`) takes every experiment; without it one, and `train`.
"""

import json
import os
import subprocess
import sys

import pytest
from cases.children import TESTS, environment_of_children
from cases.models import make_workplace
from cases.runs import SETTINGS

NAMES = ("train", *SETTINGS) if os.environ.get("DARKMATTER_SCARCE") else ("train", "decomposition")


def _runs(tmp_path, name, fault):
    (tmp_path / "work").mkdir()
    workplace = make_workplace(tmp_path / "work")
    command = [sys.executable, "-m", "cases.scarce_command", str(workplace), str(tmp_path), name, fault]
    environment = environment_of_children(OMP_NUM_THREADS="1", DARKMATTER_PROGRESS="0", DARKMATTER_DEBUG="")
    done = subprocess.run(
        command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for run in found:
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
@pytest.mark.parametrize("name", NAMES)
def test_too_little_memory(name, tmp_path):
    found = _runs(tmp_path, name, "little-memory")
    least, most = found[0], found[-1]
    assert most["room"] > least["room"] > 0
    assert least["exit"] != 0
    assert any("memory" in line for run in found for line in run["lines"])  # torch does not say why it loads no library
    assert most["exit"] == 0
    assert all(run["exit"] == 0 for run in found if run["room"] == 0)  # goes on with what a failed one left


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
