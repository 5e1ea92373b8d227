"""Save checkpoints during training: copy to host memory, then write from a thread, together with the other ranks.

Order of operations, each durable before the next: tensor files, state.json, manifest.json, rename of the folder,
removal of older checkpoints. After a crash at any point the newest complete checkpoint is still there.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint.read import KINDS, MANIFEST, Location, is_complete, list_checkpoints
from training.checkpoint.tensor_file import TensorPieces, write_bytes, write_tensors
from training.config import CheckpointConfig
from training.errors import UserError
from training.files import fsync_path, mkdir_durable, remove, rename_durable


class TensorShard(NamedTuple):
    """Rows of a tensor that this rank holds, along the first dimension; a scalar is one row."""

    tensor: Tensor
    start: int  # first row
    shape: torch.Size  # of the full tensor
    is_owner: bool  # True on the one rank that writes these rows

    @property
    def n_bytes(self) -> int:
        """Size of the full tensor."""
        return self.shape.numel() * self.tensor.element_size()

    @property
    def stop(self) -> int:
        """Last row + 1."""
        return self.start + (len(self.tensor) if self.shape else 1)


class WriterGroup(NamedTuple):
    """The ranks that write a checkpoint together."""

    rank: int
    size: int
    gather_bytes: Callable[[bytes], list[bytes]]  # all ranks' bytes, on every rank; called from the writing thread


SINGLE = WriterGroup(0, 1, lambda data: [data])
Shards = dict[str, dict[str, TensorShard]]  # by kind ("model", "optimizer") and name


class CheckpointWriter:
    """A writer of checkpoints to a folder, at most one at a time, in the background.

    All ranks call its methods in the same order. `failure` is the error of the last save, the same on all ranks.
    """

    def __init__(self, folder: Path, group: WriterGroup, config: CheckpointConfig):
        self.folder, self.group, self.config = folder, group, config
        self.failure: UserError | None = None
        self.is_preallocated = False
        # One thread for all saves, started while memory is free: Python hangs if a thread cannot start.
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}  # reused by every save

    def preallocate(self, shards: Shards) -> None:
        """Allocate the host buffers in the background: the first write to new pages takes longer than a copy."""
        self.wait()
        self.is_preallocated = True

        def allocate() -> None:
            with suppress(RuntimeError):  # out of memory: the save will report it
                for kind, by_name in shards.items():
                    for name, shard in by_name.items():
                        if shard.is_owner:
                            self._buffer(kind, name, shard.tensor).zero_()

        self._start(allocate)

    def save(self, shards: Shards, state: dict, best_step: int | None) -> None:
        """Start saving `folder`/step-N, unless it exists, then removing all but the `keep` newest and the best.

        `shards` are all of "model" and "optimizer"; training may change them once this returns. Raises UserError if
        the previous save failed or, without `background`, if this one does.
        """
        self.wait()
        copies = {kind: self._copy(kind, by_name) for kind, by_name in shards.items()}
        self._start(self._write, copies, state, best_step)
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress. Raises UserError if the last save failed."""
        if self._work is not None:
            self._work.result()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """Wait for the save in progress and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _start(self, work: Callable, *args: Any) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._work = self._pool.submit(work, *args)

    def _copy(self, kind: str, shards: dict[str, TensorShard]) -> dict[str, TensorShard]:
        """Copy the shards that this rank writes to host memory; keep only shape and dtype of the others."""
        copies, on_device = {}, False
        for name, shard in sorted(shards.items()):  # sorted: the order of creation must not change the file
            tensor = shard.tensor.detach()
            if not shard.is_owner:
                copies[name] = shard._replace(tensor=tensor.new_empty(0, device="cpu"))
                continue
            on_device |= tensor.device.type == "cuda"
            copies[name] = shard._replace(tensor=self._buffer(kind, name, tensor).copy_(tensor, non_blocking=True))
        if on_device:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """Return host memory for a copy of the tensor: the previous save's buffer if it fits."""
        buffer = self._buffers.get((kind, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers[kind, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer

    def _write(self, shards: Shards, state: dict, best_step: int | None) -> None:
        """Write from the thread in three steps; after each, every rank knows if all ranks succeeded."""
        target = self.folder / f"step-{state['step']:08d}"
        partial = self.folder / f".{target.name}.tmp"
        n_bytes = sum(shard.n_bytes for by_name in shards.values() for shard in by_name.values())
        one_file = n_bytes <= self.config.one_file_gib * 2**30
        is_main = self.group.rank == 0

        def create_folder() -> dict:
            if is_main and not target.exists():
                mkdir_durable(self.folder)
                remove_leftovers(self.folder)
                partial.mkdir()
            return {"exists": target.exists()}

        def write_shards() -> dict:
            return {kind: self._write_shards(partial, kind, shards[kind], one_file) for kind in KINDS}

        def publish() -> dict:
            if is_main:
                manifest = {}
                for kind in KINDS:
                    manifest |= _collect(partial, kind, shards[kind], [files[kind] for files in by_rank], one_file)
                _publish(partial, target, manifest, state)
                try:
                    prune(self.folder, self.config.keep, best_step)
                except OSError as error:  # harmless: one checkpoint too many
                    print(f"{error.filename}: {error.strerror}; an old checkpoint stays", file=sys.stderr)
            return {}

        folders = self._on_all_ranks(create_folder, target)
        if folders is None or folders[0]["exists"]:
            return
        by_rank = self._on_all_ranks(write_shards, target)
        if (by_rank is None or self._on_all_ranks(publish, target) is None) and is_main:
            shutil.rmtree(partial, ignore_errors=True)

    def _write_shards(self, partial: Path, kind: str, shards: dict[str, TensorShard], one_file: bool) -> dict:
        """Write this rank's rows; return their locations. With `one_file` the main rank's stay in memory."""
        own = {name: s for name, s in shards.items() if s.is_owner and (s.tensor.numel() or not s.shape)}
        for name, shard in own.items():
            if not shard.tensor.isfinite().all():
                raise UserError(f"{name} is not finite")
        file, entries = None, {}
        if own and not (one_file and self.group.rank == 0):
            file = f"{kind}-{self.group.rank + 1:05d}-of-{self.group.size:05d}.safetensors"
            tensors = {name: TensorPieces(s.tensor.dtype, s.tensor.shape, [s.tensor]) for name, s in own.items()}
            entries[file] = write_tensors(partial / file, tensors)
        return {"rows": {name: Location(file, s.start, s.stop) for name, s in own.items()}, "files": entries}

    def _on_all_ranks(self, work: Callable[[], dict], target: Path) -> list[dict] | None:
        """Run `work` on all ranks and return all results; if any rank fails, set `failure` and return None."""
        try:
            outcome = {"result": work()}
        except Exception as error:  # of any type: the other ranks wait for the outcome
            outcome = {"error": _reason(error)}
        try:
            outcomes = [json.loads(data) for data in self.group.gather_bytes(json.dumps(outcome).encode())]
        except RuntimeError as error:  # the other ranks cannot be reached
            outcomes = [{"error": _reason(error)}]
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        if errors:
            self.failure = UserError(f"{target}: the checkpoint could not be saved: {errors[0]}")
            return None
        return [outcome["result"] for outcome in outcomes]


def _reason(error: Exception) -> str:
    """Return the error on one line."""
    if isinstance(error, UserError):
        return str(error)
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".strip().partition("\n")[0]


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
    tensors = {
        name: TensorPieces(shard.tensor.dtype, shard.shape, _pieces(partial, name, shard, rows[name]))
        for name, shard in shards.items()
    }
    joined = {f"{kind}.safetensors": write_tensors(partial / f"{kind}.safetensors", tensors)}
    for file in entries:
        (partial / file).unlink()
    return joined


def _pieces(partial: Path, name: str, shard: TensorShard, rows: list[tuple[str | None, int, int]]) -> Iterator[Tensor]:
    for file, _, _ in rows:
        if file is None:  # in this rank's memory
            yield shard.tensor
        else:
            with safe_open(partial / file, framework="pt") as opened:
                yield opened.get_tensor(name)


def _publish(partial: Path, target: Path, manifest: dict[str, dict], state: dict) -> None:
    """Write state.json, then the manifest, then rename the folder, each durable before the next."""
    manifest["state.json"] = write_bytes(partial / "state.json", [json.dumps(state, indent=1).encode()])
    write_bytes(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    fsync_path(partial)
    rename_durable(partial, target)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or a killed removal left behind."""
    for leftover in folder.glob(".step-*"):
        remove(leftover)


def prune(folder: Path, keep: int, best_step: int | None, is_intact: Callable[[Path], bool] = is_complete) -> None:
    """Remove all intact checkpoints but the newest `keep` and the best. Damaged ones do not count, and stay."""
    intact = [(step, path) for step, path in list_checkpoints(folder) if is_intact(path)]
    for step, path in intact[:-keep]:
        if step != best_step:
            remove(path.rename(folder / f".{path.name}.old"))
