"""Space on the disk that a run will take."""

from __future__ import annotations

import shutil
from pathlib import Path

from training.config import Config
from training.errors import UserError
from training.model import GPT


def checkpoint_bytes(model: GPT, config: Config) -> int:
    """Weights and the optimizer's state in float32: two tensors a parameter, of Muon's matrices one."""
    muon, kinds = config.optim.type == "muon", model.parameter_kinds()
    return 4 * sum(p.numel() * (2 if muon and kinds[name] == "matrix" else 3) for name, p in model.named_parameters())


def n_checkpoints(config: Config) -> int:
    """The most there are at a time: while one is written."""
    return config.checkpoint.keep + config.checkpoint.keep_best + 1


def disk_shortage(model: GPT, config: Config, *, fresh: bool = False) -> str | None:
    """What is wrong where checkpoints and the final model do not fit beside what is there; in words.

    Checkpoints that are there will be replaced, but those of a run that is moved aside (`fresh`) stay.
    """
    checkpoints = Path(config.out_dir, config.name, "checkpoints").absolute()
    there = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    weights = 4 * sum(p.numel() for p in model.parameters())
    needed = n_checkpoints(config) * checkpoint_bytes(model, config) + weights
    needed -= 0 if fresh else sum(path.stat().st_size for path in checkpoints.glob("step-*/*"))
    if (free := shutil.disk_usage(there).free) >= needed:
        return None
    return (
        f"{there} has {_in_words(free)} free, and checkpoints and the model need {_in_words(needed)}: lower "
        "checkpoint.keep, or choose another out_dir"
    )


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def check_disk_space(model: GPT, config: Config, *, fresh: bool) -> None:
    """Raise UserError where there is too little space for the whole run."""
    if problem := disk_shortage(model, config, fresh=fresh):
        raise UserError(problem)
