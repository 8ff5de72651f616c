"""Where files go: the cache folder, and writing that never leaves half a file behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darkmatter_ext.runtime.inputs import InputError

CACHE_ENVIRONMENT_VARIABLE = "DARKMATTER_CACHE"


def cache_dir(*parts: str) -> Path:
    """The folder for everything that can be recreated: `$DARKMATTER_CACHE`, else `~/.cache/darkmatter_ext`.

    Honours `$XDG_CACHE_HOME`. The folder (with `parts` below it) is created. Raises InputError if it cannot be.
    """
    configured = os.environ.get(CACHE_ENVIRONMENT_VARIABLE)
    if configured:
        root = Path(configured)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darkmatter_ext"
    return make_folder(CACHE_ENVIRONMENT_VARIABLE, root.joinpath(*parts))


def make_folder(argument: str, folder: Path) -> Path:
    """Create `folder` unless it exists. Raises InputError naming `argument` if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(argument, folder, error) from None
    return folder


def fingerprint(**fields: Any) -> str:
    """Sixteen hex digits that name a set of JSON-serialisable fields: the key of a cache entry."""
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


SMALL_FILE = 1 << 20  # bytes: read whole for a stamp
SAMPLES, SAMPLE = 16, 1 << 12  # how many pieces of a larger file are, and their bytes


def stamp(path: Path) -> str:
    """Name what a file or folder holds now, so that a new SAE under an old name is not mistaken for the old one.

    Made of the names, sizes, times of change and bytes of the files; of large files, of some of their bytes. A time alone
    would mislead: clocks are set back, and copies and archives keep the time of what they are made from.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape"))
        with contextlib.suppress(PermissionError), file.open("rb") as content:
            if stat.st_size <= SMALL_FILE:
                digest.update(content.read())
                continue
            for number in range(SAMPLES):
                content.seek(number * (stat.st_size - SAMPLE) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:16]


def parsed_json(text: str | bytes) -> Any:
    """Parse JSON text. Raises ValueError if it is not JSON, or is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


MOST_UNPACKED = 64  # times the file size; weights and tables unpack to a few times it
ALWAYS_UNPACKED = 64 << 20  # bytes: arrays of zeros compress a thousandfold


def most_unpacked(packed: int) -> int:
    """How many bytes a file of this size may unpack to."""
    return max(ALWAYS_UNPACKED, MOST_UNPACKED * packed)


def require_bounded(path: Path, unpacked: int, packed: int) -> None:
    """Raise ValueError for a file that unpacks to far more than its size, as files made to exhaust memory do."""
    if unpacked > most_unpacked(packed):
        raise ValueError(f"{path.name} must unpack to at most {MOST_UNPACKED} times its size, got {unpacked} bytes")


def require_bounded_archive(path: Path) -> None:
    """`require_bounded` for a zip file (.npz, what torch saves), from its table of contents; other files pass."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            require_bounded(path, sum(member.file_size for member in archive.infolist()), path.stat().st_size)


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _temporary_sibling(target: Path) -> str:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise OSError(f"{target}: cannot be written ({error.strerror})") from None


_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Report a full disk as an OSError that names the file, whichever library was writing."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not str(error).startswith("Error while serializing"):  # an error of reading a file
            raise
        raise OSError(f"{target}: cannot be written ({' '.join(str(error).split())})") from None
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(f"{target}: cannot be written ({error.strerror})") from None


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `target` in one rename, or disappears if the block fails.

    Raises InputError for a target that exists and is not a file: a rename would replace /dev/null by a file.
    """
    if target.exists() and not target.is_file():
        raise InputError(f"out: must be a file that can be replaced, got {target}")
    folder = Path(_temporary_sibling(target))
    try:
        part = folder / target.name
        with _named(target):
            yield part
        part.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """As `atomic_file`, for a folder; a `target` that another process created meanwhile is left unchanged."""
    folder = Path(_temporary_sibling(target))
    try:
        part = folder / target.name
        part.mkdir()
        with _named(target):
            yield part
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_writable_folder(argument: str, folder: Path) -> Path:
    """Create `folder` and verify that a file can be written in it, before any long work starts.

    Raises ValueError naming `argument` if it is a file, or cannot be created or written.
    """
    make_folder(argument, folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(argument, folder, error) from None
    return folder


def _not_writable(argument: str, folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"{argument}: must be a folder that can be written, got {folder} ({reason})")
