"""The ranks of one run: how they join, and their collectives, which do nothing in a run of one process."""

import json
import os
import secrets
import time
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
from training.errors import UserError, library_error

Group = dist.ProcessGroup | None  # None: all ranks
BUCKET = 2**26  # bytes per all-reduce: larger buckets take more memory, smaller ones more calls


@dataclass(frozen=True)
class World:
    """This process as a rank of the run."""

    rank: int
    size: int
    device: torch.device
    background: Group = None  # for the background thread; None with one process
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
        """Publish what this rank does now; `name`, a noun such as "step 5", is for errors about lost ranks."""
        if self.monitor is not None:
            self.monitor.set_activity(name, kind)

    def in_collective(self, name: str, background: bool = False) -> AbstractContextManager[None]:
        """Mark a collective for the monitor. `background`: the calling thread is the background thread."""
        return self.monitor.in_collective(name, BACKGROUND if background else LOOP) if self.monitor else nullcontext()

    def all_reduce_(self, tensors: Iterable[Tensor], group: Group = None, name: str = "an all-reduce") -> None:
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
        """Return the JSON values of all ranks, on every rank. `background`: as in `in_collective`. Collective."""
        if self.size == 1:
            return [value]
        group, data = self.background if background else None, json.dumps(value).encode()
        length = torch.tensor(len(data))
        with self.in_collective("an all-gather", background):
            dist.all_reduce(length, dist.ReduceOp.MAX, group)
            padded = torch.frombuffer(bytearray(data.ljust(int(length))), dtype=torch.uint8)  # JSON may end in spaces
            gathered = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(gathered, padded, group)
        return [json.loads(bytes(each.numpy())) for each in gathered]

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Overwrite the tensor with the main rank's and return it. Collective."""
        with self.in_collective("a broadcast"):
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value on every rank. Collective."""
        return self.gather(value if self.is_main else None)[0]

    def close(self, _type: Any = None, error: BaseException | None = None, _traceback: Any = None) -> None:
        """End this rank, and after an error the others. Raises SystemExit if another rank reports an error."""
        if self.monitor is not None and (error is None or isinstance(error, SystemExit)):
            self.monitor.finish()
        elif self.monitor is not None and (outcome := self.monitor.fail(error)) is not error:
            raise outcome from None
        if self.size > 1 and not self.has_external_group:
            dist.destroy_process_group()


def all_to_all_rows(x_RC: Tensor, sent_P: list[int], received_P: list[int], group: Group = None) -> Tensor:
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
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_external else _rank_and_size()
    if size == 1:
        return World(0, 1, device, has_external_group=is_external)
    device, timeout_s = _local_device(device), config.timeout_s
    if is_external and "gloo" not in str(dist.get_backend_config()):
        raise UserError("the existing process group has no gloo for host tensors; use backend cpu:gloo,cuda:nccl")
    store = dist.distributed_c10d._get_default_store() if is_external else _rendezvous(rank, size, timeout_s)
    start_id = agree_on_start_id(store, rank, size, timeout_s)
    own_store, store_owner = _reconnect(store, timeout_s)
    monitor = Monitor(dist.PrefixStore(f"monitor/{start_id}", own_store), rank, size, timeout_s, store_owner)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # it would abort the process
    limit = timedelta(seconds=2 * timeout_s + 60)  # longer than the monitor's, which can name the missing rank
    with monitor.in_collective("the creation of the process group", LOOP):
        if not is_external:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            group_store = dist.PrefixStore(f"group/{start_id}", store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
        background = dist.new_group(backend="gloo", timeout=limit)
    monitor.exchange_heartbeats()
    return World(rank, size, device, background, monitor, is_external)


def _rank_and_size() -> tuple[int, int]:
    """Return (RANK, WORLD_SIZE); (0, 1) without a launcher. Raises UserError if they are wrong."""
    size = _int_variable("WORLD_SIZE", 1)
    rank = _int_variable("RANK", 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise UserError(f"RANK {rank} does not fit WORLD_SIZE {size}; start with torchrun, which sets both")
    return rank, size


def _int_variable(name: str, default: int | None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        wrong = "is not set" if text is None else f"is not a number: {text!r}"
        raise UserError(f"{name} {wrong}; start with torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE") from None


def _local_device(device: torch.device) -> torch.device:
    """Return this process's device on its host. Raises UserError if the host has more processes than GPUs."""
    if device.type != "cuda":
        return device
    local_rank, n_gpus = _int_variable("LOCAL_RANK", None), torch.cuda.device_count()
    if max(local_rank + 1, _int_variable("LOCAL_WORLD_SIZE", 1)) > n_gpus:
        raise UserError(
            f"LOCAL_RANK {local_rank} has no GPU: this host has {n_gpus}; start at most {n_gpus} processes on it "
            "(--nproc-per-node), or make all GPUs visible to each of them (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _rendezvous(rank: int, size: int, timeout_s: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT. Raises UserError if it, or a rank, is missing after `timeout_s`."""
    address, port = os.environ.get("MASTER_ADDR"), _int_variable("MASTER_PORT", None)
    if not address:
        raise UserError("MASTER_ADDR is not set; start with torchrun, which sets it")
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout_s)))[0]
    except (RuntimeError, ValueError) as error:
        failure = f"rank {rank} could not connect to {address}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_s:g} s"
        raise UserError(f"{failure}: {library_error(error)}") from None


def agree_on_start_id(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """Return an id that is the same on all ranks and new in every start. (torchrun keeps its store across restarts.)

    Each rank writes a random number. Rank 0 publishes the list; its own, the first, is the id. A rank that finds its
    number there confirms; else the list is from an earlier start. Raises UserError if a rank is late by `timeout_s`.
    """
    number, keys, deadline = secrets.token_hex(8), [f"start/{n}" for n in range(size)], time.monotonic() + timeout_s
    store.set(keys[rank], number)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            store.set("start", json.dumps([each.decode() for each in store.multi_get(keys)]))
            if store.check([f"start/{number}/{n}" for n in range(1, size)]):
                return number
        elif rank and store.check(["start"]):
            numbers = json.loads(store.get("start"))
            if numbers[rank : rank + 1] == [number]:
                store.set(f"start/{numbers[0]}/{rank}", "")
                return numbers[0]
        time.sleep(0.02)
    missing = [0] if rank else [n for n in range(1, size) if not store.check([f"start/{number}/{n}"])]
    count = f" ({len(missing)} ranks are missing)" if missing[1:] else ""
    raise UserError(f"rank {missing[0]} did not join within {timeout_s:g} s{count}")


def _reconnect(store: dist.Store, timeout_s: float) -> tuple[dist.Store, str]:
    """Return (a second connection to the store's server, the server's name for error messages)."""
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return store, "the store of the process group"
    connection = dist.TCPStore(inner.host, inner.port, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    owner = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    return connection, f"{owner}, which holds the ranks' store at {inner.host}:{inner.port},"
