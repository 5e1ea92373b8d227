"""The commands that a run prints at its end: sample it, evaluate it, look at its curves, train it for longer."""

import itertools
import shlex
import sys
from pathlib import Path

from training import checkpoint
from training.config import Config
from training.engine.longer import find_extension
from training.engine.loop import is_out_of_patience
from training.engine.state import TrainState


def next_commands(config: Config, state: TrainState) -> list[str]:
    """Return the commands to try next with a finished run, for a shell in this folder."""
    folder, prompt = str(config.run_dir), (*config.eval.prompts, "The ")[0].rstrip("\n")
    prompted = ["--chat"] if config.data.has_messages else ["--prompt", prompt]
    commands = [
        [program("python"), "-m", "training.generate", "--run", folder, *prompted],
        [program("python"), "-m", "training.evaluate", "--run", folder],
        [program("tensorboard"), "--logdir", config.out_dir],
    ]
    if not is_out_of_patience(state, config):
        commands.append([program("python"), "-m", "training.train", *longer_arguments(config, state)])
    return list(map(shlex.join, commands))


def longer_arguments(config: Config, state: TrainState) -> list[str]:
    """Return the arguments that train twice as many steps: in place where the schedule allows it, else as a branch."""
    longer = config.model_copy(update={"steps": 2 * state.step})
    arguments = ["--config", str(config.run_dir / "config.yaml"), "--steps", str(longer.steps)]
    extension = find_extension(checkpoint.step_path(config.run_dir / "checkpoints", state.step), longer.resolved())
    if extension.is_earlier or extension.n_common >= state.step:
        return arguments
    arguments += ["--branch", str(config.run_dir), "--name", (name := free_name(config))]
    if config.checkpoint.copy_to is not None:  # a branch needs a place of its own
        arguments += [
            "--checkpoint.copy_to",
            f"{config.checkpoint.copy_to.rstrip('/').rpartition('/')[0] or '.'}/{name}",
        ]
    return arguments


def free_name(config: Config) -> str:
    """Return a name for a branch that is no run yet."""
    names = itertools.chain([f"{config.name}-longer"], (f"{config.name}-longer-{n}" for n in itertools.count(2)))
    return next(name for name in names if not Path(config.out_dir, name).exists())


def program(name: str) -> str:
    """Return the shell's name for a program of this environment: .venv/bin/NAME below this folder, else NAME."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name
