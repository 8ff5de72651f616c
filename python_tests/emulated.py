"""The CUDA ops on the CPU: builds python_tests/emulator once a session and loads it as torch.ops.darkmatter_emulated."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


def _sources() -> list[Path]:
    return sorted([*CSRC.glob("*.*"), *(CSRC / "cuda").glob("*.*"), *(TESTS / "emulator").rglob("*.*")])


@functools.cache
def library() -> Path:
    """The built library; the same sources and torch are built once a machine. Skips where there is no compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the emulator needs a C++ compiler, got none ({compiler})")
    digest = hashlib.sha256(torch.__version__.encode())
    for source in _sources():
        digest.update(source.read_bytes())
    out = Path(tempfile.gettempdir()) / f"darkmatter-emulator-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    if not out.exists():
        include = Path(torch.__file__).parent / "include"
        libraries = Path(torch.__file__).parent / "lib"
        unfinished = out.with_suffix(f".{os.getpid()}")
        command = [
            compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-I{TESTS / 'emulator'}",
            f"-I{CSRC}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
            "-DTORCH_TARGET_VERSION=0x020B000000000000", str(TESTS / "emulator/library.cpp"), "-o", str(unfinished),
            f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        unfinished.rename(out)
    torch.ops.load_library(out)
    return out


def set_seed(seed: int) -> None:
    """Of the order in which the threads of a block take turns."""
    ctypes.CDLL(str(library())).darkmatter_emulated_seed(ctypes.c_uint64(seed))
