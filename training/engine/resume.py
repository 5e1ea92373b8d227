"""A run's folder, and whether what is in it may go on.

A restart may change how a run is carried out, never what it computes: `config.CHANGEABLE_ON_RESUME` says which
options are which.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, NamedTuple

from training import checkpoint
from training.config import CHANGEABLE_ON_RESUME, Config
from training.distributed.world import World
from training.errors import UserError
from training.files import fsync_path, write_errors_as_user_errors
from training.options import cli
from training.options.schema import flatten_options

if TYPE_CHECKING:
    from training.engine.build import Run


# What is in a checkpoint's state.json, and what not every version's has.
STATE = {
    "step": int, "time_s": int | float, "best": dict | None, "last_row": dict, "loss_scale": dict | None, "skips": dict,
    "data": str, "config": dict,
}  # fmt: skip
MAY_HAVE = {"ledger": dict, "kernels": dict, "micro_batch": dict}


class Found(NamedTuple):
    """What a run goes on from."""

    path: Path
    own: bool  # whether it is the run's own checkpoint
    state: dict


def agreed(config: Config, resume: str, world: World) -> Found | None:
    """What all ranks go on from: the main one looks, so that one reads and checks the files. Collective.

    Nothing is changed by it. Raises UserError, on the main rank alone, as `find`.
    """
    answer = find(config, resume) if world.is_main and resume != "never" else None
    if (told := world.broadcast(answer and [str(answer[0]), answer[1]])) is None:
        return None
    path, own = Path(told[0]), told[1]
    state = checkpoint.read_state(path)
    kinds = [(state[name], kind) for name, kind in (STATE | MAY_HAVE).items() if name in state]
    if STATE.keys() - state.keys() or not all(isinstance(value, kind) for value, kind in kinds):
        raise UserError(f"{path / 'state.json'}: not the state of a run; start over with --resume never")
    return Found(path, own, state)


def find(config: Config, resume: str) -> tuple[Path, bool] | None:
    """(the checkpoint that the run goes on from, whether it is the run's own); None: it begins.

    `resume` is auto, or the path of a checkpoint or a run. A checkpoint of this run is gone back to; another run's
    begins this one, unless it has a checkpoint of its own already. Raises UserError where every checkpoint is damaged.
    """
    folder = config.run_dir / "checkpoints"
    asked = None if resume == "auto" else _checkpoint_at(Path(resume), print)
    if asked is not None and (problem := checkpoint.corruption(asked)):
        raise UserError(problem)
    if asked is not None and asked.parent.resolve() == folder.resolve():
        return asked, True
    try:
        own = checkpoint.latest(folder, print)
    except UserError as error:
        raise UserError(f"{error}; start over with --resume never") from error
    if own is not None:
        if asked is not None:
            print(f"{config.run_dir}: goes on from its own {own.name}; --resume {resume} was for its beginning")
        return own, True
    if asked is None:
        return None
    step = checkpoint.read_state(asked)["step"]
    if step >= config.steps:
        raise UserError(f"--resume {resume}: it is at step {step}, and steps is {config.steps}")
    return asked, False


def make_way(config: Config, resume: str, found: Found | None) -> None:
    """What changes the folder, once nothing refuses the run any more: where it starts over, an old one is moved aside;
    checkpoints past the one that it goes on from, which are damaged or undone, no longer count.
    """
    folder = config.run_dir
    with write_errors_as_user_errors(folder):
        if resume == "never":
            move_aside(folder)
        elif found is not None and found.own:
            checkpoint.remove_leftovers(folder / "checkpoints")
            checkpoint.quarantine(found.path.parent, found.state["step"], "damaged" if resume == "auto" else "undone")


def refuse_another(config: Config, fingerprint: str) -> None:
    """Raise UserError where the folder holds another run's rows, though no checkpoint yet."""
    folder = config.run_dir
    rows, kept = folder / "metrics.jsonl", folder / "config.yaml"
    if rows.exists() and rows.stat().st_size and kept.exists():
        refuse_changes(
            config, fingerprint, {"config": cli.load_config(kept).model_dump(mode="json"), "data": fingerprint}
        )


def stopped(run: Run, number: int, resume: str) -> None:
    """Say that a signal ended the run, and how it goes on."""
    if run.world.is_main:
        command = "the same command" if resume == "auto" else "the same command without --resume"
        print(f"stopped by {Signals(number).name}, saved after step {run.step}; {command} goes on", flush=True)


def refuse_changes(config: Config, fingerprint: str, state: dict) -> None:
    """Raise UserError, listing them, where options or data that a restart may not change have changed."""
    was, now = dict(flatten_options(state["config"])), dict(flatten_options(config.model_dump(mode="json")))
    changed = [
        f"{key}: {was.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not _may_change(key)
    ]
    if not changed and state["data"] != fingerprint:
        changed = ["data: the text or the tokenizer is not what it was"]
    if changed:
        raise UserError(
            f"{config.run_dir} holds a run with other options: {'; '.join(changed)}; "
            "choose another --name (with --resume to begin with this one's checkpoint), or --resume never to start over"
        )


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in CHANGEABLE_ON_RESUME for n in range(1, len(parts) + 1))


def move_aside(folder: Path) -> None:
    """Give a used folder another name, so that nothing is lost."""
    if not folder.exists():
        return
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(aside)
    fsync_path(folder.parent)
    print(f"{folder}: the run that was here is now {aside}")


def _checkpoint_at(path: Path, warn: Callable[[str], None]) -> Path:
    """The checkpoint that a path means: itself, or the newest of the run it is the folder of."""
    if (path / "checkpoints").is_dir():
        path = checkpoint.latest(path / "checkpoints", warn) or path
    if not (path / checkpoint.MANIFEST).is_file():
        raise UserError(f"--resume {path}: neither auto, never, a checkpoint nor a run with one")
    return path
