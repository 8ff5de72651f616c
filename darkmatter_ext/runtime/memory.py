"""What the system gives a process of memory: whether that is enough to begin with, and how libraries say that it was not."""

from __future__ import annotations

import resource

from darkmatter_ext.runtime.inputs import require

# Bytes of address space below which no command begins. The smallest runs of all commands took 2.2 to 2.9 GiB of it (0.5 to 0.7
# of them in memory; x86-64, torch 2.13, one thread or two). With less, the system ends a process at any point, or threads wait
# for ever: a new thread of CPython or Arrow that finds no memory does not tell the one that started it.
LEAST_ADDRESS_SPACE = 4 << 30

# What libraries say when the system gives no more memory: torch on the CPU and on a GPU, C++, the loader of libraries, files.
# Before torch 2.13 its stable ABI does not say why an op of ours got no tensor.
_OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "failed to map segment",
    "can't start new thread", '"aten::new_', '"aten::contiguous"',
)  # fmt: skip


def require_address_space() -> None:
    """Raise InputError where a limit (`ulimit -v`, some batch systems) leaves less than the libraries take."""
    limit, mib = resource.getrlimit(resource.RLIMIT_AS)[0], 1 << 20
    enough = limit == resource.RLIM_INFINITY or limit >= LEAST_ADDRESS_SPACE
    rule = f"must be at least {LEAST_ADDRESS_SPACE // mib} MiB or unlimited (`ulimit -v`)"
    require(enough, "the limit of address space", rule, limit // mib)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library says that there is no more memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)
