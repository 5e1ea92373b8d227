"""A model that no architecture of Transformers expresses: our options, our tensor names, and the code that runs it."""

from dataclasses import dataclass
from typing import Any

import torch

from training.config import ModelConfig
from training.errors import UserError
from training.model.gpt import GPT
from training.weights.hf.architecture import Architecture
from training.weights.hf.names import Name

MODEL_TYPE = "training_gpt"
MODELING = f"modeling_{MODEL_TYPE}"  # the file that `bundle.py` writes
CLASSES = {"AutoConfig": "TrainingGPTConfig", "AutoModelForCausalLM": "TrainingGPTForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class CustomArchitecture(Architecture):
    """Our own options, and the classes of the modeling file that open them."""

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": [CLASSES["AutoModelForCausalLM"]],
            "auto_map": {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()},
            **config.model_dump(mode="json"),
        }

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        for name in ModelConfig.model_fields:
            if name not in hf:
                raise UserError(f"{name} is missing")
        return {name: hf[name] for name in ModelConfig.model_fields}

    def names(self, config: ModelConfig) -> list[Name]:
        with torch.device("meta"):
            return [Name(f"gpt.{name}", (name,)) for name in GPT(config).state_dict()]


CUSTOM = CustomArchitecture()
