"""Decide where a run starts: from scratch, or from a checkpoint of its own or of another run.

A restart may change how a run is executed, never what it computes: `config.CHANGEABLE_ON_RESUME` lists the options
that may differ. Other options may be written otherwise if they mean the same: paths to the same text, tokenizer or
weights by their hashes, a pattern of the same layers, weights of the same proportions.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from training import checkpoint
from training.config import CHANGEABLE_ON_RESUME, Config
from training.data import Dataset
from training.data.loader import Mixture
from training.distributed.world import World
from training.engine.state import TrainState
from training.errors import UserError
from training.files import rename_to_free_name, write_errors_as_user_errors
from training.options import cli
from training.options.schema import flatten_options
from training.terminal import print_line
from training.weights.hf.architecture import pattern
from training.weights.init_from import weights_sha256

ENDLESS = ("constant", "inverse_sqrt")  # schedules in which no step depends on `steps`


class ResumePoint(NamedTuple):
    """The checkpoint that a run starts from."""

    path: Path
    is_own: bool  # the run's own checkpoint, not another run's
    state: TrainState  # without another run's best loss and kernels


def find_resume_point(config: Config, resume: str, world: World) -> ResumePoint | None:
    """Return the checkpoint to start from, found and verified by the main rank; None to start from scratch.

    `resume` is "auto", "never" or the path of a checkpoint or run. A checkpoint of this run takes the run back to it.
    One of another run is used only until this run has checkpoints of its own. Changes no file. Raises UserError if no
    checkpoint is intact, on the main rank only. Collective.
    """
    location = _find(config, resume) if world.is_main and resume != "never" else None
    location = world.broadcast(location and (str(location[0]), location[1]))
    if location is None:
        return None
    path, is_own = Path(location[0]), location[1]
    state = TrainState.load(path / "state.json")
    if not is_own:
        state.best, state.kernels = None, {}
    return ResumePoint(path, is_own, state)


def _find(config: Config, resume: str) -> tuple[Path, bool] | None:
    """Return the path of the checkpoint to start from, and whether it is the run's own."""
    folder, requested = config.run_dir / "checkpoints", None
    if resume != "auto":
        requested = Path(resume)
        if (requested / "checkpoints").is_dir():
            requested = checkpoint.latest(requested / "checkpoints", print_line) or requested
        if not (requested / checkpoint.MANIFEST).is_file():
            raise UserError(f"--resume {requested}: not auto, never, a checkpoint, or a run with a checkpoint")
        if problem := checkpoint.corruption(requested):
            raise UserError(problem)
        if requested.parent.resolve() == folder.resolve():
            return requested, True
    try:
        own = checkpoint.latest(folder, print_line)
    except UserError as error:
        raise UserError(f"{error}; start over with --resume never") from error
    if own is not None:
        if requested is not None:
            print_line(
                f"{config.run_dir}: resuming from its own {own.name}; --resume {resume} only mattered at its start"
            )
        return own, True
    if requested is not None and (step := checkpoint.read_state(requested)["step"]) >= config.steps:
        raise UserError(f"--resume {resume}: it is at step {step}, and steps is {config.steps}; raise steps")
    return None if requested is None else (requested, False)


def prepare_run_dir(config: Config, resume: str, point: ResumePoint | None) -> None:
    """Prepare the run's folder, after all checks: move an old run, or checkpoints past the resume point, aside."""
    folder = config.run_dir
    with write_errors_as_user_errors(folder):
        if resume == "never" and folder.exists():
            aside = rename_to_free_name(folder, lambda n: f"{folder.name}.old-{n}")
            print_line(f"{folder}: moved the earlier run to {aside}")
        elif point is not None and point.is_own:
            checkpoint.remove_leftovers(folder / "checkpoints")
            checkpoint.quarantine(point.path.parent, point.state.step, "damaged" if resume == "auto" else "undone")


def check_same_run(config: Config, dataset: Dataset, resume: str, point: ResumePoint | None) -> None:
    """Raise UserError with a list of the changed options or data that a restart may not change.

    `config` is resolved. Compares a run that has rows, but no checkpoint, by its config.yaml.
    """
    rows, stored = config.run_dir / "metrics.jsonl", config.run_dir / "config.yaml"
    ignored = set(CHANGEABLE_ON_RESUME)
    if point is not None and point.is_own:
        old, has_same_data = point.state.config, dataset.is_same_as(point.state.data)
        if has_same_data:
            ignored.add("data")
        was_moved = config.init_from not in (None, old.get("init_from"))
        if was_moved and point.state.init_from_sha256 == weights_sha256(config):
            ignored.add("init_from")
        if config.schedule.type in ENDLESS and config.steps > point.state.step:
            ignored.add("steps")
    elif point is None and resume != "never" and rows.exists() and rows.stat().st_size and stored.exists():
        try:
            old, has_same_data = cli.load_config(stored).model_dump(mode="json"), True
        except UserError:  # damaged: this run starts from its first step anyway
            return
    else:
        return
    with suppress(ValidationError):  # of another version: compare the options as stored
        old = comparable(Config.model_validate(old))
    before, now = dict(flatten_options(old)), dict(flatten_options(comparable(config)))
    changes = [
        f"{key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{option}.") for option in ignored)
    ]
    if not changes and not has_same_data:
        changes = ["data: the text or the tokenizer has changed"]
    if changes:
        raise UserError(
            f"{config.run_dir} holds a run with other options: {'; '.join(changes)}; choose another --name (with "
            "--resume to start from this one's checkpoint), or --resume never to start over"
        )


def comparable(config: Config) -> dict[str, Any]:
    """Return the options, so that options with the same meaning are equal."""
    config = config.resolved()
    options = config.model_dump(mode="json")
    options["model"]["blocks"] = pattern([b.model_dump(mode="json", exclude={"repeat"}) for b in config.model.layers()])
    if weights := [source.weight for source in config.data.sources if source.weight]:
        options["proportions of data.sources"] = Mixture(weights, config.seed).share.tolist()
    for source in options["data"]["sources"]:
        source.pop("weight")
    return options
