"""Disk space that a run's checkpoints and final model need."""

import shutil

from training.config import Config
from training.errors import UserError
from training.model.stats import ModelStats
from training.optim.optimizer import state_bytes


def checkpoint_bytes(stats: ModelStats, config: Config) -> int:
    """Return the size of a checkpoint: float32 weights and optimizer state."""
    return 4 * stats.n_parameters + state_bytes(config.optim, stats.shapes, stats.kinds)


def n_checkpoints(config: Config) -> int:
    """Return the largest number of checkpoints on disk at once, which is reached while one is written."""
    return config.checkpoint.keep + config.checkpoint.keep_best + 1


def disk_shortage(stats: ModelStats, config: Config, *, fresh: bool = False) -> str | None:
    """Return an error line if checkpoints and the final model do not fit on the disk, else None.

    A resumed run replaces its checkpoints: their space counts as free. A `fresh` run moves them aside and keeps them.
    """
    folder = (config.run_dir / "checkpoints").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    needed = n_checkpoints(config) * checkpoint_bytes(stats, config) + 4 * stats.n_parameters
    needed -= 0 if fresh else sum(path.stat().st_size for path in folder.glob("step-*/*"))
    if (free := shutil.disk_usage(existing).free) >= needed:
        return None
    return (
        f"{existing} has {_size_text(free)} free, and checkpoints and the model need {_size_text(needed)}: lower "
        "checkpoint.keep, or choose another out_dir"
    )


def _size_text(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def check_disk_space(stats: ModelStats, config: Config, *, fresh: bool) -> None:
    """Raise UserError if the disk has too little space for the whole run."""
    if problem := disk_shortage(stats, config, fresh=fresh):
        raise UserError(problem)
