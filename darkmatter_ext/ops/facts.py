"""Facts about the build and the machine (csrc/facts.h), asked through whichever way this Python has."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

CPU_LIBRARY = Path(__file__).resolve().parents[1] / "libdarkmatter_cpu.so"
_LONGEST = 1024  # of a fact


def fact(name: str) -> str:
    """One of compiler, cuda_archs, nvcc, commit, cpu_isa, cpu_isa_best, bound_rows, min_tokens_to_pack.

    Raises RuntimeError when DARKMATTER_CPU_ISA names a set this machine does not have, or for another name.
    """
    return _ask()(name)


@functools.cache
def _ask() -> Callable[[str], str]:
    """The pybind11 module, which is of one version of Python, or the C function of the CPU library: a wheel has no other."""
    if importlib.util.find_spec("darkmatter_ext._C") is not None:
        from darkmatter_ext import _C

        return _C.fact
    return by_library


def by_library(name: str) -> str:
    """`fact` through the CPU library, which torch has loaded."""
    text = ctypes.create_string_buffer(_LONGEST)
    failed = ctypes.CDLL(str(CPU_LIBRARY)).darkmatter_fact(name.encode(), text, len(text))
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value.decode()
