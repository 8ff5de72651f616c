"""How many of torch's threads small operations take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as a context or a decorator, for work of many small operations on the CPU.

    Several threads do not make these faster. Where another program has one of the cores they make them far slower: at the end
    of every operation all wait for a thread that is not running.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
