"""Reading of a model's folder as our configuration and our named weights; no code of the folder runs."""

from collections.abc import Set
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import ModelConfig
from training.errors import UserError
from training.model.gpt import GPT
from training.weights.hf.architecture import Architecture
from training.weights.hf.architectures import READABLE
from training.weights.hf.fields import one_line
from training.weights.hf.files import CONFIG, StoredTensor, open_tensors, read_json
from training.weights.hf.names import copy_to_ours, to_theirs

HEAD = "lm_head.weight"


def read_config(folder: Path) -> tuple[Architecture, ModelConfig]:
    """Return the architecture and the model of config.json. Raises UserError that names the file and the field."""
    path = folder / CONFIG
    hf = read_json(path)
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READABLE:
        problem = "no model_type" if model_type is None else f"model_type {model_type!r} is not supported"
        raise UserError(f"{path}: {problem}; supported: {', '.join(READABLE)}")
    architecture = READABLE[model_type]
    try:
        return architecture, ModelConfig.model_validate(architecture.from_hf(hf))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def read_weights(folder: Path, architecture: Architecture, config: ModelConfig) -> dict[str, Tensor]:
    """Return our tensors in float32: all that the architecture has a place for.

    Raises UserError if one is missing, unknown, of another shape or not finite.
    """
    with torch.device("meta"):
        meta = GPT(config).state_dict()
    names = architecture.names(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_theirs(names, meta)}
    with open_tensors(folder) as stored:
        if not any(name.startswith(architecture.prefix) for name in stored):
            stored = {name if name == HEAD else architecture.prefix + name: t for name, t in stored.items()}
        tied_head = stored.pop(HEAD, None) if HEAD not in shapes else None
        stored = {name: t for name, t in stored.items() if not architecture.harmless.fullmatch(name)}
        _check_names(folder, shapes.keys(), stored.keys())
        for name in names:  # check all before allocating: config.json may be wrong
            _check_shape(folder, stored[name.theirs], shapes[name.theirs])
        ours = {part: torch.empty(meta[part].shape) for name in names for part in name.ours}
        for name in names:
            copy_to_ours(name, ours, _read(folder, stored[name.theirs]))
        if tied_head is not None:
            _check_shape(folder, tied_head, tuple(meta["wte.weight"].shape))
            if not torch.equal(_read(folder, tied_head), ours["wte.weight"]):
                raise UserError(f"{folder}: {HEAD} is not the embedding, though tie_word_embeddings says so")
    return ours


def _check_names(folder: Path, expected: Set[str], stored: Set[str]) -> None:
    for names, problem in ((expected - stored, "missing"), (stored - expected, "unknown")):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise UserError(f"{folder}: {problem} tensors: {first}{more}; does {CONFIG} belong to these weights?")


def _check_shape(folder: Path, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape() != shape:
        raise UserError(f"{folder}: {stored.name} has shape {stored.shape()}; {CONFIG} needs {shape}")


def _read(folder: Path, stored: StoredTensor) -> Tensor:
    """Return a tensor's values in float32."""
    values = stored.read()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"{folder}: {stored.name} is {values.dtype}; quantized weights are not supported")
    values = values.float()
    if not values.isfinite().all():
        raise UserError(f"{folder}: {stored.name} is not finite")
    return values
