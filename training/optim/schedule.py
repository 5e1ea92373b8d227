"""Learning-rate schedules: factors of the peak learning rate, as pure functions of the step.

A schedule is a function of (config, step, steps), where step >= `warmup_steps` and `steps` is the run's length.
"""

import math

from training.config import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    ScheduleConfig,
    WSDSchedule,
)


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor of the peak learning rate at step 0 .. steps - 1. Warm-up is linear, to 1 at `warmup_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return SCHEDULES[type(config)](config, step, steps)


def cosine(config: CosineSchedule, step: int, steps: int) -> float:
    """Decay from 1 to `final_ratio` along half a cosine."""
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return 1 - (1 - config.final_ratio) * ((1 - math.cos(math.pi * progress)) / 2)


def linear(config: LinearSchedule, step: int, steps: int) -> float:
    """Decay linearly from 1 to `final_ratio`."""
    return 1 - (1 - config.final_ratio) * ((step - config.warmup_steps) / (steps - config.warmup_steps))


def wsd(config: WSDSchedule, step: int, steps: int) -> float:
    """Return 1, then decay linearly to `final_ratio` over the last `decay_steps`."""
    return 1 - (1 - config.final_ratio) * (max(0, step - (steps - config.decay_steps)) / config.decay_steps)


def constant(config: ConstantSchedule, step: int, steps: int) -> float:  # noqa: ARG001 (one signature)
    return 1.0


def inverse_sqrt(config: InverseSqrtSchedule, step: int, steps: int) -> float:  # noqa: ARG001 (one signature)
    return math.sqrt((config.warmup_steps + 1) / (step + 1))


SCHEDULES = {
    CosineSchedule: cosine,
    LinearSchedule: linear,
    WSDSchedule: wsd,
    ConstantSchedule: constant,
    InverseSqrtSchedule: inverse_sqrt,
}
