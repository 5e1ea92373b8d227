"""The ranks of one run and their collectives.

Each rank computes its part of the global batch; sums over ranks give the result of a single process. A launcher such
as torchrun starts the ranks (rendezvous.py); without one, World has one process and its collectives do nothing. The
monitor shares each rank's activity with the others, and reports a rank that dies or hangs (monitor.py).
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from training.config import ParallelConfig
from training.distributed.diagnosis import BACKGROUND, LOOP, ActivityKind
from training.distributed.monitor import Monitor
from training.distributed.rendezvous import agree_on_start_id, local_device, rank_and_size, reconnect, rendezvous
from training.errors import UserError

BUCKET = 2**26  # bytes per all-reduce: larger buckets take more memory, smaller ones more calls


@dataclass(frozen=True)
class World:
    """This process as a rank of the run."""

    rank: int
    size: int
    device: torch.device
    background: dist.ProcessGroup | None = None  # for the background thread; None with one process
    monitor: Monitor | None = field(default=None, repr=False)  # None with one process
    has_external_group: bool = False  # the process group is someone else's (Ray Train): do not destroy it

    @property
    def is_main(self) -> bool:
        """True on rank 0, the process that writes and prints."""
        return self.rank == 0

    def local_range(self, n: int) -> range:
        """Return this rank's contiguous part of n items; sizes differ by at most one."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def set_activity(self, name: str, kind: ActivityKind = "timed") -> None:
        """Publish what this rank does now. `name` is a noun such as "step 5", for errors about lost ranks.

        timed: other ranks wait at most `parallel.timeout_s`. collective: timed, and contains collectives outside of
        World (FSDP). untimed: others wait as long as it takes.
        """
        if self.monitor is not None:
            self.monitor.set_activity(name, kind)

    def in_collective(self, name: str, background: bool = False) -> AbstractContextManager[None]:
        """Mark a collective for the monitor. `background`: the calling thread is the background thread."""
        return self.monitor.in_collective(name, BACKGROUND if background else LOOP) if self.monitor else nullcontext()

    def all_reduce_(
        self, tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None, name: str = "an all-reduce"
    ) -> None:
        """Sum the tensors over all ranks, or those of a group, in place, in buckets of BUCKET bytes. Collective."""
        if self.size == 1:
            return
        for bucket in _take_tensors(tensors, BUCKET):
            flat = _flatten_dense_tensors(bucket)  # a view of a tensor that fills a bucket by itself
            with self.in_collective(name):
                dist.all_reduce(flat, group=group)
            for tensor, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(total)

    def sum_int(self, value: int) -> int:
        """Return the sum of an integer over all ranks, on the host. Collective."""
        total = torch.tensor([value])
        self.all_reduce_([total])
        return int(total)

    def max_int(self, *values: int) -> list[int]:
        """Return the maximum of each integer over all ranks, on the host. Collective."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        with self.in_collective("an all-reduce"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, value: Any, background: bool = False) -> list[Any]:
        """Return the values of all ranks, on every rank. `background`: as in `in_collective`. Collective."""
        values = [value] * self.size
        if self.size > 1:
            with self.in_collective("an all-gather", background):
                dist.all_gather_object(values, value, group=self.background if background else None)
        return values

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Overwrite the tensor with the main rank's and return it. Collective."""
        with self.in_collective("a broadcast"):
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value on every rank. Collective."""
        return self.gather(value if self.is_main else None)[0]

    def close(self, _type: Any = None, error: BaseException | None = None, _traceback: Any = None) -> None:
        """End this rank; an exit callback for `ExitStack.push`.

        After an error, the other ranks end too. Raises SystemExit instead if another rank reports an error.
        """
        if self.monitor is not None and error is not None and not isinstance(error, SystemExit):
            if (outcome := self.monitor.fail(error)) is not error:
                raise outcome from None
        elif self.monitor is not None:
            self.monitor.finish()
        if self.size > 1 and not self.has_external_group:
            dist.destroy_process_group()


def all_to_all_rows(
    x_RC: Tensor, sent_P: list[int], received_P: list[int], group: dist.ProcessGroup | None = None
) -> Tensor:
    """Send x_RC in parts of sent_P[p] rows to each rank p; return the received rows, ordered by rank. Collective."""
    y_SC = x_RC.new_empty(sum(received_P), x_RC.shape[1])
    dist.all_to_all_single(y_SC, x_RC.contiguous(), received_P, sent_P, group=group)
    return y_SC


def join_world(device: torch.device, config: ParallelConfig) -> World:
    """Join the ranks that a launcher started, or return a World of one process.

    CUDA tensors use NCCL and host tensors gloo, so that host integers need no synchronization with the device. An
    existing process group (Ray Train) is used and not destroyed. Raises UserError if the launcher's variables are
    wrong or a rank does not join within `timeout_s`.
    """
    is_external = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_external else rank_and_size()
    if size == 1:
        return World(0, 1, device, has_external_group=is_external)
    device, timeout_s = local_device(device), config.timeout_s
    if is_external and "gloo" not in str(dist.get_backend_config()):
        raise UserError("the existing process group has no gloo for host tensors; use backend cpu:gloo,cuda:nccl")
    store = dist.distributed_c10d._get_default_store() if is_external else rendezvous(rank, size, timeout_s)
    start_id = agree_on_start_id(store, rank, size, timeout_s)
    own_store, store_owner = reconnect(store, timeout_s)
    monitor = Monitor(dist.PrefixStore(f"monitor/{start_id}", own_store), rank, size, timeout_s, store_owner)
    # NCCL's own error handling would abort the process. Its timeout is longer than the monitor's, which can name the
    # missing rank.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    limit = timedelta(seconds=2 * timeout_s + 60)
    with monitor.in_collective("the creation of the process group", LOOP):
        if not is_external:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            group_store = dist.PrefixStore(f"group/{start_id}", store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
        background = dist.new_group(backend="gloo", timeout=limit)
    monitor.exchange_heartbeats()
    return World(rank, size, device, background, monitor, is_external)
