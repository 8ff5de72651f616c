"""A command where memory is scarce, the cache cannot be written, or another process works in the same cache.

`python -m cases.scarce_command WORKPLACE FOLDER NAME FAULT`, NAME an experiment or `train`, prints JSON lines: of each run the
exit code, whether it gave what the undisturbed one gave (null: nothing) and what it said of itself.
"""

import ctypes
import itertools
import json
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cases.forked_commands import arguments, outcome, start, status
from darkmatter_ext import cli

LEAST = cli.LEAST_ADDRESS_SPACE
LIMITS = [1 << 28, 1 << 31, LEAST - (1 << 20), LEAST]  # bytes of address space
ROOMS = [1 << step for step in range(20, 31, 2)]  # the same beyond those of the interpreter that forks
LONG = 40  # times what the undisturbed run takes: a run that takes longer waits for ever, and is ended
LONG_IN_A_ROOM = 10  # the same where that may be
GAPS = (0.0, 0.3, 1.0)  # seconds between the starts of two processes

Found = dict[str, Any]


class Command:
    """One command, what it gives undisturbed, and a folder for its runs."""

    def __init__(self, workplace: Path, folder: Path, name: str) -> None:
        self.workplace, self.folder, self.name = workplace, folder, name
        self.seconds, begin = 0.0, time.monotonic()
        assert self.end(self.start("whole"), "whole")["exit"] == 0, (folder / "whole.said").read_text()
        self.seconds = time.monotonic() - begin
        self.expected = outcome(name, folder / "whole")

    def start(self, out: str, cache: str = "", before: Callable[[], None] | None = None, said: str = "") -> int:
        words = arguments(self.workplace, self.name, self.folder / out)

        def limited() -> None:
            self.limit_time(LONG)
            if before is not None:
                before()

        return start(words, self.folder / (cache or f"{out}.cache"), self.folder / f"{said or out}.said", limited)

    def limit_time(self, times: int) -> None:
        """End this process after so many times the undisturbed run, which has no limit."""
        signal.alarm(math.ceil(times * max(self.seconds, 3.0)) if self.seconds else 0)

    def end(self, pid: int, said: str) -> Found:
        code, text = status(pid), (self.folder / f"{said}.said").read_text()
        lines = [line for line in text.splitlines() if line.startswith("darkmatter: ")]
        return {"exit": code, "lines": lines, "traceback": text[-2000:] if "Traceback" in text else ""}

    def given(self, out: str) -> Found:
        """Whether a run gave what the undisturbed one gave (None: it gave nothing), and some of what it gave otherwise."""
        try:
            found = outcome(self.name, self.folder / out)
        except (OSError, ValueError):
            found = {}
        names = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        others = [(name, self.expected.get(name), found.get(name)) for name in names[:5]] if found else []
        return {"same": not names if found else None, "others": others}

    def run(self, out: str, cache: str = "", before: Callable[[], None] | None = None) -> Found:
        return self.end(self.start(out, cache, before), out) | self.given(out)


def little_memory(command: Command) -> Iterator[Found]:
    """With each limit. Then with each room, as if no limit were too low to begin; and, if it was, on what that run left."""
    for limit in LIMITS:
        yield {"limit": limit} | command.run(f"out{limit}", before=lambda limit=limit: _bound(limit))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for room in ROOMS:

        def bounded(limit: int = used + room) -> None:
            command.limit_time(LONG_IN_A_ROOM)
            cli.LEAST_ADDRESS_SPACE = 0
            _bound(limit)

        found = command.run(f"out{room}", before=bounded)
        yield {"room": room} | found
        if found["exit"] != 0:
            yield {"room": 0} | command.run(f"out{room}")


def _bound(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read_only_cache(command: Command) -> Iterator[Found]:
    """A cache that nobody may write: empty, with all that the run before left but the states of runs, and with all."""

    def without_rights() -> None:  # root may write anywhere by its capabilities alone
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version, none) == 0

    def closed(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    shutil.copytree(command.folder / "whole.cache", command.folder / "part.cache")
    for run in (command.folder / "part.cache" / "runs").glob("*"):
        shutil.rmtree(run)
    closed(command.workplace)
    for cache in ("empty.cache", "part.cache", "whole.cache"):
        closed(command.folder / cache)
        out = f"out.{cache}"
        yield command.run(out, cache, without_rights)


def two_at_once(command: Command) -> Iterator[Found]:
    """Two processes run the same command, started almost together: in one cache, then with one folder for results too."""
    for number, (gap, one_out) in enumerate(itertools.product(GAPS, (False, True))):
        outs = [f"out{number}"] * 2 if one_out else [f"first{number}", f"second{number}"]
        pids = []
        for which, out in enumerate(outs):
            pids.append(command.start(out, f"shared{number}", said=f"{out}.{which}"))
            time.sleep(gap)
        ended = [command.end(pid, f"{out}.{which}") for which, (pid, out) in enumerate(zip(pids, outs, strict=True))]
        for out, found in zip(outs, ended, strict=True):
            yield found | command.given(out)


FAULTS = {"little-memory": little_memory, "read-only-cache": read_only_cache, "two-at-once": two_at_once}

if __name__ == "__main__":
    torch.set_num_threads(1)
    place, work, wanted, fault = sys.argv[1:]
    for each in FAULTS[fault](Command(Path(place), Path(work), wanted)):
        sys.stdout.write(json.dumps(each) + "\n")
        sys.stdout.flush()
