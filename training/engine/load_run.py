"""A model read back from the folder of a run, finished or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from training import checkpoint
from training import device as devices
from training.checkpoint import Checkpoint
from training.config import Config, ModelConfig, ParallelConfig
from training.data import Tokenizer
from training.errors import UserError
from training.kernels.choose import choose_kernels
from training.model import GPT, kernel_requirements


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
        config, step, data = (found.state[name] for name in ("config", "step", "data"))
        config = Config.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{path}: its configuration is not one of this version: {error.errors()[0]['msg']}") from error
    except (KeyError, TypeError):
        raise UserError(f"{path / 'state.json'}: not the state of a run") from None
    if not _fits(config.model, found.model):
        raise UserError(f"{path}: its weights are not those of the model that its configuration describes")
    return Stored(config, found.model, Tokenizer.load(path.parent.parent / "tokenizer"), step, data)


def _fits(model: ModelConfig, weights: dict[str, Tensor]) -> bool:
    """Whether the weights are the model's, seen before it takes memory."""
    if model.vocab_size is None or model.n_layer > len(weights):
        return False
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in GPT(model).state_dict().items()}
    except RuntimeError:  # sizes beyond all addresses
        return False
    return shapes == {name: tensor.shape for name, tensor in weights.items()}


def load(run: str, asked_device: str = "auto") -> tuple[GPT, Stored]:
    """The model of `read`, ready to compute, and what belongs to it."""
    stored = read(run)
    model_config, device = stored.config.model, devices.select_device(asked_device)
    dtype = devices.DTYPES[stored.config.precision]
    choice = choose_kernels(ParallelConfig(), kernel_requirements(model_config), device=device, dtype=dtype)
    model = GPT(model_config, choice.kernels, dtype)
    model.load_state_dict(stored.weights)
    return model.to(device).cast_for_inference(), stored


def _newest(folder: Path) -> tuple[Path, Checkpoint | None]:
    """The checkpoint that `folder` is, or the newest whole one of the run there; (folder, None) where there is none."""
    if (folder / checkpoint.MANIFEST).is_file():
        return folder, checkpoint.load(folder)
    for last_try in (False, False, True):
        try:
            path = checkpoint.latest(folder / "checkpoints", warn=lambda line: print(line, file=sys.stderr))
            return (folder, None) if path is None else (path, checkpoint.load(path, verify=False))
        except (OSError, UserError):  # the run goes on meanwhile, and removed what was being read
            if last_try:
                raise
    raise AssertionError
