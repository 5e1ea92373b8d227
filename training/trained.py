"""A model read back from the folder of a run, finished or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from training import checkpoint
from training import device as devices
from training.config import Config, ParallelConfig
from training.data import Tokenizer
from training.errors import UserError
from training.kernels import choose
from training.model import GPT


class Trained(NamedTuple):
    """A checkpoint's model and what belongs to it."""

    config: Config
    model: GPT
    tokenizer: Tokenizer
    step: int


def load(run: str, asked_device: str = "auto") -> Trained:
    """The newest whole checkpoint of the run in folder `run`, or the checkpoint that `run` is, ready to compute.

    Raises UserError where there is none.
    """
    folder = Path(run)
    path = folder if (folder / checkpoint.MANIFEST).is_file() else None
    if path is None:
        path = checkpoint.newest(folder / "checkpoints", warn=lambda line: print(line, file=sys.stderr))
    if path is None:
        raise UserError(f"--run {run}: no run with a checkpoint; a run is a folder such as runs/quickstart")
    found = checkpoint.load(path) if path == folder else checkpoint.read(path)
    try:
        config = Config.model_validate(found.state["config"])
    except ValidationError as error:
        raise UserError(f"{path}: its configuration is not one of this version: {error.errors()[0]['msg']}") from error
    device, dtype = devices.pick(asked_device), devices.DTYPES[config.precision]
    head_dim = config.model.n_embd // config.model.n_head
    kernels, _ = choose(ParallelConfig(), device=device, dtype=dtype, head_dim=head_dim)
    model = GPT(config.model, kernels, dtype)
    model.load_state_dict(found.model)
    tokenizer = Tokenizer.load(path.parent.parent / "tokenizer")
    return Trained(config, model.to(device), tokenizer, found.state["step"])
