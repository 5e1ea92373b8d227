"""Bring a run's newest checkpoint back from its copy (`checkpoint.copy_to`) to a machine that has none as new."""

from collections.abc import Callable
from pathlib import Path

from training import checkpoint
from training.checkpoint import RemoteRun
from training.config import Config
from training.engine.state import TrainState
from training.errors import UserError
from training.terminal import print_line


def fetch_newest(config: Config, resume: str, check: Callable[[TrainState], None]) -> RemoteRun:
    """Return the run's copy, after fetching its newest intact checkpoint if the run's folder has none as new.

    The run's other files come with it. `check` raises UserError if a state is another run's; then nothing is changed.
    With `--resume never` the copy must be empty, and with the path of an own checkpoint nothing is fetched.
    """
    remote, folder = RemoteRun(config.checkpoint.copy_to), config.run_dir / "checkpoints"
    steps = sorted(remote.complete, reverse=True)
    if not steps:
        return remote
    if resume == "never":
        raise UserError(
            f"{remote.url} holds checkpoints of a run, up to step {steps[0]:,}, which --resume never would overwrite; "
            "remove them, or choose another --checkpoint.copy_to"
        )
    check(read_state(remote, steps[0]))
    if resume != "auto" and Path(resume, checkpoint.MANIFEST).is_file() and is_in(folder, Path(resume)):
        return remote
    for step in steps:
        if step <= newest_step(folder):
            return remote
        print_line(f"{config.run_dir}: fetching step {step:,} from {remote.url}")
        if (problem := remote.fetch(step, config.run_dir)) is None:
            fetch_best(remote, folder, step, config)
            return remote
        print_line(f"{problem}; falling back to the checkpoint before it")
    raise UserError(f"{remote.url}: every checkpoint is damaged; choose another --checkpoint.copy_to to start over")


def fetch_best(remote: RemoteRun, folder: Path, step: int, config: Config) -> None:
    """Fetch the best checkpoint as well, if the final model or the end of the run depends on it."""
    best = TrainState.load(checkpoint.step_path(folder, step) / "state.json").best
    if best is None or (config.checkpoint.final != "best" and config.eval.patience is None):
        return
    if best["step"] in remote.complete and not checkpoint.step_path(folder, best["step"]).exists():
        remote.fetch(best["step"], config.run_dir)  # a damaged one no longer counts, as on a disk


def read_state(remote: RemoteRun, step: int) -> TrainState:
    """Return the state of a checkpoint at the copy."""
    return TrainState.parse(remote.read_state(step), remote.folder.url_of(remote.name_of(step, "state.json")))


def newest_step(folder: Path) -> int:
    """Return the step of the newest intact checkpoint in a folder of checkpoints, -1 if there is none."""
    checkpoints = reversed(checkpoint.list_checkpoints(folder))
    return next((step for step, path in checkpoints if checkpoint.corruption(path) is None), -1)


def is_in(folder: Path, path: Path) -> bool:
    """Return True if a path is in the folder itself."""
    return path.parent.resolve() == folder.resolve()
