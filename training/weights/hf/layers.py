"""A model's layers with explicit sizes: compared with another's, and as the shortest pattern of blocks."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from training.config import AttentionConfig, BlockConfig, LatentConfig, ModelConfig

# Options of training, which no config.json has.
BALANCING = {"balance", "bias_rate", "switch_weight", "z_loss_weight", "jitter", "capacity_factor"}


def with_explicit_sizes(config: ModelConfig) -> list[BlockConfig]:
    """Return every layer's block with a number for each size that null stands for, so that equal layers are equal.

    `rope` becomes False in a model without rotary positions.
    """

    def explicit(block: BlockConfig) -> BlockConfig:
        mixer = block.mixer
        head_dim = mixer.head_dim or config.n_embd // config.n_head
        sizes = {"head_dim": head_dim}
        if isinstance(mixer, AttentionConfig):
            sizes |= {
                "n_kv_head": mixer.n_kv_head or config.n_head,
                "rope": mixer.rope and config.position == "rope",
            }
        elif isinstance(mixer, LatentConfig):
            sizes |= {"value_dim": mixer.value_dim or head_dim}
        ffn = block.ffn.model_copy(update={"hidden": block.ffn.hidden or 4 * config.n_embd})
        return BlockConfig(mixer=mixer.model_copy(update=sizes), ffn=ffn)

    return [explicit(block) for block in config.layers()]


def computed_options(config: ModelConfig) -> dict[str, Any]:
    """Return every option that changes a logit, by its name, with explicit sizes."""
    unused = {"blocks", "isolate_documents"} | (set() if config.position == "rope" else {"rope_theta"})
    options = config.model_dump(exclude=unused)
    for i, block in enumerate(with_explicit_sizes(config)):
        for part in ("mixer", "ffn"):
            values = getattr(block, part).model_dump(exclude=BALANCING)
            options |= {f"{part}.{name} of layer {i}": value for name, value in ({"type": ""} | values).items()}
    return options


def first_difference(config: ModelConfig, other: ModelConfig) -> str | None:
    """Return the first option of `config` that `other` computes differently, such as "position: learned"."""
    options, others = computed_options(config), computed_options(other)
    return next((f"{name}: {value}" for name, value in options.items() if others.get(name, ...) != value), None)


def pattern(layers: list[dict]) -> list[dict]:
    """Return the shortest pattern of blocks, as options, whose repetition is these layers."""
    periods = (n for n in range(1, len(layers)) if all(layers[i] == layers[i - n] for i in range(n, len(layers))))
    period = next(periods, len(layers))
    runs = [list(run) for _, run in groupby(layers[:period])]
    return [run[0] | {"repeat": len(run)} for run in runs]
