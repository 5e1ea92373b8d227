"""How ranks find one another: by torchrun's variables, which other launchers set too, through a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from training.distributed.faults import first_line
from training.errors import UserError


@contextmanager
def said_once() -> Iterator[None]:
    """Of the processes of a host, which find the same wrong before they can agree, the first says so."""
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise


def numbers() -> tuple[int, int]:
    """(rank, ranks) by this process's environment: (0, 1) where it was started alone. Raises UserError."""
    size = _variable("WORLD_SIZE", 1)
    rank = _variable("RANK", 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise UserError(f"RANK {rank} does not fit WORLD_SIZE {size}; start with torchrun, which sets both")
    return rank, size


def _variable(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "is not set" if text is None else f"is not a number: {text!r}"
        raise UserError(f"{name} {found}; start with torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE") from None


def own(device: torch.device) -> torch.device:
    """This process's device among those of its host. Raises UserError where they are fewer than the processes."""
    if device.type != "cuda":
        return device
    local, there = _variable("LOCAL_RANK", None), torch.cuda.device_count()
    if max(local + 1, _variable("LOCAL_WORLD_SIZE", 1)) > there:
        raise UserError(
            f"LOCAL_RANK {local} has no GPU: this host has {there}; start at most {there} processes on it "
            "(--nproc-per-node), or show each of them all GPUs (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def meet(rank: int, size: int, limit_s: float) -> dist.Store:
    """The store at MASTER_ADDR. Raises UserError where it or a rank does not come."""
    address, port = os.environ.get("MASTER_ADDR"), _variable("MASTER_PORT", None)
    if not address:
        raise UserError("MASTER_ADDR is not set; start with torchrun, which sets it")
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=limit_s)))[0]
    except (RuntimeError, ValueError) as error:
        what = f"rank {rank} found nobody at {address}:{port} (MASTER_ADDR, MASTER_PORT) in {limit_s:g} s"
        raise UserError(f"{what}: {first_line(str(error))}") from None


def connection(store: dist.Store, limit_s: float) -> tuple[dist.Store, str]:
    """(a connection of its own to what keeps the store, what that is). It has names of its own for this start."""
    names, inner = "monitor", store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not isinstance(inner, dist.TCPStore):
        return dist.PrefixStore(f"{names}/{start}", store), "the store of the process group"
    limit = timedelta(seconds=limit_s)
    again = dist.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False, timeout=limit)
    owner = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    keeper = f"{owner}, which keeps the ranks' store at {inner.host}:{inner.port},"
    return dist.PrefixStore(f"{names}/{start}", again), keeper
