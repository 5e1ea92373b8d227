"""A network's options from the dictionary that a config.json holds."""

from __future__ import annotations

from typing import Any

from training.config import ModelConfig

# Every option of the network and its default.
OPTIONS: dict[str, Any] = ModelConfig().model_dump(mode="json")


def model_config(options: dict[str, Any]) -> ModelConfig:
    """The options, validated."""
    return ModelConfig.model_validate(options)
