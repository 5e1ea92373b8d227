"""Models as folders in Hugging Face's layout, written and read.

Each architecture is a value that says which of our configurations it expresses exactly, translates configurations
both ways, and has one table of tensors for both ways. A model that none of them expresses keeps our names (`own`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.config import ModelConfig
from training.weights.hf import own
from training.weights.hf.architecture import Architecture
from training.weights.hf.deepseek import DEEPSEEK_V3, DOTS1, GLM4_MOE
from training.weights.hf.ernie import ERNIE4_5_MOE
from training.weights.hf.files import save
from training.weights.hf.gpt2 import GPT2
from training.weights.hf.llama import LLAMA
from training.weights.hf.mixtral import MIXTRAL
from training.weights.hf.names import as_theirs
from training.weights.hf.qwen3 import QWEN3, QWEN3_MOE
from training.weights.hf.read import one_line, read_config, read_weights

# By `model_type`; the first that expresses a model is the one it is written as.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "dots1": DOTS1,
    "glm4_moe": GLM4_MOE,
    "deepseek_v3": DEEPSEEK_V3,
}
READABLE = ARCHITECTURES | {own.MODEL_TYPE: own.OWN}


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    config: ModelConfig,
    end_of_text: int,
    *,
    n_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write a model that opens with `AutoModelForCausalLM`; returns the `model_type` that it was written as.

    `n_vocab` is the tokenizer's size: rows of the embedding beyond it spell nothing, and are left out.
    """
    if n_vocab is not None:
        rows = {name: weights[name][:n_vocab] for name in ("wte.weight", "head.weight") if name in weights}
        weights, config = weights | rows, config.model_copy(update={"vocab_size": n_vocab})
    model_type = next(
        (name for name, one in ARCHITECTURES.items() if reason_unsupported(one, weights, config) is None), None
    )
    weights = to_saved_dtype(weights, dtype)
    if model_type is None:
        own.write(folder, weights, config, end_of_text, dtype)
        return own.MODEL_TYPE
    architecture = ARCHITECTURES[model_type]
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    hf = {"model_type": model_type, **architecture.to_hf(config), **ids}
    save(folder, hf, as_theirs(architecture.names(config), weights), dtype)
    return model_type


def to_saved_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights as they are written: in this type, but the selection bias, whose steps are small, float32 in any."""
    return {name: w.float() if name.endswith("selection_bias") else w.to(dtype) for name, w in weights.items()}


def reason_unsupported(architecture: Architecture, weights: dict[str, Tensor], config: ModelConfig) -> str | None:
    """What of the configuration it cannot express, or which tensor that counts has no place in it; None: nothing.

    A run that began with another's checkpoint may have a selection bias that its own `balance` does not move.
    """
    if (reason := architecture.reason_unsupported(config)) is not None:
        return reason
    placed = {part for name in architecture.names(config) for part in name.ours}
    counted = {name for name in weights.keys() - placed if not name.endswith("ffn.load")}
    return next((f"values of {name}" for name in weights if name in counted and weights[name].any()), None)


__all__ = [
    "ARCHITECTURES",
    "READABLE",
    "one_line",
    "read_config",
    "read_weights",
    "reason_unsupported",
    "to_saved_dtype",
    "write_model",
]
