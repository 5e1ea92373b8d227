"""Decide where a run starts: from scratch, or from a checkpoint of its own or of another run.

A restart may change how a run is executed, never what it computes: `config.CHANGEABLE_ON_RESUME` lists the options
that may differ.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from training import checkpoint
from training.config import CHANGEABLE_ON_RESUME, Config
from training.distributed.world import World
from training.engine.state import TrainState
from training.errors import UserError
from training.files import rename_durable, write_errors_as_user_errors
from training.options import cli
from training.options.schema import flatten_options


class ResumePoint(NamedTuple):
    """The checkpoint that a run starts from."""

    path: Path
    is_own: bool  # the run's own checkpoint, not another run's
    state: TrainState


def find_on_all_ranks(config: Config, resume: str, world: World) -> ResumePoint | None:
    """Return the checkpoint to start from, found and verified by the main rank; None to start from scratch.

    Changes no file. Raises the UserErrors of `find_resume_point`, on the main rank only. Collective.
    """
    location = find_resume_point(config, resume) if world.is_main and resume != "never" else None
    location = world.broadcast(location and [str(location[0]), location[1]])
    if location is None:
        return None
    path, is_own = Path(location[0]), location[1]
    state = TrainState.from_json(checkpoint.read_state(path), path / "state.json", config.skip_spikes)
    return ResumePoint(path, is_own, state)


def find_resume_point(config: Config, resume: str) -> tuple[Path, bool] | None:
    """Return (checkpoint, is it the run's own), or None if there is none to start from.

    `resume` is "auto" or the path of a checkpoint or run. A checkpoint of this run takes the run back to it. One of
    another run is used only until this run has checkpoints of its own. Raises UserError if no checkpoint is intact.
    """
    folder = config.run_dir / "checkpoints"
    requested = None if resume == "auto" else _checkpoint_at(Path(resume), print)
    if requested is not None and (problem := checkpoint.corruption(requested)):
        raise UserError(problem)
    if requested is not None and requested.parent.resolve() == folder.resolve():
        return requested, True
    try:
        own = checkpoint.latest(folder, print)
    except UserError as error:
        raise UserError(f"{error}; start over with --resume never") from error
    if own is not None:
        if requested is not None:
            print(f"{config.run_dir}: resuming from its own {own.name}; --resume {resume} only mattered at its start")
        return own, True
    if requested is None:
        return None
    step = checkpoint.read_state(requested)["step"]
    if step >= config.steps:
        raise UserError(f"--resume {resume}: it is at step {step}, and steps is {config.steps}; raise steps")
    return requested, False


def prepare_run_dir(config: Config, resume: str, point: ResumePoint | None) -> None:
    """Prepare the run's folder, after all checks.

    `never` moves an old run aside. A resume renames checkpoints past the resume point to damaged-... or undone-...
    """
    with write_errors_as_user_errors(config.run_dir):
        if resume == "never":
            _move_aside(config.run_dir)
        elif point is not None and point.is_own:
            checkpoint.remove_leftovers(config.run_dir / "checkpoints")
            label = "damaged" if resume == "auto" else "undone"
            checkpoint.quarantine(point.path.parent, point.state.step, label)


def check_unchanged(config: Config, fingerprint: str, old: dict[str, Any], old_fingerprint: str) -> None:
    """Raise UserError with a list of the changed options or data that a restart may not change.

    `config` is resolved; `old` holds the options of the run in the folder as plain data.
    """
    before, now = (
        dict(flatten_options(_explicit(old))),
        dict(flatten_options(_explicit(config.model_dump(mode="json")))),
    )
    changes = [
        f"{key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_changeable(key)
    ]
    if not changes and old_fingerprint != fingerprint:
        changes = ["data: the text or the tokenizer has changed"]
    if changes:
        raise UserError(
            f"{config.run_dir} holds a run with other options: {'; '.join(changes)}; choose another --name (with "
            "--resume to start from this one's checkpoint), or --resume never to start over"
        )


def check_folder_is_free(config: Config, fingerprint: str) -> None:
    """Raise UserError if the folder holds rows, but no checkpoint, of a run with other options."""
    rows, stored = config.run_dir / "metrics.jsonl", config.run_dir / "config.yaml"
    if rows.exists() and rows.stat().st_size and stored.exists():
        check_unchanged(config, fingerprint, cli.load_config(stored).model_dump(mode="json"), fingerprint)


def _explicit(options: dict[str, Any]) -> dict[str, Any]:
    """Replace every null that stands for a size: older versions stored nulls."""
    try:
        return Config.model_validate(options).with_explicit_sizes().model_dump(mode="json")
    except ValidationError:  # of another version: compare the options as stored
        return options


def _is_changeable(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in CHANGEABLE_ON_RESUME for n in range(1, len(parts) + 1))


def _move_aside(folder: Path) -> None:
    """Rename a used folder to NAME.old-N."""
    if not folder.exists():
        return
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    rename_durable(folder, aside)
    print(f"{folder}: moved the earlier run to {aside}")


def _checkpoint_at(path: Path, warn: Callable[[str], None]) -> Path:
    """Return the checkpoint at a path, or the latest of the run at that path. Raises UserError if there is none."""
    if (path / "checkpoints").is_dir():
        path = checkpoint.latest(path / "checkpoints", warn) or path
    if not (path / checkpoint.MANIFEST).is_file():
        raise UserError(f"--resume {path}: not auto, never, a checkpoint, or a run with a checkpoint")
    return path
