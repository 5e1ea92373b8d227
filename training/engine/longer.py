"""Decide if a run may go on with more steps, or another schedule, in its own folder.

It may where what was done stays what it would have been: every finished step had the learning rate that it has under
the new options. So a constant rate may get more steps, and `wsd` before its decay: the plateau gets longer.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from training import checkpoint
from training.config import Config
from training.optim.schedule import lr_factor


class Extension(NamedTuple):
    """The checkpoint to go on from, and the steps whose learning rates two configurations have in common."""

    path: Path
    n_common: int  # steps from the first on
    is_earlier: bool  # a checkpoint of the plateau, before a decay that the new options do not have there


def parse_options(options: Any) -> Config | None:
    """Return the options in a checkpoint's state; None if they are another version's."""
    try:
        return Config.model_validate(options).resolved()
    except ValidationError:
        return None


def n_common_steps(old: Config, new: Config) -> int:
    """Return how many steps, from the first on, have the same share of the peak learning rate in both."""
    steps = range(min(old.steps, new.steps))
    if old.steps == new.steps and old.schedule == new.schedule:
        return len(steps)
    differing = (
        step for step in steps if lr_factor(old.schedule, step, old.steps) != lr_factor(new.schedule, step, new.steps)
    )
    return next(differing, len(steps))


def find_extension(newest: Path, config: Config, *, goes_back: bool = True) -> Extension:
    """Return the checkpoint that a run with a resolved `config` goes on from.

    It is `newest` or, if `goes_back`, the latest intact one before a decay that the new options do not have there. If
    there is none it is `newest`, and `n_common` is less than its step.
    """
    state = checkpoint.read_state(newest)
    old, step = parse_options(state.get("config")), state.get("step", 0)
    if old is None:
        return Extension(newest, 0, False)
    n_common = n_common_steps(old, config)
    if goes_back and step > n_common and is_plateau(old, n_common):
        for earlier, path in reversed(checkpoint.list_checkpoints(newest.parent)):
            if earlier <= n_common and not checkpoint.corruption(path):
                return Extension(path, n_common, True)
    return Extension(newest, n_common, False)


def is_plateau(config: Config, n_steps: int) -> bool:
    """Return True if the learning rate is constant at the end of the first `n_steps` steps: not so in a warm-up."""
    if n_steps < 2:
        return False
    last, before = (lr_factor(config.schedule, n_steps - n, config.steps) for n in (1, 2))
    return last == before
