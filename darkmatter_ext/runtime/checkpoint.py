"""Checkpoints: the state of a run on disk, so that a run killed at any moment resumes where it was.

A folder holds `run.json` (the configuration the run was started with) and, for every process, one `state-N-of-M.json` that
points to a file of tensors and carries its sha256. The tensors are written first, under a new name; then the pointer is
replaced in one rename; then the older tensors are deleted. Whenever the run is killed, the pointer names a complete file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError, StateError
from darkmatter_ext.runtime.storage import atomic_file, fingerprint, make_folder, parsed_json, sha256_of_file

FORMAT = 3  # increased when a reader of the old format would misread the new one


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run, as process `rank` of `size` sees them."""

    folder: Path
    rank: int = 0
    size: int = 1

    @property
    def _pointer(self) -> Path:
        return self.folder / f"state-{self.rank}-of-{self.size}.json"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other runs out of the folder. If one is in it, say so (`logging`) and wait until it has ended.

        For one process of a run: two runs that each lock one of their processes would wait for each other for ever. The lock
        is the kernel's and ends with the process, killed or not; a file that marks a lock would outlive it. Nothing is
        locked where the folder cannot be written, or its file system has no locks. Raises InputError if it cannot be made.
        """
        make_folder("checkpoint", self.folder)
        try:
            file = (self.folder / ".lock").open("ab")
        except OSError:
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.getLogger(__name__).warning(
                    "checkpoint: %s is in use by another run; waiting for its end", self.folder
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
            yield

    def start(self, config: dict[str, Any]) -> None:
        """Claim the folder for a run of this configuration, or confirm that the same run has already claimed it.

        Raises ValueError naming the difference if the folder holds a run with another configuration or process count,
        RuntimeError if it is damaged.
        """
        own = json.loads(json.dumps(config, sort_keys=True, default=str))
        path = self.folder / "run.json"
        if not path.exists():
            with atomic_file(path) as part:
                part.write_text(json.dumps({"format": FORMAT, "config": own, "hash": fingerprint(**own)}, indent=1))
                _flush(part)
        found = _read_json(path)
        if found.get("format") != FORMAT:
            raise InputError(
                f"checkpoint: must be of format {FORMAT}, got {found.get('format')} in {self.folder}; name another folder"
            )
        if found.get("hash") != fingerprint(**own):
            theirs = found.get("config", {})
            if not isinstance(theirs, dict):
                raise StateError(f"checkpoint: {path} is damaged (its config is no JSON object); nothing was deleted")
            changed = [
                f"{key} {theirs.get(key)!r} there, {own.get(key)!r} here"
                for key in sorted({*own, *theirs})
                if theirs.get(key) != own.get(key)
            ]
            raise InputError(
                f"checkpoint: must hold a run of this configuration, got {self.folder} with {'; '.join(changed)}; "
                "name another folder, or delete it"
            )

        others = [path.name for path in self.folder.glob("state-*.json") if f"-of-{self.size}.json" not in path.name]
        if others:
            raise InputError(
                f"nproc_per_node: must stay what the run was started with, got {self.size} processes in {self.folder} "
                f"with {min(others)}"
            )
        for leftover in self.folder.glob(f".state-{self.rank}-of-{self.size}*.part"):  # of a process killed at writing
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Make this the state to resume from. Raises OSError if it cannot be written; the previous state stays."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        number = 1 + (self._number() or 0)
        path = self.folder / f"state-{self.rank}-of-{self.size}.{number:06d}.safetensors"
        try:
            with atomic_file(path) as part:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
                _flush(part)
                digest = sha256_of_file(part)
            with atomic_file(self._pointer) as part:
                content = {"number": number, "tensors": path.name, "sha256": digest, "state": state}
                content = json.loads(json.dumps(content))  # as it is read again
                part.write_text(json.dumps(content | {"own": fingerprint(**content)}))
                _flush(part)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"checkpoint: {self.folder} cannot be written ({reason}); what was saved before is kept, "
                "make room and start the same command again"
            ) from None
        self._remove_others(path.name)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved tensors and state, or None at the start of a run.

        Raises RuntimeError (one line) if they are damaged; nothing is deleted.
        """
        from safetensors.torch import load_file

        if not self._pointer.exists():
            return None
        pointer = _read_json(self._pointer)
        if pointer.pop("own", None) != fingerprint(**pointer):
            raise StateError(
                f"checkpoint: {self._pointer} is damaged (its content is not the one recorded); nothing was deleted, "
                "restore it, or remove it to start this process anew"
            )
        path = self.folder / pointer["tensors"]
        if not path.is_file() or sha256_of_file(path) != pointer["sha256"]:
            raise StateError(
                f"checkpoint: {path} is damaged (its sha256 is not the one recorded); nothing was deleted, "
                f"restore it or remove {self._pointer.name} to start this process anew"
            )
        return load_file(path), pointer["state"]

    def _number(self) -> int | None:
        return _read_json(self._pointer)["number"] if self._pointer.exists() else None

    def _remove_others(self, kept: str) -> None:
        for path in self.folder.glob(f"state-{self.rank}-of-{self.size}.*.safetensors"):
            if path.name != kept:
                path.unlink()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parsed_json(path.read_text())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StateError(
            f"checkpoint: {path} is damaged ({reason}); nothing was deleted, restore or remove it"
        ) from None
    if not isinstance(content, dict):
        raise StateError(f"checkpoint: {path} is damaged (not a JSON object); nothing was deleted")
    return content


def _flush(path: Path) -> None:
    """Flush to the disk itself before the rename: a power cut must not leave a name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
