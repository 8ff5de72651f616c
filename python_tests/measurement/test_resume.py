"""Runs killed by SIGKILL and started again, damaged and foreign checkpoints, a full disk, many processes, a dead one."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.children import TESTS, environment_of_children, reports
from cases.interrupted_run import SETTINGS
from cases.measured import HOOKS, measure, numbers, open_caches, saes, write_caches

from darkmatter_ext.measurement import engine
from darkmatter_ext.measurement.token_table import TokenTable, read_tokens
from darkmatter_ext.runtime.checkpoint import CheckpointFolder

SCRIPT = ("-m", "cases.interrupted_run")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    write_caches(folder)
    return folder


@pytest.mark.slow
def test_killed_at_every_read_and_every_write(caches, tmp_path):
    moments = ["after:27", *(f"read:{i}" for i in range(1, 22))]
    moments += [f"{kind}:{i}" for kind in ("before", "after") for i in range(1, 52, 3)]
    moments += [f"flush:{i}" for i in range(1, 34, 3)]
    undisturbed, *killed = reports("interrupted_run", "many", caches, tmp_path, "none:0", *moments, seconds=600)
    assert undisturbed["status"] == 0
    assert len(killed) == len(moments)
    for run in killed:
        assert run["status"] == -signal.SIGKILL, run["moment"]  # it was killed, where it was meant to be
        assert run["result"] == undisturbed["result"], run["moment"]  # to the last bit, the table included


@pytest.fixture(scope="module")
def stopped_once(caches, tmp_path_factory):
    """A run that stopped in the middle of its second sweep."""
    source, folder = open_caches(caches), tmp_path_factory.mktemp("stopped") / "run"

    class Stopping:
        left = 15

        def __getattr__(self, name):
            return getattr(source, name)

        def read(self, which):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return source.read(which)

    with pytest.raises(KeyboardInterrupt):
        measure(Stopping(), saes(), SETTINGS, folder=folder)
    return source, folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it, with its source."""
    source, folder = stopped_once
    return source, Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.mark.runs
def test_a_changed_configuration_is_refused_by_name(stopped):
    source, folder = stopped
    changed = dataclasses.replace(SETTINGS, fit_fraction=0.5)
    with pytest.raises(ValueError, match=r"checkpoint: must hold a run of this configuration") as caught:
        measure(source, saes(), changed, folder=folder)
    assert "fit_fraction 0.6 there, 0.5 here" in str(caught.value)
    with pytest.raises(ValueError, match=r"checkpoint: .* with saes "):
        measure(source, saes()[1:], SETTINGS, folder=folder)
    with pytest.raises(ValueError, match=r"with text 'a' there|with text None there, 'b' here"):
        measure(source, saes(), SETTINGS, folder=folder, config={"text": "b"})
    measure(
        source, saes(), dataclasses.replace(SETTINGS, checkpoint_seconds=9.0), folder=folder
    )  # not part of the result


def test_sums_of_an_older_version_are_not_gone_on_from(stopped, monkeypatch):
    """What a state holds has changed since: its sums would be read as others."""
    source, folder = stopped
    monkeypatch.setattr(engine, "SUMS_VERSION", engine.SUMS_VERSION + 1)
    with pytest.raises(
        ValueError, match=r"checkpoint: must hold a run of this configuration.* sums_version \d there, \d here"
    ):
        measure(source, saes(), SETTINGS, folder=folder)


def test_another_number_of_processes_is_refused(stopped):
    _, folder = stopped
    config = json.loads((folder / "run.json").read_text())["config"]
    with pytest.raises(ValueError, match=r"nproc_per_node: must stay what the run was started with, got 2 processes"):
        CheckpointFolder(folder, 0, 2).start(config)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "pointer", "run"])
def test_a_damaged_checkpoint_is_told_and_nothing_is_deleted(stopped, damage):
    source, folder = stopped
    path = next(folder.glob("state-*.safetensors"))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    elif damage == "pointer":
        next(folder.glob("state-*.json")).write_text("{half")
    else:
        (folder / "run.json").write_text("")
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(RuntimeError, match=r"checkpoint: .* is damaged .* nothing was deleted") as caught:
        measure(source, saes(), SETTINGS, folder=folder)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.rglob("*")) == before


@pytest.mark.runs
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(stopped, tmp_path):
    """A limit on file sizes stands in for the disk: the system refuses the write with the same kind of error."""
    source, folder = stopped
    expected = numbers(measure(source, saes(), SETTINGS, folder=tmp_path / "whole"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(
            OSError, match=r"checkpoint: .* cannot be written .*what was saved before is kept"
        ) as caught:
            measure(source, saes(), SETTINGS, folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert numbers(measure(source, saes(), SETTINGS, folder=folder)) == expected


def test_a_missing_part_of_the_table_is_told(tmp_path):
    table = TokenTable(tmp_path)
    for start in (0, 4):
        table.add({"context": torch.arange(start, start + 4), "position": torch.zeros(4)})
        table.flush()
    table.resume(1)  # the second part was written after the checkpoint
    assert read_tokens(tmp_path)["context"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="a part is missing"):
        table.resume(2)


def _torchrun(n, caches, folder, result, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--master-port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *SCRIPT, "one", str(caches), str(folder),
               str(result)]  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
        env=environment_of_children(OMP_NUM_THREADS="1", **environment),
        timeout=300,
    )


def _same_to_rounding(result, expected):
    for key, value in expected["numbers"].items():
        assert result["numbers"][key] == pytest.approx(value, rel=1e-7, abs=1e-9), key
    for hook in HOOKS:
        for name, column in expected["rows"][hook].items():
            found = torch.tensor(result["rows"][hook][name], dtype=torch.float64)
            torch.testing.assert_close(found, torch.tensor(column, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, *SCRIPT, "one", str(caches), str(folder / "run"), str(folder / "result.json")]
    subprocess.run(command, check=True, cwd=TESTS, env=environment_of_children(OMP_NUM_THREADS="1"), timeout=300)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_share_the_work_and_agree_with_one(caches, alone, tmp_path, n):
    done = _torchrun(n, caches, tmp_path / "run", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    _same_to_rounding(json.loads((tmp_path / "result.json").read_text()), alone)
    assert len(list((tmp_path / "run").glob("state-*-of-*.json"))) == n


@pytest.mark.slow
def test_a_dead_process_ends_the_run_with_its_cause_and_the_run_resumes(caches, alone, tmp_path):
    folder, result = tmp_path / "run", tmp_path / "result.json"
    done = _torchrun(2, caches, folder, result, KILL_RANK="1", KILL_READ="8")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr or "Signal 9" in done.stderr
    assert "local_rank: 1" in done.stderr or "rank      : 1" in done.stderr
    assert not result.exists()
    assert _torchrun(2, caches, folder, result).returncode == 0
    _same_to_rounding(json.loads(result.read_text()), alone)
