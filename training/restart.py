"""A run's folder, and whether what is in it may go on.

A restart may change how a run is carried out, never what it computes: `config.MAY_CHANGE` says which
options are which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training import checkpoint
from training.checkpoint import Checkpoint
from training.config import MAY_CHANGE, Config
from training.errors import UserError


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.out_dir, config.name)


def find(config: Config, resume: str, warn: Callable[[str], None]) -> tuple[Checkpoint | None, bool]:
    """(what the run goes on from, whether it is the run's own); None: it begins.

    `resume` is auto, never, or the path of a checkpoint or a run, which begins this run if it has no checkpoint
    of its own yet. Raises UserError where no checkpoint is whole.
    """
    folder = folder_of(config)
    if own := checkpoint.newest(folder / "checkpoints", warn):
        return checkpoint.read(own), True
    return (None if resume in ("auto", "never") else checkpoint.load(_checkpoint_at(Path(resume)))), False


def refuse_changes(config: Config, fingerprint: str, state: dict) -> None:
    """Raise UserError, listing them, where options or data that a restart may not change have changed."""
    was, now = dict(_leaves(state["config"])), dict(_leaves(config.model_dump(mode="json")))
    changed = [
        f"{key}: {was.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not _may_change(key)
    ]
    if not changed and state["data"] != fingerprint:
        changed = ["data: the text or the tokenizer is not what it was"]
    if changed:
        raise UserError(
            f"{folder_of(config)} holds a run with other options: {'; '.join(changed)}; "
            "choose another --name, or --resume never to start over"
        )


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in MAY_CHANGE for n in range(1, len(parts) + 1))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple) and tree:
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{prefix}.{i}")
    else:
        yield prefix, None if tree in ((), [], {}) else tree


def move_aside(folder: Path) -> None:
    """Give a used folder another name, so that nothing is lost."""
    if not folder.exists():
        return
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(aside)
    print(f"{folder}: the run that was here is now {aside}")


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of the run it is the folder of."""
    if (path / "checkpoints").is_dir():
        path = checkpoint.newest(path / "checkpoints", warn=print) or path
    if not (path / checkpoint.MANIFEST).is_file():
        raise UserError(f"--resume {path}: no checkpoint and no run with one; see ls runs/*/checkpoints")
    return path
