"""The interface of an architecture of Transformers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from training.config import AttentionConfig, MixerConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf.fields import one_line
from training.weights.hf.layers import first_difference
from training.weights.hf.names import Name


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `model_type`: its config.json and its tensors, translated in both directions."""

    mixer: type[MixerConfig] = AttentionConfig  # the attention of every layer
    ffns: tuple[type, ...] = (MLPConfig,)  # kinds of feed-forward layers; the last is in at least one layer
    prefix: str = ""  # of every tensor's name but the head's; files saved without a head lack it
    harmless: re.Pattern[str] = re.compile("(?!)")  # stored tensors that are no weights: ignored
    # Names a limit of Transformers' class that the model exceeds and config.json does not show; None: there is none.
    limit: Callable[[ModelConfig], str | None] = lambda _config: None

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json without the fields that every model has."""
        raise NotImplementedError

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a ModelConfig. Raises UserError that names the field."""
        raise NotImplementedError

    def names(self, config: ModelConfig) -> list[Name]:
        """Return the table of tensors, each of ours in exactly one place."""
        raise NotImplementedError

    def reason_unsupported(
        self, config: ModelConfig, weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> str | None:
        """Return the first option, or tensor of `weights`, that cannot be expressed; None: all can.

        A model is expressible if its config.json reads back as the same model and its tensors have a place.
        """
        layers = config.layers()
        for i, block in enumerate(layers):
            # Not isinstance: a subclass computes something else.
            for part, kinds in (("mixer", (self.mixer,)), ("ffn", self.ffns)):
                if type(kind := getattr(block, part)) not in kinds:
                    return f"{part}.type of layer {i}: {kind.type}"
        if not any(isinstance(block.ffn, self.ffns[-1]) for block in layers):
            return "no layer has experts"
        try:
            again = ModelConfig.model_validate(self.from_hf(self.to_hf(config)))
        except UserError as error:
            return str(error)
        except ValidationError as error:
            return one_line(error)
        if (reason := first_difference(config, again) or self.limit(config)) is not None:
            return reason
        placed = {ours for name in self.names(config) for ours in name.ours}
        for i, block in enumerate(layers):
            biased = isinstance(block.ffn, MoEConfig) and block.ffn.balance in ("bias", "both")
            if biased and f"blocks.{i}.ffn.selection_bias" not in placed:
                return f"ffn.balance of layer {i}: {block.ffn.balance} (a selection bias)"
        # Whatever `balance` is, a run may have started from weights with a selection bias.
        unplaced = (name for name in weights if name not in placed and not name.endswith("ffn.load"))
        return next((f"values of {name}" for name in unplaced if weights[name].any()), None)
