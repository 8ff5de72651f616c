"""What is compiled and what is in use."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from darkmatter_ext.ops.facts import fact


def package_version(package: str) -> str:
    """Version of a package; a GPU machine may run the ops from the source folder without the other packages installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_info() -> dict[str, Any]:
    """Versions, whether there are CUDA kernels, compiled architectures, CPU instruction sets.

    Keys: version, commit (of the source it was built from, with `+changes` if edited), torch, python, compiler,
    cuda_built (the build has CUDA kernels), cuda_archs, nvcc, cuda_loaded (torch has CUDA and the kernels are loaded),
    cuda_ops (ops with a CUDA kernel), cpu_isa (in use), cpu_isa_best (best on this machine), threads.

    Raises RuntimeError if DARKMATTER_CPU_ISA names an instruction set this machine lacks, or the ops cannot be loaded.
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
