"""Processes that carry out one run together: the only room that imports torch.distributed.

Every rank computes its share of the global batch; sums over ranks make the result that of one process.
Started by torchrun or another launcher (`joining.py`), else alone. What every rank is in is known to the others, so
that one that dies or hangs is named (`faults.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import ParallelConfig
from training.distributed.diagnosis import BACKGROUND, LOOP, ActivityKind
from training.distributed.monitor import Monitor
from training.distributed.rendezvous import agree_on_start_id, local_device, rank_and_size, reconnect, rendezvous
from training.errors import UserError

BUCKET = 2**26  # bytes of tensors that are summed in one message: more would be memory, fewer waiting


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    background: dist.ProcessGroup | None = None  # for a thread beside the loop's; None where there is one process
    monitor: Monitor | None = field(default=None, repr=False)  # None where there is one process
    borrowed: bool = False  # the process group was there before, and stays

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def local_range(self, n: int) -> range:
        """This rank's part of n items: contiguous, sizes differ by one at most."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def set_activity(self, what: str, kind: ActivityKind = "timed") -> None:
        """Tell the other ranks what this one is in from now on: a noun, for the line about a rank that is lost.

        timed: other ranks wait `parallel.timeout_s` for it at most. collective: there are collectives inside that World
        does not make, so that the same holds for the time between two calls. untimed: others wait as long as it takes.
        """
        if self.monitor is not None:
            self.monitor.set_activity(what, kind)

    def in_collective(self, what: str, background: bool = False) -> AbstractContextManager[None]:
        """Around a collective that is not made here; `background` as in `gather_bytes`."""
        return self.monitor.in_collective(what, BACKGROUND if background else LOOP) if self.monitor else nullcontext()

    def all_reduce_(
        self, tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None, what: str = "a sum"
    ) -> None:
        """Sum the tensors over all ranks, or a group's, in place, small ones together. Collective."""
        if self.size == 1:
            return
        alike: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for some in (bucket for same in alike.values() for bucket in _buckets(same)):
            flat = some[0] if len(some) == 1 and some[0].is_contiguous() else torch.cat([t.flatten() for t in some])
            with self.in_collective(what):
                dist.all_reduce(flat, group=group)
            if flat is not some[0]:
                for tensor, summed in zip(some, flat.split([t.numel() for t in some]), strict=True):
                    tensor.copy_(summed.view_as(tensor))

    def sum_int(self, value: int) -> int:
        """The sum of a host's number over all ranks. Collective."""
        total = torch.tensor([value])
        self.all_reduce_([total])
        return int(total)

    def max_int(self, *values: int) -> list[int]:
        """The largest over all ranks of each of a host's numbers, for what they must agree on. Collective."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        with self.in_collective("an agreement"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather_bytes(self, data: bytes, background: bool = False) -> list[bytes]:
        """Every rank's bytes, on all of them; `background`: called from the thread beside the loop's. Collective."""
        if self.size == 1:
            return [data]
        group = self.background if background else None
        length = torch.tensor([len(data)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        with self.in_collective("an exchange", background):
            dist.all_gather(lengths, length, group=group)
        longest = max(1, *(int(n) for n in lengths))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with self.in_collective("an exchange", background):
            dist.all_gather(gathered, padded, group=group)
        return [bytes(got[: int(n)].numpy()) for got, n in zip(gathered, lengths, strict=True)]

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """The main rank's tensor, on all of them. Collective."""
        with self.in_collective("a message"):
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The main rank's value, of JSON's types, on all of them. Collective."""
        return json.loads(self.gather_bytes(json.dumps(value if self.is_main else None).encode())[0])

    def barrier(self) -> None:
        """Until every rank is here. Collective."""
        if self.size > 1:
            with self.in_collective("a meeting"):
                dist.barrier()

    def close(
        self,
        _kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        _trace: TracebackType | None = None,
    ) -> None:
        """This rank's end; to be pushed on an ExitStack.

        After an error the other ranks end too. Raises it, or, where another rank speaks, a SystemExit without a word.
        """
        if self.monitor is not None and error is not None and not isinstance(error, SystemExit):
            found = self.monitor.fail(error)
            if found is not error:
                raise found from None
        elif self.monitor is not None:
            self.monitor.end()
        if self.size > 1 and not self.borrowed:
            dist.destroy_process_group()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of up to BUCKET bytes; a larger one is alone."""
    some, n_bytes = [], 0
    for tensor in tensors:
        if some and n_bytes + tensor.nbytes > BUCKET:
            yield some
            some, n_bytes = [], 0
        some.append(tensor)
        n_bytes += tensor.nbytes
    yield some


def join_world(device: torch.device, section: ParallelConfig) -> World:
    """Join the processes that were started together, or be the only one.

    CUDA tensors go through NCCL and host tensors through gloo, so agreeing on a number waits for no device. A process
    group that is there (Ray Train) is used, and left as it is. Raises UserError where ranks do not fit or do not come.
    """
    borrowed = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if borrowed else rank_and_size()
    if size == 1:
        return World(0, 1, device, borrowed=borrowed)
    device = local_device(device)
    if borrowed and "gloo" not in str(dist.get_backend_config()):
        raise UserError("the process group that is there has no gloo for host tensors; use backend cpu:gloo,cuda:nccl")
    store = dist.distributed_c10d._get_default_store() if borrowed else rendezvous(rank, size, section.timeout_s)
    name = agree_on_start_id(store, rank, size, section.timeout_s)
    again, owner = reconnect(store, section.timeout_s)
    monitor = Monitor(dist.PrefixStore(f"monitor/{name}", again), rank, size, section.timeout_s, owner)
    # Longer than the monitor's, which knows who is missing; NCCL's own watch over its errors would abort the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    limit = timedelta(seconds=2 * section.timeout_s + 60)
    with monitor.in_collective("the first meeting", LOOP):
        if not borrowed:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            named = dist.PrefixStore(f"group/{name}", store)
            dist.init_process_group(backend, store=named, rank=rank, world_size=size, timeout=limit)
        background = dist.new_group(backend="gloo", timeout=limit)
    monitor.meet()
    return World(rank, size, device, background, monitor, borrowed)
