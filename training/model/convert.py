"""The final model as a folder in Hugging Face's layout: config.json and model.safetensors.

What is exactly GPT-2 opens with `AutoModelForCausalLM` as plain `gpt2`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.config import MLPConfig, ModelConfig

HF_ACTIVATION = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2", "silu": "silu"}

# Ours to GPT-2's names within a block; GPT-2 stores the transposed matrix (its Conv1D).
BLOCK_NAMES = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "mixer.out": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def why_not_gpt2(config: ModelConfig) -> str | None:
    """What in the configuration GPT-2 does not have; None where it is plain GPT-2."""
    blocks = set(config.blocks)
    block = config.blocks[0]
    differences = {
        "experts": any(not isinstance(b.ffn, MLPConfig) for b in blocks),
        "gated layers": any(getattr(b.ffn, "gated", False) for b in blocks),
        "blocks that differ": len({(b.mixer, b.ffn) for b in blocks}) > 1,
        "QK-norm": block.mixer.qk_norm,
        f"{config.position} positions": config.position != "learned",
        config.norm: config.norm != "layernorm",
        "no biases": not config.bias,
    }
    return next((name for name, present in differences.items() if present), None)


def gpt2_config(config: ModelConfig, end_of_text: int) -> dict:
    """Transformers' `GPT2Config` of a plain GPT-2."""
    ffn = config.blocks[0].ffn
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")},
        "n_inner": ffn.hidden or 4 * config.n_embd,
        "activation_function": HF_ACTIVATION[ffn.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def gpt2_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our named weights under GPT-2's names and in its layout."""
    out = {"transformer.wte.weight": weights["wte.weight"], "transformer.wpe.weight": weights["wpe.weight"]}
    for kind in ("weight", "bias"):
        out[f"transformer.ln_f.{kind}"] = weights[f"norm_f.{kind}"]
        for i in range(config.n_layer):
            for ours, theirs in BLOCK_NAMES.items():
                tensor = weights[f"blocks.{i}.{ours}.{kind}"]
                out[f"transformer.h.{i}.{theirs}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
            qkv = torch.cat([weights[f"blocks.{i}.mixer.{name}.{kind}"] for name in ("query", "key", "value")])
            out[f"transformer.h.{i}.attn.c_attn.{kind}"] = qkv.T if qkv.ndim == 2 else qkv
    if not config.tie_head:
        out["lm_head.weight"] = weights["head.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def write(folder: Path, weights: dict[str, Tensor], config: ModelConfig, end_of_text: int) -> None:
    """Write config.json and model.safetensors: as `gpt2` where it is one, else under our own names."""
    folder.mkdir(parents=True, exist_ok=True)
    if why_not_gpt2(config) is None:
        hf_config, weights = gpt2_config(config, end_of_text), gpt2_weights(weights, config)
    else:
        hf_config = {"model_type": "training_gpt", **config.model_dump(), "eos_token_id": end_of_text}
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
