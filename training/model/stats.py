"""Parameter counts, FLOPs and initial values of a model, computed from its config."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from training.config import ModelConfig
from training.errors import UserError
from training.model.gpt import GPT
from training.model.layers import Linear, normal_from_key
from training.model.moe import MoE
from training.optim.parameters import ParameterKind


@dataclass(frozen=True)
class ModelStats:
    """Sizes and costs of a model; holds no weights."""

    shapes: dict[str, torch.Size]  # of every parameter and buffer
    kinds: dict[str, ParameterKind]  # of every parameter
    n_parameters: int
    n_active_parameters: int  # parameters that one token uses
    flops_per_token: int  # forward and backward at full context
    top_ks: list[int]  # experts per token, of every MoE layer


def model_stats(config: ModelConfig) -> ModelStats:
    """Build the model on the meta device and measure it. `config.vocab_size` must be set.

    Raises UserError for a tensor that no address space holds.
    """
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        sizes = f"n_embd {config.n_embd}, n_positions {config.n_positions}, vocab_size {config.vocab_size}"
        sizes += ", blocks" if config.bigram_rows is None else f", bigram_rows {config.bigram_rows}, blocks"
        raise UserError(f"model: one of its tensors has more than 2^63 bytes; lower one of {sizes}") from error
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0 if model.bigram is None else float(config.n_embd * (config.bigram_rows - 1))
    for moe in _moe_layers(model):
        idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - moe.config.top_k / moe.config.n_experts)
    return ModelStats(
        shapes={name: tensor.shape for name, tensor in model.state_dict().items()},
        kinds=parameter_kinds(model),
        n_parameters=total,
        n_active_parameters=total - round(idle),
        flops_per_token=_flops_per_token(model),
        top_ks=[moe.config.top_k for moe in _moe_layers(model)],
    )


def _moe_layers(model: GPT) -> list[MoE]:
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]


def _flops_per_token(model: GPT) -> int:
    """Return 6 x (matrix elements per token + keys x heads x (head_dim + value_dim)), arXiv:2204.02311 app. B."""
    config = model.config
    matrices, attention = config.n_embd * config.vocab_size, 0
    for spec in (block.mixer.spec for block in model.blocks):
        n_visible = min(spec.window or config.n_positions, config.n_positions)
        attention += n_visible * spec.n_head * (spec.head_dim + spec.value_dim)
    matrices += sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, Linear))
    for moe in _moe_layers(model):
        share = moe.config.top_k / moe.config.n_experts
        matrices += round(share * sum(p.numel() for p in moe.experts.parameters() if p.ndim == 3))
    return 6 * (matrices + attention)


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """Return the kind of every parameter, by name; optimizers choose their update by it."""
    return {name: _kind(name, parameter.ndim) for name, parameter in model.named_parameters()}


def _kind(name: str, n_dimensions: int) -> ParameterKind:
    if name.endswith("taps"):  # they learn best at the high rate of embeddings (docs/learning.md)
        return "embedding"
    # A pair is rare, and Adam takes large steps for a row that is rarely read: pairs learn best at a low rate.
    if n_dimensions < 2 or name.endswith("bias") or name == "bigram.weight":
        return "vector"
    if ".router." in name:
        return "router"
    return "matrix" if name.startswith("blocks.") else "embedding"


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial value of an unsharded parameter or buffer, float32 on the CPU: GPT-2's, as in Transformers.

    Matrices and embeddings are normal with standard deviation 0.02; projections into the residual stream (`out`,
    `down`) divide it by sqrt(2 n_layer). Biases, taps and the table of pairs are 0, norms 1. Each tensor has its own
    generator, keyed by seed and name, so values do not depend on construction order, device or sharding.
    """
    if name.endswith(("selection_bias", "load")):
        return torch.full(shape, 0.0 if name.endswith("bias") else 1 / shape[0])
    if name.endswith("taps") or name == "bigram.weight":
        return torch.zeros(shape)
    if _kind(name, len(shape)) == "vector":
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    into_residual = name.removesuffix(".weight").endswith((".out", ".down"))
    return normal_from_key(f"{seed}/{name}", shape) * (0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> GPT:
    """Give every parameter and buffer its initial value, in place; return the model."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(initial_value(name, tensor.shape, model.config, seed))
    return model
