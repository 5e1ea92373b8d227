"""Processes that carry out one run together: the only file that imports torch.distributed.

Every rank holds the whole model and computes its share of the global batch; sums over ranks make the
result that of one process. Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK), else alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's part of n items: contiguous, sizes differ by one at most."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum the tensors over all ranks, in place, in one message a device and type. Collective."""
        if self.size == 1:
            return
        alike: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for same in alike.values():
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(flat)
            for tensor, summed in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def sum_int(self, value: int) -> int:
        """The sum of a host's number over all ranks. Collective."""
        total = torch.tensor([value])
        self.sum_([total])
        return int(total)

    def max_int(self, value: int) -> int:
        """The largest of a host's numbers over all ranks, for what they must agree on. Collective."""
        if self.size == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Until every rank is here. Collective."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group that `join` made."""
        if self.size > 1:
            dist.destroy_process_group()


def join(device: torch.device) -> World:
    """Join the processes that torchrun started, or be the only one.

    CUDA tensors go through NCCL and host tensors through gloo, so agreeing on a number waits for no device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, device)
