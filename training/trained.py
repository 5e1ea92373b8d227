"""A model read back from the folder of a run, finished or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from torch import Tensor

from training import checkpoint
from training import device as devices
from training.checkpoint import Checkpoint
from training.config import Config, ParallelConfig
from training.data import Tokenizer
from training.errors import UserError
from training.kernels import choose
from training.model import GPT, needs


class Stored(NamedTuple):
    """A checkpoint's weights and what belongs to them."""

    config: Config
    weights: dict[str, Tensor]  # float32
    tokenizer: Tokenizer
    step: int
    data: str  # the fingerprint of what it was trained on


def read(run: str) -> Stored:
    """The newest whole checkpoint of the run in folder `run`, or the checkpoint that `run` is.

    Raises UserError where there is none.
    """
    path, found = _newest(Path(run).resolve())
    if found is None:
        raise UserError(f"--run {run}: no run with a checkpoint; a run is a folder such as runs/quickstart")
    try:
        config = Config.model_validate(found.state["config"])
    except ValidationError as error:
        raise UserError(f"{path}: its configuration is not one of this version: {error.errors()[0]['msg']}") from error
    tokenizer = Tokenizer.load(path.parent.parent / "tokenizer")
    return Stored(config, found.model, tokenizer, found.state["step"], found.state["data"])


def load(run: str, asked_device: str = "auto") -> tuple[GPT, Stored]:
    """The model of `read`, ready to compute, and what belongs to it."""
    stored = read(run)
    model_config, device = stored.config.model, devices.pick(asked_device)
    dtype = devices.DTYPES[stored.config.precision]
    kernels, _ = choose(ParallelConfig(), needs(model_config), device=device, dtype=dtype)
    model = GPT(model_config, kernels, dtype)
    model.load_state_dict(stored.weights)
    return model.to(device).for_inference(), stored


def _newest(folder: Path) -> tuple[Path, Checkpoint | None]:
    """The checkpoint that `folder` is, or the newest whole one of the run there; (folder, None) where there is none."""
    if (folder / checkpoint.MANIFEST).is_file():
        return folder, checkpoint.load(folder)
    for last_try in (False, False, True):
        try:
            path = checkpoint.newest(folder / "checkpoints", warn=lambda line: print(line, file=sys.stderr))
            return (folder, None) if path is None else (path, checkpoint.read(path))
        except (OSError, UserError):  # the run goes on meanwhile, and removed what was being read
            if last_try:
                raise
    raise AssertionError
