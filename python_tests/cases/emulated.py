"""Code for machines that are not there, run on this CPU: builds python_tests/emulator and loads it into torch.

The CUDA ops are torch.ops.darkmatter_emulated, the CPU ops with AVX-512 torch.ops.darkmatter_emulated_cpu. Each is built
once a session; the same sources and torch are built once a machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from darkmatter_ext.ops.facts import fact

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
X86 = TESTS / "emulator/x86"
# What the emulation of AVX-512 stands on; vectors of 64 bytes become two of 32.
X86_FLAGS = ("-std=c++20", "-w", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c", f"-I{X86}")
CHOOSE = ("isa.cpp", "screen_kernels.cpp")
# With the second, gcc fuses multiplications and additions as at -O3: float64 answers depend on it.
OPTIMISE = ("-O1", "-fexpensive-optimizations")
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = (
    "-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include"),
    "-DTORCH_TARGET_VERSION=0x020B000000000000",
)  # fmt: skip
# A load or store at an address that is no multiple of its size ends the process, with a line that says where.
ALIGNED = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")
LINK_FLAGS = ("-shared", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")


def compiler() -> str:
    """The C++ compiler; skips where there is none."""
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        pytest.skip(f"the emulator needs a C++ compiler, got none ({name})")
    return name


def _built_once(name: str, sources: list[Path], build: Callable[[Path], None]) -> Path:
    """What `build` writes, or what it wrote before from the same sources, this file and torch."""
    compiler()
    digest = hashlib.sha256(torch.__version__.encode())
    for source in [Path(__file__), *sources]:
        digest.update(source.read_bytes())
    out = Path(tempfile.gettempdir()) / f"darkmatter-{name}-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    if not out.exists():
        unfinished = out.with_suffix(f".{os.getpid()}")
        build(unfinished)
        unfinished.rename(out)
    return out


@functools.cache
def library() -> Path:
    """The built library of the CUDA ops."""
    sources = sorted([*CSRC.glob("*.*"), *(CSRC / "cuda").rglob("*.*"), *(TESTS / "emulator").rglob("*.*")])

    def build(out: Path) -> None:
        command = [
            compiler(), "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w", *ALIGNED, f"-I{TESTS / 'emulator'}",
            f"-I{CSRC}", *TORCH_FLAGS, str(TESTS / "emulator/library.cpp"), "-o", str(out), *LINK_FLAGS,
        ]  # fmt: skip
        subprocess.run(command, check=True)

    out = _built_once("emulator", [path for path in sources if X86 not in path.parents], build)
    torch.ops.load_library(out)
    return out


def set_seed(seed: int) -> None:
    """Of the order in which the threads of a block take turns."""
    ctypes.CDLL(str(library())).darkmatter_emulated_seed(ctypes.c_uint64(seed))


def _without_targets(source: Path) -> str:
    """The text with the lines blank that let the compiler use more than AVX2."""
    text = re.sub(r"(?m)^#pragma GCC (target\(|push_options|pop_options).*$", "", source.read_text())
    assert not re.search(r"\btarget(_clones)?\s*\(", text), f"{source.name}: a target that the emulator does not remove"
    return text


def _build_cpu(out: Path) -> None:
    """All of csrc/cpu with the intrinsics of emulator/x86: 40 seconds of one core, in as many threads as there are."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work)
        for source in _cpu_sources():
            target = copy / source.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_without_targets(source))
        common = [compiler(), *X86_FLAGS, *OPTIMISE, "-fPIC", "-fvisibility=hidden", f"-I{copy}", *TORCH_FLAGS]
        shutil.copy(X86 / "library.h", copy)
        header = str(copy / "library.h")
        subprocess.run([*common, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
        sources = [copy / "ops.cpp", *(path for path in (copy / "cpu").rglob("*.cpp") if path.name not in CHOOSE)]
        sources.append(X86 / "isa.cpp")  # has those that choose in it
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [f"{copy / path.name}.o" for path in sources]
            commands = [
                [*common, "-include", header, "-c", str(path), "-o", made]
                for path, made in zip(sources, objects, strict=True)
            ]
            list(pool.map(functools.partial(subprocess.run, check=True), commands))
        subprocess.run([compiler(), *objects, "-o", str(out), *LINK_FLAGS], check=True)


def needs_avx2() -> None:
    """Skips where the processor has no AVX2 for the emulator of AVX-512 to stand on."""
    if fact("cpu_isa_best") == "scalar":
        pytest.skip("the emulator of AVX-512 needs AVX2, which this machine has not")


def _cpu_sources() -> list[Path]:
    return sorted([*CSRC.glob("*.h"), CSRC / "ops.cpp", *(CSRC / "cpu").rglob("*.*")])


@functools.cache
def cpu_library() -> ctypes.CDLL:
    """The library of the CPU ops, built where needed."""
    needs_avx2()
    emulation = [path for path in sorted(X86.glob("*.*")) if path.name != "checks.cpp"]
    out = _built_once("emulator-cpu", [*_cpu_sources(), *emulation], _build_cpu)
    torch.ops.load_library(out)
    return ctypes.CDLL(str(out))


def set_cpu_isa(name: str) -> None:
    """The instruction set that torch.ops.darkmatter_emulated_cpu uses from now on, as `isa_name` calls it."""
    known = cpu_library().darkmatter_emulated_isa
    known.restype = ctypes.c_bool
    assert known(name.encode()), f"the CPU ops know no instruction set {name}"
