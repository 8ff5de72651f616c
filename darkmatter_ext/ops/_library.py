"""Load the compiled ops into torch. Importing this module makes `torch.ops.darkmatter` available."""

from __future__ import annotations

from pathlib import Path

import torch

from darkmatter_ext.ops.facts import CPU_LIBRARY, fact
from darkmatter_ext.runtime.inputs import StateError

CUDA_LIBRARY = CPU_LIBRARY.parent / "libdarkmatter_cuda.so"


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StateError(
            f"darkmatter_ext: {path.name} must load with torch {torch.__version__}, got: {reason}; "
            "build again with pip install --no-build-isolation ."
        ) from None


if not CPU_LIBRARY.exists():
    raise StateError(
        f"darkmatter_ext: the compiled ops are missing ({CPU_LIBRARY}); pip install --no-build-isolation ."
    )
_load(CPU_LIBRARY)

BOUND_ROWS = int(fact("bound_rows"))  # number of bounds per latent
MIN_TOKENS_TO_PACK = int(fact("min_tokens_to_pack"))  # in a call with unprepared weights

# The CUDA library needs torch's own CUDA library in the process; a CPU build of torch has none.
CUDA_LOADED = CUDA_LIBRARY.exists() and torch.version.cuda is not None
if CUDA_LOADED:
    _load(CUDA_LIBRARY)


def has_kernels(device: torch.device) -> bool:
    """Whether this build can run the ops on a device (meta: shapes only)."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and CUDA_LOADED)


def cuda_ops() -> list[str]:
    """The ops that have a CUDA kernel in this process."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("darkmatter::")]
    return sorted(
        name.removeprefix("darkmatter::")
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )
