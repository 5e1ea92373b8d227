"""Rendezvous: connect the ranks through the environment variables and the store of torchrun."""

import json
import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from training.errors import UserError, library_error


def rank_and_size() -> tuple[int, int]:
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


def local_device(device: torch.device) -> torch.device:
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


def rendezvous(rank: int, size: int, timeout_s: float) -> dist.Store:
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

    Each rank writes a random number. Rank 0 publishes the list of all numbers; its own, the first, is the id. A rank
    that finds its number in the list confirms. Without it the list is from an earlier start, and the rank waits for
    the next list. Raises UserError if a rank does not join within `timeout_s`.
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


def reconnect(store: dist.Store, timeout_s: float) -> tuple[dist.Store, str]:
    """Return (a second connection to the store's server, the server's name for error messages)."""
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return store, "the store of the process group"
    limit = timedelta(seconds=timeout_s)
    connection = dist.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False, timeout=limit)
    owner = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    return connection, f"{owner}, which holds the ranks' store at {inner.host}:{inner.port},"
