"""Bring a run's newest checkpoint back from its copy (`checkpoint.copy_to`) to a machine that has none as new."""

from collections.abc import Callable, Iterable
from pathlib import Path

from training import checkpoint
from training.checkpoint import RemoteRun
from training.config import Config
from training.engine.state import TrainState
from training.errors import UserError
from training.terminal import print_line


def fetch_newest(config: Config, resume: str, check: Callable[[TrainState], int]) -> RemoteRun:
    """Return the run's copy, after fetching its newest intact checkpoint if the run's folder has none as new.

    The run's other files come with it. `check` raises UserError if a state is another run's; then nothing is changed.
    It returns the number of steps that the run has in common with it: if it goes on from an earlier one, that one
    comes too.
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
    n_common = check(read_state(remote, steps[0]))
    if resume != "auto" and Path(resume, checkpoint.MANIFEST).is_file() and is_in(folder, Path(resume)):
        return remote
    for step in steps:
        if step <= newest_step(folder):
            return remote
        print_line(f"{config.run_dir}: fetching step {step:,} from {remote.url}")
        if (problem := remote.fetch(step, config.run_dir)) is None:
            others = [best_step(folder, step, config), max((n for n in steps if n <= n_common), default=None)]
            fetch_others(remote, config.run_dir, others)
            return remote
        print_line(f"{problem}; falling back to the checkpoint before it")
    raise UserError(f"{remote.url}: every checkpoint is damaged; choose another --checkpoint.copy_to to start over")


def best_step(folder: Path, step: int, config: Config) -> int | None:
    """Return the step of the best checkpoint if the final model or the end of the run depends on it, else None."""
    best = TrainState.load(checkpoint.step_path(folder, step) / "state.json").best
    return best["step"] if best and (config.checkpoint.final == "best" or config.eval.patience is not None) else None


def fetch_others(remote: RemoteRun, run_dir: Path, steps: Iterable[int | None]) -> None:
    """Fetch the checkpoints of these steps that the run's folder lacks. A damaged one does not count, as on a disk."""
    for step in steps:
        if step in remote.complete and not checkpoint.step_path(run_dir / "checkpoints", step).exists():
            remote.fetch(step, run_dir)


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
