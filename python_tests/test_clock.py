"""The clock goes back and forward between and during runs: the numbers stay, and what was kept is gone on from.

libfaketime sets the clock of a process (Debian: libfaketime). The monotonic clock, which no one can set, stays as it is.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.children import TESTS, environment_of_children
from cases.runs import command

from darkmatter_ext.report.result import load_result

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
LONG_AGO, NOT_YET, FAR_AHEAD = "@1970-01-02 00:00:00", "@2030-01-01 00:00:00", "@2100-01-01 00:00:00"
PROGRAM = "import sys; from darkmatter_ext.cli import main; sys.exit(main(sys.argv[1:]))"
NAME = "decomposition"


@pytest.fixture
def start(workplace, tmp_path):
    """`start(clock, cache, out)`: a process that runs an experiment; `clock` is a file that says what time it is, or None."""

    def run(clock, cache, out):
        more = {"DARKMATTER_CACHE": str(tmp_path / cache), "DARKMATTER_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
        if clock:
            more |= {"LD_PRELOAD": str(FAKETIME[-1]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
            more |= {"DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}  # a clock that is set changes neither
        words = command(workplace, NAME, "--out", str(tmp_path / out))
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], env=environment_of_children(**more), cwd=TESTS,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return run


def _numbers(process, out):
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said[-2000:]
    result = load_result(out / f"{NAME}.json")
    return {key: repr(value) for key, value in result.numbers.items()}, result.provenance["created"]


def _wait_for(process, folder):
    while process.poll() is None and not any(folder.glob("*")):
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime, found none")
def test_a_clock_that_is_set_changes_no_number(start, tmp_path):
    expected, created = _numbers(start(None, "usual", "usual"), tmp_path / "usual")
    assert created > "2025"
    clock = tmp_path / "clock"
    for before, after, year in ((NOT_YET, LONG_AGO, "1970"), (LONG_AGO, FAR_AHEAD, "2100")):  # set during a run
        clock.write_text(before)
        process = start(clock, year, year)
        _wait_for(process, tmp_path / year / "activations")
        clock.write_text(after)
        own, created = _numbers(process, tmp_path / year)
        assert own == expected
        assert created.startswith(year)
    clock.write_text(FAR_AHEAD)
    process = start(clock, "shared", "shared")
    _wait_for(process, tmp_path / "shared/saes")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for now in (LONG_AGO, NOT_YET):  # set between runs: the first goes on, the second finds all of it kept
        clock.write_text(now)
        own, _ = _numbers(start(clock, "shared", now[1:5]), tmp_path / now[1:5])
        assert own == expected, now
