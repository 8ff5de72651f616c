"""Commands killed from outside at random times: `python -m cases.interrupted_command WORKPLACE FOLDER NAME:KILLS ...`.

NAME is an experiment, or `train`. Each command runs once undisturbed; then for each kill, with an empty cache, it is ended by
SIGKILL after a random share of that processor time (a shared machine's clock says little) and started again. Prints a JSON
line a kill: when, the status of both, and whether the second gave what the undisturbed one gave. One interpreter forks them
all, before any thread is started.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from cases.forked_commands import arguments, outcome, start, status


def _processor_seconds(pid):
    """Of a process that runs or waits to be waited for; Linux only."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _finished(pid):
    """Whether it has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kills(workplace, folder, name, count):
    """Kill a command `count` times; one dict a kill."""
    whole = folder / name / "whole"
    whole.mkdir(parents=True)
    pid = start(arguments(workplace, name, whole / "out"), whole / "cache", whole / "said")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    seconds, ended = _processor_seconds(pid), status(pid)
    if ended != 0:
        yield {
            "name": name,
            "kill": "none",
            "started_again": ended,
            "same": False,
            "said": (whole / "said").read_text(),
        }
        return
    expected, chance = outcome(name, whole / "out"), random.Random(name)
    for number in range(count):
        own = folder / name / str(number)
        own.mkdir()
        share = (number + chance.random()) / count
        words = arguments(workplace, name, own / "out")
        pid = start(words, own / "cache", own / "said")
        while not _finished(pid) and _processor_seconds(pid) < share * seconds:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed = status(pid)
        again = status(start(words, own / "cache", own / "said"))
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
