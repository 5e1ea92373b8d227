"""Writing of a model's folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

from training.config import ModelConfig
from training.weights.hf import bundle, custom
from training.weights.hf.architectures import ARCHITECTURES, READABLE
from training.weights.hf.files import CONFIG
from training.weights.hf.names import to_theirs

SHARD_BYTES = 5_000_000_000  # the largest file that Transformers writes


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    config: ModelConfig,
    end_of_text: int,
    *,
    n_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write a model that opens with `AutoModelForCausalLM`; return the `model_type` that it is written as.

    `n_vocab` is the tokenizer's size: rows of the embedding beyond it are padding, and are cut off. Raises OSError or
    SafetensorError if a file cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    if n_vocab is not None:
        rows = {name: weights[name][:n_vocab] for name in ("wte.weight", "head.weight") if name in weights}
        weights, config = weights | rows, config.model_copy(update={"vocab_size": n_vocab})
    candidates = (name for name, a in ARCHITECTURES.items() if a.reason_unsupported(config, weights) is None)
    model_type = next(candidates, custom.MODEL_TYPE)
    architecture = READABLE[model_type]
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    hf = {"model_type": model_type, **architecture.to_hf(config), **ids, "dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, hf)
    _write_json(folder / "generation_config.json", ids)
    if model_type == custom.MODEL_TYPE:
        for name, text in bundle.modeling_files().items():
            (folder / name).write_text(text, encoding="utf-8")
    # Copies: the writer treats tensors that share memory as one, and the experts are views of one tensor.
    copied = {"copy": True, "memory_format": torch.contiguous_format}
    tensors = to_theirs(architecture.names(config), to_saved_dtype(weights, dtype))
    copies = {name: tensor.to("cpu", **copied) for name, tensor in tensors}
    save_torch_state_dict(copies, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    return model_type


def to_saved_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in `dtype`, but selection biases in float32: their steps are too small for other types."""
    return {name: w.float() if name.endswith("selection_bias") else w.to(dtype) for name, w in weights.items()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
