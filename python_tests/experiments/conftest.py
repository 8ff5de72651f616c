"""Every experiment is run once a session, by the command a user gives; the tests of an experiment read that run."""

import contextlib
import functools
import io
from pathlib import Path
from typing import NamedTuple

import pytest
from cases.runs import command

from darkmatter_ext import cli
from darkmatter_ext.report.result import Result, load_result


class Run(NamedTuple):
    """What a finished command left: its folder, its result, what it printed (on one line)."""

    folder: Path
    result: Result
    said: str


@pytest.fixture(scope="session")
def finished(workplace, tmp_path_factory):
    """`finished(experiment, *more)`: the run of an experiment with cases.runs.SETTINGS, made at the first call."""

    @functools.cache
    def run(experiment, *more):
        out, said = tmp_path_factory.mktemp(experiment), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setenv("DARKMATTER_CACHE", str(workplace / "cache"))
            assert cli.main(command(workplace, experiment, *more, "--out", str(out))) == 0
        return Run(out, load_result(out / f"{experiment}.json"), " ".join(said.getvalue().split()))

    return run


@pytest.fixture(autouse=True)
def _own_cache(own_cache):
    """No test of an experiment touches the user's cache."""
