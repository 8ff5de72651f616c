"""Damaged files of every kind that is read: an answer or one line, in bounded time and memory, and nothing is written.

`DARKMATTER_FUZZ=100000` (`make fuzz`) is how many files in all; without it a few of each kind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases.readers import READERS

FEW = 12  # of each kind, where no number is asked for
TESTS = Path(__file__).parents[1]  # children start there: at the root they would import the sources


def _count():
    wanted = int(os.environ.get("DARKMATTER_FUZZ", "0"))
    return max(FEW, -(-wanted // len(READERS)))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_told_in_one_line(reader, tmp_path):
    command = [sys.executable, "-m", "cases.damage", reader, "0", str(_count())]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "DARKMATTER_CACHE": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]  # a crash has no report
    wrong = json.loads(done.stdout)
    assert wrong == [], json.dumps(wrong[:5], indent=1)
