"""Find, verify and read checkpoints: all tensors, or only the rows that a rank needs."""

import hashlib
import json
import re
from collections.abc import Callable, Set
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.errors import UserError
from training.files import read_bytes, rename_to_free_name

MANIFEST = "manifest.json"
KINDS = ("model", "optimizer")  # of tensors; each has its own files
Location = tuple[str, int, int]  # file, first row and last row + 1 of a part of a tensor; a scalar is one row
MALFORMED = (ValueError, KeyError, TypeError, RecursionError)  # raised by JSON that this package did not write


class Checkpoint(NamedTuple):
    """Everything that a run needs to resume."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict  # JSON, with "step"


def load(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint. Raises UserError that names a missing or damaged file; `verify=False` does not look."""
    if verify and (problem := corruption(path)):
        raise UserError(problem)
    return Checkpoint(read_tensors(path, "model"), read_tensors(path, "optimizer"), read_state(path))


def step_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint in a folder of checkpoints."""
    return folder / f"step-{step:08d}"


def read_state(path: Path) -> dict:
    """Read the JSON state of a checkpoint that is known to be intact."""
    return json.loads(read_bytes(path / "state.json"))


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """Return the full shape of each tensor of a kind, "model" or "optimizer"."""
    return {name: shape for name, (shape, _) in _index(path, kind).items()}


def read_tensors(path: Path, kind: str, rows: dict[str, tuple[int, int] | None] | None = None) -> dict[str, Tensor]:
    """Read rows (start, stop), or None for all, of each named tensor; by default all. Raises KeyError for another."""
    index = _index(path, kind)
    rows = dict.fromkeys(index) if rows is None else rows
    names = dict.fromkeys(file for _, locations in index.values() for file, _, _ in locations)
    with ExitStack() as open_files:
        files = {name: open_files.enter_context(_open(path / name)) for name in names}
        try:
            return {name: _read_rows(files, name, *index[name], span) for name, span in rows.items()}
        except SafetensorError as error:
            raise UserError(f"{path}: its tensor files do not match their index: {error}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None


def _read_rows(
    files: dict, name: str, shape: torch.Size, locations: list[Location], rows: tuple[int, int] | None
) -> Tensor:
    if not shape:
        return files[locations[0][0]].get_tensor(name)
    first, last = rows or (0, shape[0])
    parts = [
        files[file].get_slice(name)[max(first, start) - start : min(last, stop) - start]
        for file, start, stop in locations
        if max(first, start) < min(last, stop)
    ] or [files[locations[0][0]].get_slice(name)[:0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _index(path: Path, kind: str) -> dict[str, tuple[torch.Size, list[Location]]]:
    """Return each tensor's shape and the locations of its rows, in order."""
    index = path / f"{kind}.safetensors.index.json"
    if index.exists():
        try:
            listed = json.loads(read_bytes(path / MANIFEST)).keys()
            return {name: _locations(listed, **entry) for name, entry in json.loads(read_bytes(index)).items()}
        except (*MALFORMED, AttributeError, RuntimeError):  # torch.Size raises RuntimeError
            raise UserError(f"{index}: damaged: not an index of tensors in files of this folder") from None
    file = f"{kind}.safetensors"
    with _open(path / file) as opened:
        shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return {name: (shape, [(file, 0, shape[0] if shape else 1)]) for name, shape in shapes.items()}


def _locations(listed: Set[str], shape: list[int], parts: list) -> tuple[torch.Size, list[Location]]:
    """Parse an index entry. Raises ValueError for a file that the manifest does not list."""
    locations = [(file, int(start), int(stop)) for file, start, stop in parts]
    if not locations or {file for file, _, _ in locations} - listed:
        raise ValueError
    return torch.Size(shape), locations


def corruption(path: Path) -> str | None:
    """Hash every file of a checkpoint; return one line that names the damaged file, None if all are intact."""
    try:
        manifest = json.loads(read_bytes(path / MANIFEST))
        for name in ("state.json", *manifest):  # a manifest without state.json is damaged
            if Path(name).name != name or (path / name).is_symlink() or (path / name).is_fifo():
                return f"{path / MANIFEST}: damaged: {name!r} is no file of this folder"
            if file_entry(path / name) != manifest[name]:
                return f"{path / name}: damaged: its size and SHA-256 are not those in {MANIFEST}"
        if missing := [kind for kind in KINDS if not any(name.startswith(kind) for name in manifest)]:
            return f"{path / MANIFEST}: damaged: it lists no {missing[0]}"
        if type(step := read_state(path)["step"]) is not int or step < 0:
            return f"{path / 'state.json'}: damaged: not the state of a step"
        if re.fullmatch("step-[0-9]+", path.name) and step != int(path.name[5:]):
            return f"{path}: damaged: it is the checkpoint of another step"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except MALFORMED:
        return f"{path / MANIFEST}: damaged: not a checkpoint's manifest"
    return None


def file_entry(path: Path) -> dict[str, str | int]:
    """Hash a file; return its entry in a manifest, "bytes" being its size."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def is_complete(path: Path) -> bool:
    """Return True if all files of a checkpoint have the sizes in its manifest. Reads no tensor."""
    try:
        manifest = json.loads(read_bytes(path / MANIFEST))
        return all((path / name).stat().st_size == manifest[name]["bytes"] for name in ("state.json", *manifest))
    except (OSError, *MALFORMED):
        return False


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of each checkpoint in a folder, oldest first; damaged ones too."""
    paths = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch("step-[0-9]+", path.name)]
    return sorted((int(path.name[5:]), path) for path in paths)


def is_kept_for_good(step: int, best_step: int | None, keep_every: int | None) -> bool:
    """Return True for a checkpoint that newer ones never displace: the best, and each `keep_every`-th step."""
    return step == best_step or (keep_every is not None and step % keep_every == 0)


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint, None if the folder is empty. Calls `warn` for each newer, damaged one.

    Raises UserError if all are damaged: a run must not silently start over.
    """
    checkpoints = list_checkpoints(folder)
    for _, path in reversed(checkpoints):
        if (problem := corruption(path)) is None:
            return path
        warn(f"{problem}; falling back to the checkpoint before it")
    if checkpoints:
        raise UserError(f"{folder}: every checkpoint is damaged")
    return None


def quarantine(folder: Path, after: int, reason: str) -> None:
    """Rename the checkpoints after step `after`, newest first, to `reason`-n-step-N. Nothing is removed."""
    for step, path in reversed(list_checkpoints(folder)):
        if step > after:
            rename_to_free_name(path, lambda n, name=path.name: f"{reason}-{n}-{name}", first=0)
