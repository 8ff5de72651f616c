"""Shared by all tests: a quiet deterministic hypothesis, which package is tested, tiers, how tests share processes."""

import gc
import os
import re
from pathlib import Path

import hypothesis
import pytest
import torch

# Derandomized: the same examples in every run, so a red test is red for everyone. Shared machines make deadlines noise.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    """`python -m pytest` at the root imports the source folder; without compiled ops in it, say so instead of 500 errors."""
    import darkmatter_ext

    package = Path(darkmatter_ext.__file__).parent
    if not (package / "libdarkmatter_cpu.so").exists():
        pytest.exit(
            f"darkmatter_ext: the tests need the installed package, got {package} without compiled ops; "
            "run `pytest`, not `python -m pytest`, after `make install`",
            returncode=2,
        )
    if (wanted := os.environ.get("DARKMATTER_SANITIZE")) and f"sanitize/{wanted}" not in str(package):
        pytest.exit(
            f"darkmatter_ext: the tests need the build with the {wanted} sanitizer, got {package}", returncode=2
        )


os.environ.setdefault("DARKMATTER_PROGRESS", "0")  # tests read what a command says
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as processors: with a pool of threads in each they would wait for each other. Children inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items) -> None:
    """Mark what reads the run of an experiment; the other tests that take seconds have the mark `runs` where they stand."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker("runs")


def _shares(nodeid: str) -> str:
    """What the tests of one process share: the run of an experiment, else the fixtures of a file."""
    path, _, test = nodeid.partition("::")
    if "/fuzz/" in path or path.endswith("test_killed_commands.py"):  # each starts a process of its own, for minutes
        return nodeid
    if "/experiments/" not in path:
        return path
    of_each = re.search(r"\[([a-z-]+)\]", test) if path.endswith("test_every_experiment.py") else None
    return of_each[1] if of_each else Path(path).stem.removeprefix("test_").replace("_", "-")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out tests by what they share. `--dist loadgroup` would read it from ids, which pytest 9.2 does not let it change."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _shares(nodeid)

    return BySharing(config, log)


def pytest_collection_finish() -> None:
    """What the libraries and the collection left in memory stays: looking for garbage in it takes a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def two_threads():
    """Two torch threads, whatever the machine has; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A small language model and a text, made once for all modules (see cases.models)."""
    from cases.models import make_workplace

    return make_workplace(tmp_path_factory.mktemp("site"))


@pytest.fixture
def own_cache(workplace, monkeypatch):
    """The cache folder beside that model."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(workplace / "cache"))


@pytest.fixture
def refused(capsys):
    """Asserts that a command is refused: exit code 2, one line on stderr that holds the message, and nothing else said."""
    from darkmatter_ext import cli

    def check(arguments, message):
        capsys.readouterr()
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert said.err.count("\n") == 1, said.err
        assert said.out == "", said.out

    return check
