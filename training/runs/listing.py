"""Find the runs of a folder, and read what their files say."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.files import is_locked, read_bytes
from training.logging.jsonl import read_history

STATES = ("running", "finished", "stopped")
MARK = "metrics.jsonl"  # a folder with this file is a run's


@dataclass(frozen=True)
class RunEntry:
    """A run as its files describe it. A figure is None if the run has not measured it."""

    name: str  # its path below the folder of runs
    folder: Path
    state: str  # one of STATES; stopped: it is not finished, and no process trains it
    step: int
    steps: int | None
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_s: float | None
    bytes: int  # on disk
    age_s: float  # since the last row was written
    data: str | None  # fingerprint of its text
    cache_dir: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return asdict(self) | {"folder": str(self.folder)}


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs in `folder`, itself included, at any depth and in order; hidden ones are left out."""
    for path, names, files in os.walk(folder):
        if MARK in files:
            names.clear()  # a run has no runs inside
            yield Path(path)
        names[:] = sorted(name for name in names if not name.startswith("."))


def read_run(path: Path, folder: Path) -> RunEntry:
    """Return the entry of the run at `path`, named by its path in `folder`."""
    summary, info, state = _read(path / "summary.json"), _read(path / "run.json"), _latest_state(path)
    history = read_history(path / MARK)
    newest, losses = history.newest(), history.points("val_loss")
    steps = _number(info, "steps")
    is_complete = summary.get("steps") == steps or summary.get("stopped_early", False)
    is_finished = steps is not None and is_complete and history.last_step == summary.get("steps")
    best = _number(summary, "best_val_loss") if is_finished else min((value for _, value in losses), default=None)
    return RunEntry(
        name=path.relative_to(folder).as_posix() if path != folder else path.name,
        folder=path,
        state="running" if is_locked(path) else "finished" if is_finished else "stopped",
        step=history.last_step,
        steps=steps,
        loss=newest.get("loss"),
        val_loss=newest.get("val_loss"),
        best_val_loss=best,
        tokens_per_s=_number(summary, "tokens_per_s") if is_finished else newest.get("tokens_per_s"),
        bytes=disk_bytes(path),
        age_s=max(0.0, time.time() - (path / MARK).stat().st_mtime),
        data=_at(info, "facts", "data") or state.get("data"),
        cache_dir=_at(state, "config", "data", "cache_dir"),
    )


def disk_bytes(folder: Path) -> int:
    """Return the size of all files in a folder; links are not followed."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a run in training has just removed it
                total += Path(path, name).lstat().st_size
    return total


def _latest_state(path: Path) -> dict[str, Any]:
    states = sorted((path / "checkpoints").glob("step-*/state.json"))
    return _read(states[-1]) if states else {}


def _read(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; {} if there is none, or another version's or a damaged one."""
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(content: dict[str, Any], name: str) -> Any:
    """Return a number of a JSON object; None for another value."""
    value = content.get(name)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _at(value: Any, *names: str) -> Any:
    """Return what is in nested dicts at these names; None if there is nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
