"""Whole commands in processes that one interpreter forks before it starts a thread: an import takes longer than a small run."""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cases.runs import command
from darkmatter_ext import cli
from darkmatter_ext.report.result import load_result


def arguments(workplace: Path, name: str, out: Path) -> list[str]:
    """Of an experiment's small run, or of a training (`train`)."""
    if name != "train":
        return [*command(workplace, name), "--out", str(out)]
    return [
        "train", "--model", str(workplace / "model"), "--hook", "blocks.1.hook_resid_post",
        "--text", str(workplace / "text.txt"), "--tokens", "16000", "--context-length", "32", "--widths", "24", "48",
        "--k", "4", "--steps", "60", "--batch-size", "256", "--buffer-tokens", "4000", "--log-every", "10",
        "--checkpoint-seconds", "0", "--out", str(out),
    ]  # fmt: skip


def start(words: list[str], cache: Path, said: Path, before: Callable[[], None] | None = None) -> int:
    """A process that runs a command after `before`; what it says goes to a file. Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["DARKMATTER_CACHE"] = str(cache)
    status = 1
    with contextlib.suppress(BaseException):
        if before is not None:
            before()
        try:
            status = cli.main(words)
        except Exception:  # as an interpreter does
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def status(pid: int) -> int:
    """Wait for its end: an exit code, or the negative number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(name: str, out: Path) -> dict[str, str]:
    """What a command gave: an experiment's numbers, or digests of the weights."""
    if name == "train":
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*.safetensors"))
        }
    return {key: repr(value) for key, value in load_result(out / f"{name}.json").numbers.items()}  # NaN is NaN
