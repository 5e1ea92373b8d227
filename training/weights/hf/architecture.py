"""The interface of an architecture of Transformers, and the comparison of two models that decides if it fits."""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from training.config import AttentionConfig, MixerConfig, MLPConfig, ModelConfig
from training.errors import UserError
from training.weights.hf.tables import Name, one_line

# Options of training, which no config.json of Transformers has.
BALANCING = {"balance", "bias_rate", "switch_weight", "z_loss_weight", "jitter", "capacity_factor"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `model_type`: its config.json and its tensors, translated in both directions."""

    mixer: type[MixerConfig] = AttentionConfig  # the attention of every layer
    ffns: tuple[type, ...] = (MLPConfig,)  # kinds of feed-forward layers; the last is in at least one layer
    prefix: str = ""  # of every tensor's name but the head's; files saved without a head lack it
    harmless: re.Pattern[str] = re.compile("(?!)")  # stored tensors that are no weights: ignored

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json, less the fields of every model. Raises UserError for a limit of the class."""
        raise NotImplementedError

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a ModelConfig. Raises UserError that names the field."""
        raise NotImplementedError

    def names(self, config: ModelConfig) -> list[Name]:
        """Return the table of tensors, each of ours in exactly one place."""
        raise NotImplementedError

    def min_tensors(self, config: ModelConfig) -> int:
        """Return a lower bound of the number of tensors, without listing them."""
        return config.n_layer

    def reason_unsupported(self, config: ModelConfig, weights: dict[str, Tensor] | None = None) -> str | None:
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
        except (UserError, ValidationError) as error:
            return one_line(error)
        if (reason := first_difference(config, again)) is not None:
            return reason
        placed = {ours for name in self.names(config) for ours in name.ours}
        for i, block in enumerate(layers):
            balance = getattr(block.ffn, "balance", None)
            if balance in ("bias", "both") and f"blocks.{i}.ffn.selection_bias" not in placed:
                return f"ffn.balance of layer {i}: {balance} (a selection bias)"
        # Whatever `balance` is, a run may have started from weights with a selection bias.
        unplaced = (name for name in weights or () if name not in placed and not name.endswith("ffn.load"))
        return next((f"values of {name}" for name in unplaced if weights[name].any()), None)


def computed_options(config: ModelConfig) -> dict[str, Any]:
    """Return every option that changes a logit, by its name, with explicit sizes."""
    unused = set() if config.position == "rope" else {"rope", "rope_theta"}
    options = config.model_dump(exclude={"blocks", "isolate_documents", "dropout"} | unused)
    for i, block in enumerate(config.with_explicit_sizes().layers()):
        own = block.model_dump(exclude={"repeat", "mixer", "ffn"})
        options |= {f"{name} of layer {i}": value for name, value in own.items()}
        for part in ("mixer", "ffn"):
            values = {"type": ""} | getattr(block, part).model_dump(exclude=BALANCING | unused)
            options |= {f"{part}.{name} of layer {i}": value for name, value in values.items()}
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
