"""Commands killed from outside at random times: `python -m cases.interrupted_command WORKPLACE FOLDER NAME:KILLS ...`.

NAME is an experiment, or `train`. Each command runs once undisturbed; then for each kill, with an empty cache, it is ended by
SIGKILL after a random share of that processor time (a shared machine's clock says little) and started again. Prints a JSON
line a kill: when, the status of both, and whether the second gave what the undisturbed one gave. One interpreter forks them
all, before any thread is started.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from cases.runs import command
from darkmatter_ext import cli
from darkmatter_ext.report.result import load_result


def _arguments(workplace, name, out):
    if name != "train":
        return [*command(workplace, name), "--out", str(out)]
    return [
        "train", "--model", str(workplace / "model"), "--hook", "blocks.1.hook_resid_post",
        "--text", str(workplace / "text.txt"), "--tokens", "16000", "--context-length", "32", "--widths", "24", "48",
        "--k", "4", "--steps", "60", "--batch-size", "256", "--buffer-tokens", "4000", "--log-every", "10",
        "--checkpoint-seconds", "0", "--out", str(out),
    ]  # fmt: skip


def _start(arguments, cache, said):
    """A forked process that runs a command; what it says goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["DARKMATTER_CACHE"] = str(cache)
    status = 70
    with contextlib.suppress(BaseException):
        status = cli.main(arguments)
    sys.stdout.flush()
    os._exit(status)


def _status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _processor_seconds(pid):
    """Of a process that runs or waits to be waited for; Linux only."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _finished(pid):
    """Whether it has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def outcome(name, out):
    """What a command gave: an experiment's numbers, or digests of the weights."""
    if name == "train":
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*.safetensors"))
        }
    return {key: repr(value) for key, value in load_result(out / f"{name}.json").numbers.items()}  # NaN is NaN


def kills(workplace, folder, name, count):
    """Kill a command `count` times; one dict a kill."""
    whole = folder / name / "whole"
    whole.mkdir(parents=True)
    pid = _start(_arguments(workplace, name, whole / "out"), whole / "cache", whole / "said")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    seconds, status = _processor_seconds(pid), _status(pid)
    if status != 0:
        yield {
            "name": name,
            "kill": "none",
            "started_again": status,
            "same": False,
            "said": (whole / "said").read_text(),
        }
        return
    expected, chance = outcome(name, whole / "out"), random.Random(name)
    for number in range(count):
        own = folder / name / str(number)
        own.mkdir()
        share = (number + chance.random()) / count
        arguments = _arguments(workplace, name, own / "out")
        pid = _start(arguments, own / "cache", own / "said")
        while not _finished(pid) and _processor_seconds(pid) < share * seconds:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed = _status(pid)
        again = _status(_start(arguments, own / "cache", own / "said"))
        same = again == 0 and outcome(name, own / "out") == expected
        said = "" if same else (own / "said").read_text()[-2000:]
        yield {"name": name, "kill": share, "status": killed, "started_again": again, "same": same, "said": said}
        shutil.rmtree(own)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, work = Path(sys.argv[1]), Path(sys.argv[2])
    for wanted in sys.argv[3:]:
        experiment, _, number = wanted.partition(":")
        for found in kills(place, work, experiment, int(number)):
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
