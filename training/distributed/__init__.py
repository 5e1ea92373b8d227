"""Processes that carry out one run together: the only room that imports torch.distributed.

Every rank computes its share of the global batch; sums over ranks make the result that of one process.
Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK), else alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    background: dist.ProcessGroup | None = None  # for a thread beside the loop's; None where there is one process

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's part of n items: contiguous, sizes differ by one at most."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum_(self, tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Sum the tensors over all ranks, or a group's, in place, in one message a device and type. Collective."""
        if self.size == 1:
            return
        alike: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for same in alike.values():
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(flat, group=group)
            for tensor, summed in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def sum_int(self, value: int) -> int:
        """The sum of a host's number over all ranks. Collective."""
        total = torch.tensor([value])
        self.sum_([total])
        return int(total)

    def max_int(self, *values: int) -> list[int]:
        """The largest over all ranks of each of a host's numbers, for what they must agree on. Collective."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather_bytes(self, data: bytes, background: bool = False) -> list[bytes]:
        """Every rank's bytes, on all of them; `background`: called from the thread beside the loop's. Collective."""
        if self.size == 1:
            return [data]
        group = self.background if background else None
        length = torch.tensor([len(data)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=group)
        longest = max(1, *(int(n) for n in lengths))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=group)
        return [bytes(got[: int(n)].numpy()) for got, n in zip(gathered, lengths, strict=True)]

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
    return World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))
