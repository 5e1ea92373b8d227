"""A network's options, from the dictionary in a config.json."""

from typing import Any

from training.config import ModelConfig

# Every option of the network and its default.
OPTIONS: dict[str, Any] = ModelConfig().model_dump(mode="json")


def model_config(options: dict[str, Any]) -> ModelConfig:
    """Validate the options."""
    return ModelConfig.model_validate(options)
