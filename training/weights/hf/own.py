"""A model that no architecture of Transformers expresses: our configuration, our names, and the code that runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.config import ModelConfig
from training.errors import UserError
from training.model.gpt import GPT
from training.weights.hf import bundle
from training.weights.hf.architecture import Architecture
from training.weights.hf.files import save
from training.weights.hf.names import Name, as_theirs

MODEL_TYPE = "training_gpt"
MODELING = f"modeling_{MODEL_TYPE}"  # the file that `bundle` makes
CLASSES = {"AutoConfig": "TrainingGPTConfig", "AutoModelForCausalLM": "TrainingGPTForCausalLM"}


def to_hf(config: ModelConfig) -> dict:
    """Our options, and which classes of the modeling file to open them with."""
    return {
        "architectures": [CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()},
        **config.model_dump(mode="json"),
    }


def from_hf(hf: dict) -> dict:
    """The options back."""
    for name in ModelConfig.model_fields:
        if name not in hf:
            raise UserError(f"{name} is missing")
    return {name: hf[name] for name in ModelConfig.model_fields}


def names(config: ModelConfig) -> list[Name]:
    """Every tensor under its own name, within the module `gpt`."""
    with torch.device("meta"):
        return [Name(f"gpt.{name}", (name,)) for name in GPT(config).state_dict()]


OWN = Architecture(lambda _config: iter(()), to_hf, from_hf, names)


def write(folder: Path, weights: dict[str, Tensor], config: ModelConfig, end_of_text: int, dtype: torch.dtype) -> None:
    """Write config.json, the weights and the modeling file."""
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    save(folder, {"model_type": MODEL_TYPE, **to_hf(config), **ids}, as_theirs(names(config), weights), dtype)
    (folder / f"{MODELING}.py").write_text(bundle.source(), encoding="utf-8")
