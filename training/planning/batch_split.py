"""Splitting of a step's samples over ranks and micro-batches."""

import math

from training.config import Config

HEADROOM = 0.9  # share of the memory that a step may use; fragmentation and other programs need the rest
CPU_TOKENS = 8192  # per micro-batch on a CPU: more is slower (docs/log.md) and takes memory from other programs


def max_samples_per_rank(config: Config, world_size: int) -> int:
    """Return the samples of one step on the rank that has the most of them."""
    return math.ceil(config.batch_tokens // config.model.n_positions / world_size)


def equal_parts(n_samples: int, fits: int, config: Config, device_type: str) -> int:
    """Return the micro-batch, at most `fits`, that splits a rank's samples into the fewest equal parts."""
    if device_type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // config.model.n_positions))
    return math.ceil(n_samples / math.ceil(n_samples / fits))
