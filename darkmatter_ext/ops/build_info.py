"""What is compiled and what is in use."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from darkmatter_ext.ops.facts import fact


def package_version(package: str) -> str:
    """Of an installed package; a GPU machine may run the ops from the source folder, and without the other packages."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_info() -> dict[str, Any]:
    """Versions, CUDA kernels or not, architectures compiled, CPU instruction sets.

    Keys: version, commit (of the source it was built from, with `+changes` when edited), torch, python, compiler,
    cuda_built (kernels are in this build), cuda_archs, nvcc, cuda_loaded (torch has CUDA and the kernels are loaded),
    cuda_ops (ops with a CUDA kernel), cpu_isa (in use), cpu_isa_best (of this machine), threads.

    Raises RuntimeError when DARKMATTER_CPU_ISA names a set this machine does not have, or the ops cannot be loaded.
    """
    import torch

    from darkmatter_ext.ops import _library

    archs = fact("cuda_archs")
    return {
        "version": package_version("darkmatter_ext"),
        "commit": fact("commit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": fact("compiler"),
        "cuda_built": bool(archs),
        "cuda_archs": [arch for arch in archs.split(";") if arch],
        "nvcc": fact("nvcc"),
        "cuda_loaded": _library.CUDA_LOADED,
        "cuda_ops": _library.cuda_ops(),
        "cpu_isa": fact("cpu_isa"),
        "cpu_isa_best": fact("cpu_isa_best"),
        "threads": torch.get_num_threads(),
    }
