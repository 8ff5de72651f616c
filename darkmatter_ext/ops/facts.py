"""Facts about the build and the machine (csrc/facts.h), read in whichever way this Python can."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

CPU_LIBRARY = Path(__file__).resolve().parents[1] / "libdarkmatter_cpu.so"
_LONGEST = 1024  # length of a fact


def fact(name: str) -> str:
    """One of compiler, cuda_archs, nvcc, commit, cpu_isa, cpu_isa_best, bound_rows, min_tokens_to_pack.

    Raises RuntimeError if DARKMATTER_CPU_ISA names an instruction set this machine lacks, or for any other name.
    """
    return _ask()(name)


@functools.cache
def _ask() -> Callable[[str], str]:
    """The pybind11 module, tied to one Python version, or the CPU library's C function, which is all that a wheel has."""
    if importlib.util.find_spec("darkmatter_ext._C") is not None:
        from darkmatter_ext import _C

        return _C.fact
    return by_library


def by_library(name: str) -> str:
    """`fact`, read from the CPU library that torch has loaded."""
    text = ctypes.create_string_buffer(_LONGEST)
    failed = ctypes.CDLL(str(CPU_LIBRARY)).darkmatter_fact(name.encode(), text, len(text))
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value.decode()
