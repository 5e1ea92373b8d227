"""Reading checkpoints, whole or the rows that a process needs; finding those that are whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Set
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.checkpoint.parts import KINDS, MANIFEST, Written
from training.errors import UserError
from training.files import fsync_path

Rows = tuple[int, int]


class Checkpoint(NamedTuple):
    """Everything a run needs to go on: named tensors, and JSON for the rest (with "step")."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises UserError naming the file that is missing or not what the manifest says."""
    if problem := corruption(path):
        raise UserError(problem)
    return load_unchecked(path)


def load_unchecked(path: Path) -> Checkpoint:
    """Read a checkpoint that was found whole."""
    return Checkpoint(read_tensors(path, "model"), read_tensors(path, "optimizer"), read_state(path))


def read_state(path: Path) -> dict:
    """What a checkpoint that was found whole says beside tensors."""
    return json.loads((path / "state.json").read_text())


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """The tensors of a kind, "model" or "optimizer", and the shapes of the whole ones."""
    return {name: shape for name, (shape, _) in _index(path, kind).items()}


def read_tensors(path: Path, kind: str, wanted: dict[str, Rows | None] | None = None) -> dict[str, Tensor]:
    """Rows start .. stop - 1 of the named tensors, or where that is None the whole; of all, where none are named.

    Nothing else is read. Raises KeyError for a tensor that is not there.
    """
    index = _index(path, kind)
    wanted = dict.fromkeys(index) if wanted is None else wanted
    with ExitStack() as open_files:
        files = {
            file: open_files.enter_context(_opened(path / file))
            for file in dict.fromkeys(file for _, places in index.values() for file, _, _ in places)
        }
        try:
            return {name: _rows(files, name, *index[name], rows) for name, rows in wanted.items()}
        except SafetensorError as error:
            raise UserError(f"{path}: its files of tensors are not what their index says: {error}") from None


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a file of tensors: {error}") from None


def _rows(files: dict, name: str, shape: torch.Size, places: list[tuple[str, int, int]], rows: Rows | None) -> Tensor:
    """Some rows of a tensor, of all files that have some of them."""
    if not shape:
        return files[places[0][0]].get_tensor(name)
    start, stop = rows or (0, shape[0])
    found = []
    for file, first, last in places:
        low, high = max(start, first), min(stop, last)
        if low < high:
            found.append(files[file].get_slice(name)[low - first : high - first])
    if not found:
        return files[places[0][0]].get_slice(name)[:0]
    return found[0] if len(found) == 1 else torch.cat(found)


def _index(path: Path, kind: str) -> dict[str, tuple[torch.Size, list[tuple[str, int, int]]]]:
    """Each tensor's shape, and its (file, first row, last row + 1), in the order of the rows."""
    index = path / f"{kind}.safetensors.index.json"
    if index.exists():
        try:
            listed = json.loads((path / MANIFEST).read_bytes()).keys()
            return {name: _places(listed, **entry) for name, entry in json.loads(index.read_bytes()).items()}
        except (ValueError, TypeError, AttributeError, RuntimeError):  # RecursionError is one, torch.Size's another
            raise UserError(f"{index}: damaged: not an index of tensors in files of this folder") from None
    file = f"{kind}.safetensors"
    with _opened(path / file) as opened:
        shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return {name: (shape, [(file, 0, shape[0] if shape else 1)]) for name, shape in shapes.items()}


def _places(listed: Set[str], shape: list[int], parts: list) -> tuple[torch.Size, list[tuple[str, int, int]]]:
    """An entry of an index. Raises ValueError or TypeError where it is none, or names what the manifest does not."""
    places = [(file, int(first), int(last)) for file, first, last in parts]
    if not places or {file for file, _, _ in places} - listed:
        raise ValueError
    return torch.Size(shape), places


def corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, in one line that names the file; None where it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name in ("state.json", *manifest):  # one that lists nothing is none
            if Path(name).name != name or (path / name).is_symlink() or (path / name).is_fifo():
                return f"{path / MANIFEST}: damaged: {name!r} is no file of this folder"
            if file_entry(path / name) != manifest[name]:
                return f"{path / name}: damaged: its size and SHA-256 are not those in {MANIFEST}"
        if kinds := [kind for kind in KINDS if not any(name.startswith(kind) for name in manifest)]:
            return f"{path / MANIFEST}: damaged: it lists no {kinds[0]}"
        if type(step := read_state(path)["step"]) is not int or step < 0:
            return f"{path / 'state.json'}: damaged: not the state of a step"
        if re.fullmatch(r"step-\d+", path.name) and step != int(path.name[5:]):
            return f"{path}: damaged: it is the checkpoint of another step"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{path / MANIFEST}: damaged: not a checkpoint's manifest"
    return None


def is_complete(path: Path) -> bool:
    """Whether all files are there in their sizes, which costs next to nothing to see."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return all((path / name).stat().st_size == manifest[name]["bytes"] for name in ("state.json", *manifest))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, (step, path), oldest first; whole or not."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted((int(path.name[5:]), path) for path in found)


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is damaged; None where there is none.

    Raises UserError where there are checkpoints and all are damaged: never a silent fresh start.
    """
    found = list_checkpoints(folder)
    for _, path in reversed(found):
        problem = corruption(path)
        if problem is None:
            return path
        warn(f"{problem}; falling back to the checkpoint before it")
    if found:
        raise UserError(f"{folder}: no checkpoint is whole")
    return None


def quarantine(folder: Path, after: int, why: str) -> None:
    """Rename the checkpoints after a step, the newest first, so that they no longer count; nothing is removed."""
    for step, path in reversed(list_checkpoints(folder)):
        if step > after:
            names = (folder / f"{why}-{n}-{path.name}" for n in itertools.count())
            path.rename(next(name for name in names if not name.exists()))
            fsync_path(folder)


def file_entry(path: Path) -> dict[str, str | int]:
    """A file, as a manifest has it."""
    with path.open("rb") as file:
        return Written(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())._asdict()
