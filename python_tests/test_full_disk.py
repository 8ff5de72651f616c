"""A disk that is full, at any moment of a command: one line, exit code not 0, nothing half-written; with room, the same result.

A limit of the size of a file stands for the disk: the system refuses to write beyond it, as it does on a full disk.
"""

import os
import re
import subprocess
import sys

import pytest
from cases.models import flags, make_workplace

from darkmatter_ext.report.result import load_result

LIMITED = (
    "import resource, sys; from darkmatter_ext import cli; limit = int(sys.argv[1]); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); sys.exit(cli.main(sys.argv[2:]))"
)
ROOM, MOST_LIMITS = 1 << 30, 6  # each takes two runs


def _run(workplace, cache, out, limit):
    environment = os.environ | {
        "DARKMATTER_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DARKMATTER_PROGRESS": "0", "COLUMNS": "200"
    }  # fmt: skip
    command = flags(workplace, "--widths", "24", "--out", str(out), experiment="decomposition")
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command],
        env=environment,
        cwd=workplace,  # at the root a child would import the sources
        capture_output=True,
        text=True,
        check=False,
    )


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "work").mkdir()
    workplace = make_workplace(tmp_path / "work")
    assert _run(workplace, tmp_path / "whole", tmp_path / "expected", ROOM).returncode == 0
    expected = load_result(tmp_path / "expected" / "decomposition.json")
    sizes = sorted({path.stat().st_size for folder in ("whole", "expected") for path in _files(tmp_path / folder)})
    limits = [max(1, size - 1) for size in sizes]  # each file would in turn be the first that does not fit
    limits = limits[:: -(-len(limits) // MOST_LIMITS)]
    told = set()
    for number, limit in enumerate(limits):
        cache, out = tmp_path / f"cache{number}", tmp_path / f"out{number}"
        done = _run(workplace, cache, out, limit)
        assert done.returncode not in (0, 1), done.stderr[-2000:]  # 1 would be a traceback
        lines = [line for line in done.stderr.splitlines() if line.startswith("darkmatter: ")]
        assert len(lines) == 1, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert "cannot be written" in lines[0], lines
        told.add(re.sub(r"[0-9a-f]{16}|\d+", "#", lines[0]))
        assert not [path for path in tmp_path.rglob("*.part") if path.exists()]
        if (out / "decomposition.json").exists():  # figures and page come after it
            assert load_result(out / "decomposition.json").numbers == pytest.approx(expected.numbers, nan_ok=True)
        assert _run(workplace, cache, out, ROOM).returncode == 0
        again = load_result(out / "decomposition.json")
        assert again.numbers == pytest.approx(expected.numbers, rel=1e-12, nan_ok=True)
    assert len(told) > 2  # several files were the one that did not fit
