"""A measurement in a process of its own, killed at a chosen moment: `python -m cases.interrupted_run`.

Run by measurement/test_resume.py. One interpreter serves many kills: it forks a child for each, before any thread is started.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from cases.measured import measure, numbers, open_caches, saes
from darkmatter_ext.measurement import token_table
from darkmatter_ext.measurement.settings import Measure
from darkmatter_ext.runtime import checkpoint
from darkmatter_ext.runtime.processes import processes

SETTINGS = Measure(
    drop_positions=1, batch_tokens=4096, block_contexts=7, token_means=True, table_contexts=0, checkpoint_seconds=0
)


class KilledAtRead:
    """A source that ends its process, as the system would, when its n-th block is asked for."""

    def __init__(self, source, reads):
        self.source, self.reads = source, reads

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, which):
        self.reads -= 1
        if self.reads == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(which)


def kill_at_write(count, after):
    """End the process before or after its n-th rename: the moments between which a state counts."""
    rename, left = Path.replace, [count]

    def replace(self, target):
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = rename(self, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.replace = replace


def kill_at_flush(count):
    """End the process in the middle of writing: a file is complete but not yet named."""
    flush, left = checkpoint._flush, [count]

    def stop(path):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    checkpoint._flush = stop


def run(caches, folder, settings=SETTINGS):
    with processes("cpu") as own:
        source = open_caches(Path(caches))
        if "KILL_RANK" in os.environ and own.rank == int(os.environ["KILL_RANK"]):
            source = KilledAtRead(source, int(os.environ["KILL_READ"]))
        measurement = measure(source, saes(), settings, folder=Path(folder), processes=own)
        found = numbers(measurement)
        rows = {hook: token_table.read_tokens(site.per_token).to_pydict() for hook, site in measurement.items()}
        own.wait()
    return {"numbers": found, "rows": rows}


def in_child(work):
    """Run `work` in a forked process; its exit status (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(moment, count):
    """What makes the process end at the count-th read, write or flush."""

    def work(caches, folder):
        if moment == "read":
            measure(KilledAtRead(open_caches(Path(caches)), count), saes(), SETTINGS, folder=Path(folder))
            return
        if moment == "flush":
            kill_at_flush(count)
        else:
            kill_at_write(count, after=moment == "after")
        run(caches, folder)

    return work


def write_result(caches, folder, path):
    Path(path).write_text(json.dumps(run(caches, folder)))


def many_kills(caches, folder, moments):
    """For each moment: a run killed there, then started again; prints one JSON line each."""
    for moment in moments:
        kind, count = moment.split(":")
        own = Path(folder) / moment.replace(":", "-")
        status = in_child(lambda k=kind, c=int(count), o=own: killed_at(k, c)(caches, o / "run"))
        code = in_child(lambda o=own: write_result(caches, o / "run", o / "result.json"))
        result = json.loads((own / "result.json").read_text()) if code == 0 else None
        sys.stdout.write(json.dumps({"moment": moment, "status": status, "result": result}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    if command == "many":
        many_kills(arguments[0], arguments[1], arguments[2:])
    else:
        result = run(*arguments[:2])
        if os.environ.get("RANK", "0") == "0":
            Path(arguments[2]).write_text(json.dumps(result))
