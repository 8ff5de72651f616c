"""A Python of its own for what a process decides once: its instruction set, what its imports load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]  # where children start


def environment_of_children(**more: str) -> dict[str, str]:
    """This process's environment and imports, wherever the package that is tested comes from, and `more`."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])} | more


def reports(case: str, *arguments: object, seconds: float | None = None, **environment: str) -> list[Any]:
    """The JSON lines that `python -m cases.CASE` prints, on one thread. It must end well: a crash has no report."""
    done = subprocess.run(
        [sys.executable, "-m", f"cases.{case}", *map(str, arguments)],
        env=environment_of_children(OMP_NUM_THREADS="1", **environment),
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_python(code: str, *, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs `code` with the imports of this process, `environment` added to its own.

    It starts in the folder of the tests. `python -c` looks in the working directory first: at the root
    of the repository that finds the sources, which have no compiled ops, before the installed package.
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment_of_children(**environment),
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert run.returncode == 0, run.stderr
    return run
