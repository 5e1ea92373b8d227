"""A folder in one of the layouts that are known here, as our configuration and our named weights."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import ModelConfig
from training.errors import UserError
from training.model.gpt import GPT
from training.weights.hf.architecture import Architecture
from training.weights.hf.files import CONFIG, Stored, open_tensors, read_json
from training.weights.hf.names import as_theirs, fill

HEAD = "lm_head.weight"


def read_config(folder: Path, known: dict[str, Architecture]) -> tuple[Architecture, ModelConfig]:
    """What config.json describes. Raises UserError naming the file and the field that stand in the way."""
    path = folder / CONFIG
    hf = read_json(path)
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        what = "no model_type" if model_type is None else f"model_type {model_type!r} cannot be read"
        raise UserError(f"{path}: {what}; what can be read: {', '.join(known)}")
    architecture = known[model_type]
    try:
        return architecture, ModelConfig.model_validate(architecture.from_hf(hf))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """The first thing that pydantic found wrong."""
    detail = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, detail["loc"])), detail["msg"]]))


def read_weights(folder: Path, architecture: Architecture, config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors, float32: all that the architecture has a place for.

    Raises UserError where one is missing, unknown, of another shape or not finite.
    """
    with torch.device("meta"):
        meta = GPT(config).state_dict()
    names = architecture.names(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in as_theirs(names, meta)}
    with open_tensors(folder) as stored:
        if not any(name.startswith(architecture.prefix) for name in stored):
            stored = {name if name == HEAD else architecture.prefix + name: there for name, there in stored.items()}
        tied = stored.pop(HEAD, None) if HEAD not in shapes else None
        stored = {name: there for name, there in stored.items() if not architecture.harmless.fullmatch(name)}
        _check_names(folder, shapes.keys(), stored.keys())
        for name in names:
            _check(folder, stored[name.theirs], shapes[name.theirs])
        ours = {part: torch.empty(meta[part].shape) for name in names for part in name.ours}
        for name in names:
            fill(name, ours, _read(folder, stored[name.theirs]))
        if tied is not None:
            _check(folder, tied, tuple(meta["wte.weight"].shape))
        if tied is not None and not torch.equal(_read(folder, tied), ours["wte.weight"]):
            raise UserError(f"{folder}: {HEAD} is not the embedding, though tie_word_embeddings says so")
    return ours


def _check_names(folder: Path, wanted: Set[str], found: Set[str]) -> None:
    for names, what in ((wanted - found, "missing"), (found - wanted, "not known")):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise UserError(f"{folder}: tensors that are {what}: {first}{more}; is config.json that of these weights?")


def _check(folder: Path, stored: Stored, shape: tuple[int, ...]) -> None:
    """Raises UserError where the tensor has another shape: before memory is taken for what config.json says."""
    if stored.shape() != shape:
        raise UserError(f"{folder}: {stored.name} is {stored.shape()} there, and {shape} by {CONFIG}")


def _read(folder: Path, stored: Stored) -> Tensor:
    """A tensor's values, float32."""
    values = stored.read()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"{folder}: {stored.name} is {values.dtype}; quantized weights are not read")
    values = values.float()
    if not values.isfinite().all():
        raise UserError(f"{folder}: {stored.name} is not finite")
    return values
