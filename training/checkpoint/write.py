"""Saving beside the loop: a copy in memory, then a thread that writes it with the other processes' threads."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint.parts import (
    KINDS,
    MANIFEST,
    Entry,
    TensorShard,
    WriterGroup,
    Written,
    write_bytes,
    write_tensors,
)
from training.checkpoint.read import is_complete, list_checkpoints
from training.config import CheckpointConfig
from training.errors import UserError
from training.files import fsync_path, mkdir_durable, remove

Parts = dict[str, dict[str, TensorShard]]  # by kind and name


class CheckpointWriter:
    """Saves checkpoints to a folder, at most one at a time, while training goes on.

    All processes call it alike. `failure` is what went wrong with the last save, the same on all of them.
    """

    def __init__(self, folder: Path, group: WriterGroup, config: CheckpointConfig):
        self.folder, self.group, self.config = folder, group, config
        self.failure: UserError | None = None
        self.is_preallocated = False
        # One thread for all saves, begun while there is memory: Python waits for ever for one that cannot begin.
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}  # their memory serves the next save too

    def preallocate(self, parts: Parts) -> None:
        """Begin to take the memory that such parts are copied to: of new pages, that takes longer than the copy."""
        self.wait()
        self.is_preallocated = True

        def take() -> None:
            with suppress(RuntimeError):  # no memory: the save will say so
                for kind, some in parts.items():
                    for name, part in some.items():
                        if part.is_owner:
                            self._memory(kind, name, part.tensor).zero_()

        self._begin(take)

    def save(self, parts: Parts, state: dict, best_step: int | None) -> None:
        """Begin to save a step as `folder`/step-N, replacing nothing; then those that are no longer kept go.

        `parts` are all of "model" and "optimizer", each with the whole tensor's shape. They may be changed as soon as
        this returns. Raises UserError where the last save failed, or, not in the background, this one.
        """
        self.wait()
        copy = {kind: self._copied(kind, some) for kind, some in parts.items()}
        self._begin(self._write, copy, state, best_step)
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being saved. Raises UserError where that failed."""
        if self._work is not None:
            self._work.result()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """Until nothing is being saved."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _begin(self, work: Callable, *arguments: Any) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._work = self._pool.submit(work, *arguments)

    def _copied(self, kind: str, parts: dict[str, TensorShard]) -> dict[str, TensorShard]:
        """What this process writes, in host memory of our own; of the rest only what it is."""
        found, on_device = {}, False
        for name, part in sorted(parts.items()):  # the same bytes, whichever order they came to be in
            tensor = part.tensor.detach()
            if not part.is_owner:
                found[name] = part._replace(tensor=tensor.new_empty(0, device="cpu"))
                continue
            on_device |= tensor.device.type == "cuda"
            found[name] = part._replace(tensor=self._memory(kind, name, tensor).copy_(tensor, non_blocking=True))
        if on_device:
            torch.cuda.synchronize()
        return found

    def _memory(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """Host memory for a copy of the tensor: that of the last time, where it fits."""
        copy = self._copies.get((kind, name))
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            copy = self._copies[kind, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return copy

    def _write(self, parts: Parts, state: dict, best_step: int | None) -> None:
        """The thread: three steps, after each of which all processes know whether all could do it."""
        target = self.folder / f"step-{state['step']:08d}"
        partial = self.folder / f".{target.name}.tmp"
        n_bytes = sum(part.n_bytes for some in parts.values() for part in some.values())
        in_one = n_bytes <= self.config.one_file_gib * 2**30
        main = self.group.rank == 0

        def make_room() -> dict:
            if main and not target.exists():
                mkdir_durable(self.folder)
                remove_leftovers(self.folder)
                partial.mkdir()
            return {"exists": target.exists()}

        def write_parts() -> dict:
            names = {kind: f"{kind}-{self.group.rank + 1:05d}-of-{self.group.size:05d}.safetensors" for kind in KINDS}
            return {kind: self._write_own(partial / names[kind], parts[kind], in_one) for kind in KINDS}

        def finish() -> dict:
            if main:
                manifest = {}
                for kind in KINDS:
                    manifest |= _collect(partial, kind, parts[kind], [answer[kind] for answer in written], in_one)
                _finish(partial, target, manifest, state)
                try:
                    prune(self.folder, self.config.keep, best_step)
                except OSError as error:  # what is too many harms nobody
                    print(f"{error.filename}: {error.strerror}; an old checkpoint stays", file=sys.stderr)
            return {}

        found = self._agreed(make_room, target)
        if found is None or found[0]["exists"]:
            return
        written = self._agreed(write_parts, target)
        if (written is None or self._agreed(finish, target) is None) and main:
            shutil.rmtree(partial, ignore_errors=True)

    def _write_own(self, path: Path, parts: dict[str, TensorShard], in_one: bool) -> dict:
        """Write what this process has, but not what the main one will write into one file of all."""
        mine = {name: part for name, part in parts.items() if part.is_owner and (part.tensor.numel() or not part.shape)}
        for name, part in mine.items():
            if not part.tensor.isfinite().all():
                raise UserError(f"{name} is not finite")
        rows = {name: [part.start, part.start + (len(part.tensor) if part.shape else 1)] for name, part in mine.items()}
        if not mine or (in_one and self.group.rank == 0):
            return {"rows": rows, "file": None}
        entries = {name: Entry(part.tensor.dtype, part.tensor.shape, [part.tensor]) for name, part in mine.items()}
        return {"rows": rows, "file": path.name, **write_tensors(path, entries)._asdict()}

    def _agreed(self, work: Callable[[], dict], target: Path) -> list[dict] | None:
        """Every process's answer; None, with `failure` set, where one of them could not."""
        try:
            answer = {"answer": work()}
        except Exception as error:  # whatever it is: the others wait for an answer
            answer = {"error": _reason(error)}
        try:
            answers = [json.loads(told) for told in self.group.gather_bytes(json.dumps(answer).encode())]
        except RuntimeError as error:  # they are out of reach
            answers = [{"error": _reason(error)}]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            self.failure = UserError(f"{target}: the checkpoint could not be saved: {errors[0]}")
            return None
        return [answer["answer"] for answer in answers]


def _reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, UserError):
        return str(error)
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _collect(
    partial: Path, kind: str, parts: dict[str, TensorShard], answers: list[dict], in_one: bool
) -> dict[str, dict]:
    """The manifest's entries of a kind, once its tensors are in one file, or have an index."""
    places: dict[str, list[tuple[int, int, str | None]]] = {name: [] for name in parts}
    for answer in answers:
        for name, (start, stop) in answer["rows"].items():
            places[name].append((start, stop, answer["file"]))
    places = {name: sorted(some, key=lambda place: place[:2]) for name, some in places.items()}
    if not in_one:
        index = {
            name: {"shape": list(parts[name].shape), "parts": [[file, start, stop] for start, stop, file in some]}
            for name, some in places.items()
        }
        written = {answer["file"]: Written(answer["sha256"], answer["bytes"]) for answer in answers if answer["file"]}
        name = f"{kind}.safetensors.index.json"
        written[name] = write_bytes(partial / name, [json.dumps(index).encode()])
    else:
        name = f"{kind}.safetensors"
        entries = {
            key: Entry(part.tensor.dtype, part.shape, _pieces(partial, key, part, places[key]))
            for key, part in parts.items()
        }
        written = {name: write_tensors(partial / name, entries)}
        for answer in answers:
            if answer["file"]:
                (partial / answer["file"]).unlink()
    return {name: file._asdict() for name, file in written.items()}


def _pieces(partial: Path, name: str, part: TensorShard, places: list[tuple[int, int, str | None]]) -> Iterator[Tensor]:
    """A tensor's rows: the main process's own from memory, the others' from their files."""
    for _, _, file in places:
        if file is None:
            yield part.tensor
        else:
            with safe_open(partial / file, framework="pt") as opened:
                yield opened.get_tensor(name)


def _finish(partial: Path, target: Path, manifest: dict[str, dict], state: dict) -> None:
    """What makes it a checkpoint: the state, then the manifest, then its name, each durable before the next."""
    manifest["state.json"] = write_bytes(partial / "state.json", [json.dumps(state, indent=1).encode()])._asdict()
    write_bytes(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    fsync_path(partial)
    partial.rename(target)
    fsync_path(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a save or a removal that was killed left."""
    for leftover in folder.glob(".step-*"):
        remove(leftover)


def prune(folder: Path, keep: int, best_step: int | None, whole: Callable[[Path], bool] = is_complete) -> None:
    """Remove all but the newest `keep` and the best of those that are whole; the others do not count, and stay."""
    whole = [(step, path) for step, path in list_checkpoints(folder) if whole(path)]
    for step, path in whole[:-keep]:
        if step != best_step:
            remove(path.rename(folder / f".{path.name}.old"))
