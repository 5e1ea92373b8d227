"""Comparison of two models' layers, and the shortest pattern of blocks that describes layers."""

from itertools import groupby
from typing import Any

from training.config import ModelConfig

# Options of training, which no config.json of Transformers has.
BALANCING = {"balance", "bias_rate", "switch_weight", "z_loss_weight", "jitter", "capacity_factor"}


def computed_options(config: ModelConfig) -> dict[str, Any]:
    """Return every option that changes a logit, by its name, with explicit sizes."""
    has_rope = config.position == "rope"
    options = config.model_dump(exclude={"blocks", "isolate_documents"} | (set() if has_rope else {"rope_theta"}))
    for i, block in enumerate(config.with_explicit_sizes().layers()):
        for part in ("mixer", "ffn"):
            values = getattr(block, part).model_dump(exclude=BALANCING | (set() if has_rope else {"rope"}))
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
