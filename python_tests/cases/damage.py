"""Files as disks, transfers and strangers damage them, and what a reader may make of such a file: an answer, or one line.

    python -m cases.damage READER SEED CASES

runs in a process of its own, so that a crash, a hang or a flood of memory is one failing test. It prints one JSON list of
what went wrong: case, kind of exception, text. `fuzz/test_damaged_files.py` starts it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

SECONDS, ROOM = 60, 3 << 30  # of a case; bytes of address space beyond what the libraries took
VALUES = (
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, 2**31, 2**63, 10**30, "", "0", "topk", "../../etc/passwd", "\x00",
    "é" * 50, [], {}, [1], {"a": 1}, "nan", "cuda:9", "float64",
)  # fmt: skip


class TooLong(BaseException):
    """Not an Exception: no reader takes it for damage."""


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with bytes flipped, cut, doubled, moved or filled."""
    if not data:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(64)))
    content, kind = bytearray(data), chance.randrange(7)
    at = chance.randrange(len(content))
    length = chance.choice((1, 2, 4, 8, 64, 512))
    if kind == 0:
        for _ in range(chance.choice((1, 1, 2, 8, 64))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + length]
    elif kind == 3:
        content[at:at] = content[at : at + length]
    elif kind == 4:
        content[at : at + length] = bytes(chance.choice((0, 255)) for _ in range(length))
    elif kind == 5:
        head = min(len(content), 256)  # where formats keep lengths and names
        content[chance.randrange(head)] = chance.randrange(256)
    else:
        content[at : at + length] = bytes(chance.randrange(256) for _ in range(length))
    return bytes(content)


def places_of(value: object, way: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Ways to every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in items for place in ((*way, key), *places_of(entry, (*way, key)))]


def damaged_json(data: bytes, chance: random.Random) -> bytes:
    """The same structure with entries of another type or value, without some, or renamed."""
    content = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        ways = places_of(content)
        if not ways:
            break
        *way, last = chance.choice(ways)
        parent = content
        for key in way:
            parent = parent[key]
        kind = chance.randrange(4)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[f"{last}{chance.choice(('', '_', '/', '..'))}x"] = parent.pop(last)
        else:
            parent[last] = copy.deepcopy(chance.choice(VALUES))
    return json.dumps(content).encode()


def damage(folder: Path, chance: random.Random) -> Path:
    """Damage one file below a folder, and say which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice(files)
    data = path.read_bytes()
    structured = path.suffix == ".json" and chance.random() < 0.7
    path.write_bytes(damaged_json(data, chance) if structured else damaged(data, chance))
    return path


def _digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cases(name: str, seed: int, count: int) -> list[dict[str, object]]:
    """What went wrong in `count` cases of one reader."""
    from cases.readers import READERS
    from darkmatter_ext.runtime.inputs import InputError

    make, read = READERS[name]
    wrong: list[dict[str, object]] = []

    def too_long(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "whole"
        whole.mkdir()
        make(whole)
        read(whole)  # as it is it can be read; and what libraries load they have loaded before memory is bounded
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        for case in range(count):
            chance = random.Random(f"{name} {seed} {case}")
            folder = Path(work) / "case"
            shutil.copytree(whole, folder)
            path = damage(folder, chance)
            before = _digest(Path(work))
            signal.alarm(SECONDS)
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    read(folder)
            except (InputError, OSError) as error:
                if len(str(error).splitlines()) > 1:
                    wrong.append(_told(case, path, error))
            except (Exception, TooLong) as error:
                wrong.append(_told(case, path, error))
            finally:
                signal.alarm(0)
            if _digest(Path(work)) != before:
                wrong.append({"case": case, "file": path.name, "error": "a reader has written into the folder"})
            shutil.rmtree(folder)
    return wrong


def _told(case: int, path: Path, error: BaseException) -> dict[str, object]:
    where = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if "darkmatter_ext" in frame.filename]
    return {"case": case, "file": path.name, "error": f"{type(error).__name__}: {str(error)[:300]}", "where": ours[-3:]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps(cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
