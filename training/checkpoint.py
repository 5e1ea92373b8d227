"""Checkpoints: saved whole or not at all, verified before they are used, no pickle anywhere.

A checkpoint is a folder `step-00000120` of safetensors and JSON. It is written under a temporary name;
its manifest, with the SHA-256 of every file, comes last; then it gets its name. So a folder with that
name is whole unless the disk failed, and the manifest tells.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import UserError
from training.files import whole_folder

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """Everything a run needs to go on: named tensors, and JSON for the rest (with "step")."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder`/step-N, replacing nothing; returns its path.

    Raises UserError, with the temporary folder removed, where the disk refuses.
    """
    target = folder / f"step-{checkpoint.state['step']:08d}"
    if target.exists():
        return target
    try:
        for leftover in folder.glob(".step-*"):  # of a save or a removal that was killed
            shutil.rmtree(leftover)
        with whole_folder(target) as partial:
            save_file(checkpoint.model, partial / "model.safetensors")
            save_file(checkpoint.optimizer, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
            files = sorted(partial.iterdir())
            manifest = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: the checkpoint could not be saved: {error}") from error
    return target


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises UserError naming the file that is missing or not what the manifest says."""
    if problem := damage(path):
        raise UserError(problem)
    return read(path)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that was found whole."""
    return Checkpoint(
        load_file(path / "model.safetensors"),
        load_file(path / "optimizer.safetensors"),
        json.loads((path / "state.json").read_text()),
    )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in one line that names the file; None where it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            if _sha256(path / name) != manifest[name]["sha256"]:
                return f"{path / name}: damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{path / MANIFEST}: damaged: not a checkpoint's manifest"
    return None


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, (step, path), oldest first; whole or not."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted((int(path.name[5:]), path) for path in found)


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is damaged; None where there is none.

    Raises UserError where there are checkpoints and all are damaged: never a silent fresh start.
    """
    found = steps(folder)
    for _, path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"{problem}; falling back to the checkpoint before it")
    if found:
        raise UserError(f"{folder}: no checkpoint is whole")
    return None


def set_aside(folder: Path, after: int, why: str) -> None:
    """Rename the checkpoints after a step, so that they no longer count; nothing is removed."""
    for step, path in steps(folder):
        if step > after:
            n = sum(1 for _ in folder.glob(f"{why}-*{path.name}"))
            path.rename(folder / f"{why}-{n}-{path.name}")


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best. Damaged ones were set aside when the run began."""
    for step, path in steps(folder)[:-keep]:
        if step != best_step:
            shutil.rmtree(path.rename(folder / f".{path.name}.old"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
