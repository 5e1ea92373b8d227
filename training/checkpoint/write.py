"""Save checkpoints during training: copy to host memory, then write from a thread, together with the other ranks.

Order of operations, each durable before the next: tensor files, state.json, manifest.json, rename of the folder,
removal of older checkpoints. After a crash at any point the newest complete checkpoint is still there.
"""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint.read import KINDS, MANIFEST, is_complete, is_kept_for_good, list_checkpoints, step_path
from training.config import CheckpointConfig
from training.errors import UserError, library_error
from training.files import fsync_path, mkdir_durable, remove, rename_durable, set_aside
from training.terminal import print_note

POLL_S = 1.0  # between two looks at whether the writing thread still lives
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorShard(NamedTuple):
    """Rows of a tensor that this rank holds, along the first dimension; a scalar is one row."""

    tensor: Tensor
    start: int  # first row
    shape: torch.Size  # of the full tensor
    is_owner: bool  # True on the one rank that writes these rows


class WriterGroup(NamedTuple):
    """The ranks that write a checkpoint together."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]  # all ranks' JSON values, on every rank; called from the writing thread


SINGLE = WriterGroup(0, 1, lambda value: [value])
Shards = dict[str, dict[str, TensorShard]]  # by kind ("model", "optimizer") and name


class CheckpointWriter:
    """Writes checkpoints to a folder, one at a time, in the background. Ranks call its methods in the same order."""

    def __init__(self, folder: Path, group: WriterGroup, config: CheckpointConfig):
        self.folder, self.group, self.config = folder, group, config
        self.on_saved: Callable[[], None] = lambda: None  # called by the main rank's writing thread
        self.is_preallocated = False
        self._pruning = threading.Lock()
        self._pinned: int | None = None  # the step of a checkpoint that another thread reads
        self._best_step: int | None = None  # of the last save
        self._has_saved = False
        # One thread for all saves, started now, while memory is free: Python hangs if a thread cannot start.
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._thread = self._pool.submit(threading.current_thread).result()
        self._work: futures.Future | None = None
        self._buffers: dict[tuple, Tensor] = {}

    def preallocate(self, shards: Shards) -> None:
        """Allocate the host buffers in the background: the first write to new pages takes longer than a copy."""
        self.wait()
        self.is_preallocated = True

        def allocate() -> None:
            owned = [(kind, name, s.tensor) for kind in shards for name, s in shards[kind].items() if s.is_owner]
            with suppress(RuntimeError, MemoryError):  # out of memory: the save will report it
                for kind, name, tensor in owned:
                    self._buffer(kind, name, tensor).zero_()

        self._work = self._pool.submit(allocate)

    def save(self, shards: Shards, state: dict, best_step: int | None) -> None:
        """Start saving `folder`/step-N, unless it exists, then removing all that `prune` does not keep.

        `shards` are all of "model" and "optimizer"; training may change them once this returns. Raises UserError if
        the previous save failed or, without `background`, if this one does.
        """
        self.wait()
        copies = {kind: self._copy(kind, by_name) for kind, by_name in shards.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._work = self._pool.submit(self._write, copies, state, best_step)
        if not self.config.background:
            self.wait()

    @property
    def failure(self) -> BaseException | None:
        """The error of the last save, the same on all ranks; None until it has failed, and after `wait` raised it."""
        if self._work is None:
            return None
        if self._work.done():
            return self._work.exception()
        if not self._thread.is_alive():  # nothing else sets the outcome: waiting for it would never end
            reason = "the thread that writes it has ended, probably because no memory is left"
            return UserError(f"{self.folder}: the checkpoint could not be saved: {reason}")
        return None

    def wait(self) -> None:
        """Wait for the save in progress. Raises UserError if the last save failed."""
        while self._work is not None and not self._work.done() and self._thread.is_alive():
            futures.wait([self._work], timeout=POLL_S)
        failure, self._work = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the save in progress, whether it fails or not, and end the thread."""
        self._pool.shutdown()

    @contextmanager
    def pinned(self, step: int) -> Iterator[Path | None]:
        """Keep a checkpoint from being pruned in the block; yields its path, None if it is gone. For another thread."""
        path = step_path(self.folder, step)
        with self._pruning:
            self._pinned = step
        try:
            yield path if path.is_dir() else None
        finally:
            with self._pruning:
                self._pinned = None
            if self._has_saved:  # before, the best step is not known
                self._prune()

    def _prune(self) -> None:
        """Remove all checkpoints but those to keep."""
        try:
            with self._pruning:
                prune(self.folder, self.config.keep, self._best_step, self.config.keep_every, pinned=self._pinned)
        except OSError as error:  # harmless: one checkpoint too many
            print_note(f"{error.filename}: {error.strerror}; an old checkpoint stays")

    def _copy(self, kind: str, shards: dict[str, TensorShard]) -> dict[str, TensorShard]:
        """Copy the shards that this rank writes to host memory; keep only shape and dtype of the others."""
        copies = {}
        for name, shard in sorted(shards.items()):  # sorted: the order of creation must not change the file
            tensor = shard.tensor.detach()
            if shard.is_owner:
                copy = self._buffer(kind, name, tensor).copy_(tensor, non_blocking=True)
            else:
                copy = tensor.new_empty(0, device="cpu")
            copies[name] = shard._replace(tensor=copy)
        return copies

    def _buffer(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """Return host memory for a copy of the tensor, the same for every save."""
        key = kind, name, tensor.shape, tensor.dtype
        if key not in self._buffers:
            pinned = tensor.device.type == "cuda"
            self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._buffers[key]

    def _write(self, shards: Shards, state: dict, best_step: int | None) -> None:
        """Write from the thread in three steps; if one fails on any rank, the save ends on all of them."""
        target = step_path(self.folder, state["step"])
        partial = self.folder / f".{target.name}.tmp"
        n_bytes = sum(s.shape.numel() * s.tensor.element_size() for kind in KINDS for s in shards[kind].values())
        one_file = n_bytes <= self.config.one_file_gib * 2**30
        is_main = self.group.rank == 0

        def create_folder() -> bool:
            if is_main and not target.is_dir():
                mkdir_durable(self.folder)
                if os.path.lexists(target):
                    set_aside(target)
                remove_leftovers(self.folder)
                partial.mkdir()
            return target.is_dir()

        def write_shards() -> dict:
            return {kind: self._write_shards(partial, kind, shards[kind], one_file) for kind in KINDS}

        def publish() -> None:
            if not is_main:
                return
            manifest = {}
            for kind in KINDS:
                manifest |= _collect(partial, kind, shards[kind], [files[kind] for files in by_rank], one_file)
            manifest["state.json"] = write_bytes(partial / "state.json", [json.dumps(state, indent=1).encode()])
            write_bytes(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            fsync_path(partial)
            rename_durable(partial, target)
            self._best_step, self._has_saved = best_step, True
            self._prune()
            self.on_saved()

        try:
            if self._on_all_ranks(create_folder)[0]:
                return
            by_rank = self._on_all_ranks(write_shards)
            self._on_all_ranks(publish)
        except UserError as error:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{target}: the checkpoint could not be saved: {error}") from error

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on all ranks and return all results. Raises UserError, on all ranks, if any rank fails."""
        result = failure = None
        try:
            result = work()
        except UserError as error:
            failure = str(error)
        except Exception as error:  # of any type: the other ranks wait for the outcome
            failure = getattr(error, "strerror", None) or library_error(error)
        try:
            outcomes = self.group.gather((result, failure))
        except RuntimeError as error:  # the other ranks cannot be reached
            raise UserError(library_error(error)) from error
        for _, failure in outcomes:
            if failure is not None:
                raise UserError(failure)
        return [result for result, _ in outcomes]

    def _write_shards(self, partial: Path, kind: str, shards: dict[str, TensorShard], one_file: bool) -> dict:
        """Write this rank's rows; return their locations. With `one_file` the main rank's stay in memory."""
        own = {name: s for name, s in shards.items() if s.is_owner and (s.tensor.numel() or not s.shape)}
        for name, shard in own.items():
            if not shard.tensor.isfinite().all():
                raise UserError(f"{name} is not finite")
        file, entries = None, {}
        if own and not (one_file and self.group.rank == 0):
            file = f"{kind}-{self.group.rank + 1:05d}-of-{self.group.size:05d}.safetensors"
            tensors = {name: shard.tensor for name, shard in own.items()}
            entries[file] = write_tensors(partial / file, tensors, tensors.values())
        rows = {name: (file, s.start, s.start + (len(s.tensor) if s.shape else 1)) for name, s in own.items()}
        return {"rows": rows, "files": entries}


def _collect(partial: Path, kind: str, shards: dict[str, TensorShard], by_rank: list[dict], one_file: bool) -> dict:
    """Join all ranks' rows into one file, one piece at a time, or write their index; return the manifest's entries."""
    rows = {
        name: sorted((r["rows"][name] for r in by_rank if name in r["rows"]), key=itemgetter(1, 2)) for name in shards
    }
    entries = {file: entry for rank in by_rank for file, entry in rank["files"].items()}
    if not one_file:
        index = {name: {"shape": list(shard.shape), "parts": rows[name]} for name, shard in shards.items()}
        file = f"{kind}.safetensors.index.json"
        return entries | {file: write_bytes(partial / file, [json.dumps(index).encode()])}

    def pieces() -> Iterator[Tensor]:
        for name, shard in shards.items():
            for file, _, _ in rows[name]:
                if file is None:  # in this rank's memory
                    yield shard.tensor
                else:
                    with safe_open(partial / file, framework="pt") as opened:
                        yield opened.get_tensor(name)

    headers = {name: s.tensor.new_empty(s.shape, device="meta") for name, s in shards.items()}
    joined = {f"{kind}.safetensors": write_tensors(partial / f"{kind}.safetensors", headers, pieces())}
    for file in entries:
        (partial / file).unlink()
    return joined


def write_tensors(path: Path, tensors: dict[str, Tensor], pieces: Iterable[Tensor]) -> dict[str, str | int]:
    """Write a safetensors file (github.com/huggingface/safetensors) durably; return its manifest entry.

    `tensors` give names, dtypes and shapes, `pieces` the values in the same order. `safetensors.torch.save_file` needs
    all of them in memory and a second pass for the hash, and hides the system's error if the disk is full.
    """
    header, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    arrays = (piece.contiguous().reshape(-1).view(torch.uint8).numpy() for piece in pieces if piece.numel())
    return write_bytes(path, itertools.chain([len(text).to_bytes(8, "little"), text], map(memoryview, arrays)))


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, str | int]:
    """Write the chunks durably; return the file's manifest entry, as `file_entry`."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or a killed removal left behind."""
    for leftover in folder.glob(".step-*"):
        remove(leftover)


def prune(
    folder: Path,
    keep: int,
    best_step: int | None,
    keep_every: int | None = None,
    is_intact: Callable[[Path], bool] = is_complete,
    pinned: int | None = None,
) -> None:
    """Remove all intact checkpoints but the newest `keep`, the best, the `pinned` one and each `keep_every`-th step.

    Damaged ones do not count, and stay.
    """
    intact = [(step, path) for step, path in list_checkpoints(folder) if is_intact(path)]
    for step, path in intact[:-keep]:
        if step != pinned and not is_kept_for_good(step, best_step, keep_every):
            remove(path.rename(folder / f".{path.name}.old"))
