"""Decide where a run starts: from scratch, or from a checkpoint of its own or of another run.

A restart may change how a run is executed, never what it computes: `config.CHANGEABLE_ON_RESUME` lists the options
that may differ. Other options may be written otherwise if they mean the same: paths to the same text, tokenizer or
weights by their hashes, a pattern of the same layers, weights of the same proportions. `steps` and the schedule may
change where every finished step stays what it would have been (`longer.py`). Other options need a branch (`branch.py`).
"""

from pathlib import Path
from typing import Literal, NamedTuple

from training import checkpoint
from training.checkpoint import RemoteRun
from training.config import Config
from training.data import Dataset
from training.distributed.world import World
from training.engine.branch import check_own
from training.engine.changes import changed_options
from training.engine.longer import find_extension, parse_options
from training.engine.state import TrainState
from training.errors import UserError
from training.files import rename_to_free_name, write_errors_as_user_errors
from training.options import cli
from training.terminal import print_line
from training.weights.init_from import weights_sha256


class Location(NamedTuple):
    """A checkpoint to start from."""

    path: str
    kind: Literal["own", "other", "branch"]  # of this run, or of another one
    n_common: int | None = None  # steps that have the same learning rates as when the run did them; None: all
    is_earlier: bool = False  # later checkpoints have begun a decay that these options do not have there


class ResumePoint(NamedTuple):
    """The checkpoint that a run starts from."""

    path: Path
    location: Location
    state: TrainState  # without another run's best loss and kernels

    @property
    def is_own(self) -> bool:
        """True for the run's own checkpoint."""
        return self.location.kind == "own"

    @property
    def is_branch(self) -> bool:
        """True for the checkpoint of the run that this one branches off from."""
        return self.location.kind == "branch"


def find_resume_point(config: Config, resume: str, world: World, branch: str | None = None) -> ResumePoint | None:
    """Return the checkpoint to start from, found and verified by the main rank; None to start from scratch.

    `resume` is "auto", "never" or the path of a checkpoint or run. A checkpoint of this run takes the run back to it.
    One of another run, also that of `branch`, is used only until this run has checkpoints of its own. Changes no file.
    Raises UserError if no checkpoint is intact, on the main rank only. Collective.
    """
    location = _find(config, resume, branch) if world.is_main and (branch or resume != "never") else None
    location = world.broadcast(location and tuple(location))
    if location is None:
        return None
    location = Location(*location)
    path = Path(location.path)
    state = TrainState.load(path / "state.json")
    if location.kind == "other":
        state.best, state.kernels = None, {}
    return ResumePoint(path, location, state)


def _find(config: Config, resume: str, branch: str | None) -> Location | None:
    """Return the checkpoint to start from."""
    folder, requested = config.run_dir / "checkpoints", None
    if branch is not None and Path(branch).resolve().is_relative_to(config.run_dir.resolve()):
        raise UserError(f"--branch {branch}: a run cannot branch off from itself; choose another --name")
    if resume not in ("auto", "never"):
        requested = _named_checkpoint(resume, "--resume", "auto, never, a checkpoint, or a run with a checkpoint")
        if requested.parent.resolve() == folder.resolve():
            return _own(requested, config, goes_back=False)
    if resume != "never":
        try:
            own = checkpoint.latest(folder, print_line)
        except UserError as error:
            raise UserError(f"{error}; start over with --resume never") from error
        if own is not None:
            if branch is not None:
                print_line(check_own(config, branch, own))
            elif requested is not None:
                only = f"--resume {resume} only mattered at its start"
                print_line(f"{config.run_dir}: resuming from its own {own.name}; {only}")
            return _own(own, config, goes_back=True)
    if branch is not None:
        requested = _named_checkpoint(branch, "--branch", "a checkpoint, or a run with a checkpoint")
    if requested is None:
        return None
    if (step := checkpoint.read_state(requested)["step"]) >= config.steps:
        flag = f"--resume {resume}" if branch is None else f"--branch {branch}"
        more = f"they count from its beginning, so give more, such as --steps {2 * step}"
        raise UserError(f"{flag}: it is at step {step}, and steps is {config.steps}; {more}")
    return Location(str(requested), "other" if branch is None else "branch")


def _own(path: Path, config: Config, *, goes_back: bool) -> Location:
    """Return the run's own checkpoint, or with `goes_back` one before a decay that these options do not have there."""
    extension = find_extension(path, config.resolved(), goes_back=goes_back)
    return Location(str(extension.path), "own", extension.n_common, extension.is_earlier)


def _named_checkpoint(name: str, flag: str, allowed: str) -> Path:
    """Return the checkpoint at a path, or the latest one of the run there. Raises UserError if there is none."""
    path = Path(name)
    if (path / "checkpoints").is_dir():
        path = checkpoint.latest(path / "checkpoints", print_line) or path
    if not (path / checkpoint.MANIFEST).is_file():
        raise UserError(f"{flag} {path}: not {allowed}")
    if problem := checkpoint.corruption(path):
        raise UserError(problem)
    return path


def prepare_run_dir(config: Config, resume: str, point: ResumePoint | None, remote: RemoteRun | None) -> None:
    """Prepare the run's folder, after all checks: move an old run, or checkpoints past the resume point, aside.

    Those in its copy, `remote`, as well.
    """
    folder = config.run_dir
    with write_errors_as_user_errors(folder):
        if resume == "never" and folder.exists():
            aside = rename_to_free_name(folder, lambda n: f"{folder.name}.old-{n}")
            print_line(f"{folder}: moved the earlier run to {aside}")
        elif point is not None and point.is_own:
            checkpoint.remove_leftovers(folder / "checkpoints")
            is_wanted = resume != "auto" or point.location.is_earlier
            reason = "undone" if is_wanted else "damaged"
            checkpoint.quarantine(point.path.parent, point.state.step, reason)
            if remote is not None:
                with checkpoint.copy_to_errors():
                    remote.set_aside(point.state.step, reason)
            if point.location.is_earlier:
                decay = f"its learning rate decayed from step {point.location.n_common + 1} on"
                print_line(
                    f"{folder}: {decay}; going on from {point.path.name}, before that; later ones are undone-..."
                )


def check_same_run(
    config: Config, dataset: Dataset, resume: str, point: ResumePoint | None, place: str | None = None
) -> None:
    """Raise UserError with a list of the changed options or data that a restart may not change.

    `config` is resolved; `place` is where the run is, by default its folder. Compares a run that has rows, but no
    checkpoint, by its config.yaml.
    """
    rows, stored = config.run_dir / "metrics.jsonl", config.run_dir / "config.yaml"
    ignored, reason = set(), ""
    if point is not None and point.is_own:
        old, has_same_data = point.state.config, dataset.is_same_as(point.state.data)
        if has_same_data:
            ignored.add("data")
        was_moved = config.init_from not in (None, old.get("init_from"))
        if was_moved and point.state.init_from_sha256 == weights_sha256(config):
            ignored.add("init_from")
        if not (reason := reason_not_to_extend(point, config)):
            ignored |= {"steps", "schedule"}
    elif (point is None or point.is_branch) and resume != "never" and rows.exists() and rows.stat().st_size:
        try:
            old, has_same_data = cli.load_config(stored).model_dump(mode="json"), True
        except UserError:  # missing or damaged: this run starts from its first step anyway
            return
    else:
        return
    changes = changed_options(parse_options(old) or old, config, ignored)
    listed = [f"{key}: {before} -> {now}" for key, (before, now) in changes.items()]
    if not listed and not has_same_data:
        listed = ["data: the text or the tokenizer has changed"]
    if listed:
        if reason and (changes.keys() & {"steps"} or any(key.startswith("schedule.") for key in changes)):
            listed.append(reason)
            if changes.keys() & {"schedule.warmup_steps", "schedule.decay_steps"}:  # shares of the run grow with it
                listed.append(f"{stored} has its warm-up and decay in steps")
        remedy = "--checkpoint.copy_to"
        if place is None:
            checkpoint_of = f"--branch {config.run_dir} to go on from this one's checkpoint"
            remedy = f"--name (with {checkpoint_of}), or --resume never to start over"
        raise UserError(
            f"{place or config.run_dir} holds a run with other options: {'; '.join(listed)}; choose another {remedy}"
        )


def reason_not_to_extend(point: ResumePoint, config: Config) -> str:
    """Return why these steps and this schedule cannot take the run on from its checkpoint; "" if they can."""
    step, n_common = point.state.step, point.location.n_common
    if config.steps <= step and config.steps != point.state.config.get("steps"):
        return f"it has reached step {step}"
    return f"its learning rate was another one from step {n_common + 1} on" if n_common < step else ""
