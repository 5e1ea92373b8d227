"""What an architecture of Transformers answers, whichever it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from training.config import ModelConfig
from training.weights.hf.names import Name


@dataclass(frozen=True)
class Architecture:
    """One `model_type`. `unsupported` yields what in our configuration it cannot express, in words."""

    unsupported: Callable[[ModelConfig], Iterator[str]]
    to_hf: Callable[[ModelConfig], dict]  # config.json, without what every model has
    from_hf: Callable[[dict], dict]  # ModelConfig's options; raises UserError that names the field
    names: Callable[[ModelConfig], list[Name]]  # the tensors, each of ours in exactly one place
    prefix: str = ""  # of the names of all but the head; files of the bare network lack it
    harmless: re.Pattern[str] = re.compile("(?!)")  # tensors in files that hold no weights

    def reason_unsupported(self, config: ModelConfig) -> str | None:
        """The first thing in the configuration that it cannot express; None where it is exactly this architecture."""
        return next(self.unsupported(config), None)
