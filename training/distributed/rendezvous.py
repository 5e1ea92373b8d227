"""How ranks find one another: by torchrun's variables, which other launchers set too, through a store."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from training.distributed.monitor import first_line
from training.errors import UserError, exit_unless_first_local_rank


@contextmanager
def report_once_per_host() -> Iterator[None]:
    """Of the processes of a host, which find the same wrong before they can agree, the first says so."""
    try:
        yield
    except UserError:
        exit_unless_first_local_rank()
        raise


def rank_and_size() -> tuple[int, int]:
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


def local_device(device: torch.device) -> torch.device:
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


def rendezvous(rank: int, size: int, limit_s: float) -> dist.Store:
    """The store at MASTER_ADDR. Raises UserError where it or a rank does not come."""
    address, port = os.environ.get("MASTER_ADDR"), _variable("MASTER_PORT", None)
    if not address:
        raise UserError("MASTER_ADDR is not set; start with torchrun, which sets it")
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=limit_s)))[0]
    except (RuntimeError, ValueError) as error:
        what = f"rank {rank} found nobody at {address}:{port} (MASTER_ADDR, MASTER_PORT) in {limit_s:g} s"
        raise UserError(f"{what}: {first_line(str(error))}") from None


def agree_on_start_id(store: dist.Store, rank: int, size: int, limit_s: float) -> str:
    """A name that all ranks of this start agree on, and no other start has: torchrun keeps a store over its restarts.

    Each rank draws a number; rank 0 tells its own, as the name, with those that it has seen. Who finds its number there
    is meant. Raises UserError where a rank does not come.
    """
    mine, keys, until = secrets.token_hex(8), [f"start/{n}" for n in range(size)], time.monotonic() + limit_s
    store.set(keys[rank], mine)
    while time.monotonic() < until:
        if rank == 0 and store.check(keys):
            drawn = [number.decode() for number in store.multi_get(keys)]
            store.set("start", json.dumps(drawn))
            if store.check([f"start/{mine}/{n}" for n in range(1, size)]):
                return mine
        elif rank and store.check(["start"]):
            drawn = json.loads(store.get("start"))
            if drawn[rank : rank + 1] == [mine]:
                store.set(f"start/{drawn[0]}/{rank}", "")
                return drawn[0]
        time.sleep(0.02)
    missing = [n for n in range(1, size) if not store.check([f"start/{mine}/{n}"])] if rank == 0 else [0]
    raise UserError(f"rank {missing[0]} has not come in {limit_s:g} s" + f" (of {len(missing)})" * (len(missing) > 1))


def reconnect(store: dist.Store, limit_s: float) -> tuple[dist.Store, str]:
    """(a connection of its own to what keeps the store, what that is)."""
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return store, "the store of the process group"
    limit = timedelta(seconds=limit_s)
    again = dist.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False, timeout=limit)
    owner = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    return again, f"{owner}, which keeps the ranks' store at {inner.host}:{inner.port},"
