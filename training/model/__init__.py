"""The network, one file a mechanism; `gpt.GPT` puts them together from the configuration's block pattern."""

from training.model.cache import Cache
from training.model.gpt import FEED_FORWARDS, GPT, MIXERS, ParameterKind, kernel_requirements

__all__ = ["FEED_FORWARDS", "GPT", "MIXERS", "Cache", "ParameterKind", "kernel_requirements"]
