"""How many torch threads small operations use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as a context or a decorator, for work made of many small operations on the CPU.

    More threads do not make these faster. If another program occupies one of the cores, they make them far slower: at the
    end of every operation, all wait for a thread that is not running.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
