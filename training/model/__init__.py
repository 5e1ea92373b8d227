"""The network, one file per mechanism; `gpt.GPT` builds it from the configuration's block pattern."""

from training.model.gpt import FEED_FORWARDS, GPT, MIXERS, kernel_requirements
from training.model.stats import init_weights, initial_value, model_stats
