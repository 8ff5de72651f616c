"""Many processes under `torchrun`: who this one is, which work is its own, and sums over all of them.

It uses torch.distributed (gloo on CPUs, NCCL on GPUs). When one process dies, torchrun ends the others and names it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.runtime.ranks import under_torchrun

TIMEOUT = datetime.timedelta(hours=2)  # a process may wait for another with a slower share, but not for a dead one


@dataclass(frozen=True)
class Processes:
    """This process among all. Without torchrun it is alone, and every method costs nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # of this process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, pieces: Sequence[Any]) -> list[Any]:
        """This process's pieces of work: every size-th, so that all processes have early and late ones."""
        return list(pieces[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; all get the same result."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, count: int, device: torch.device) -> int:
        """Sum of a number over the processes."""
        return count if self.size == 1 else int(self.sum(torch.tensor(count, device=device)))

    def joined(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The tensors [n, ...] of all processes, concatenated, and where this one's begins. n may differ."""
        if self.size == 1:
            return tensor, 0
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        ends = self.sum(lengths).cumsum(0).tolist()
        start = ends[self.rank] - len(tensor)
        whole = tensor.new_zeros(ends[-1], *tensor.shape[1:])
        whole[start : ends[self.rank]] = tensor
        return self.sum(whole), start

    def from_first(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device(self.device))
        return box[0]

    def wait(self) -> None:
        """Wait until every process has arrived here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the other torchrun processes for this block, or for the outer one if nested; without torchrun, stay alone.

    Groups created one after another can miss each other's ports: to measure several times, wrap all in one such block.

    `device` "cuda" becomes one GPU per process by LOCAL_RANK. Raises ValueError if a process has no GPU of its own.
    """
    if not under_torchrun():
        yield Processes(device=device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"nproc_per_node: must be at most the number of GPUs ({torch.cuda.device_count()}), got process {local}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
