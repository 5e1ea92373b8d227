"""Learning-rate schedules: factors of the peak learning rate, as pure functions of the step.

A schedule is a function of (config, step, steps), where step >= `warmup_steps` and `steps` is the run's length. The
config is `fitted`: its lengths are steps. Step `warmup_steps` has the peak. The last step, `steps` - 1, has
`final_ratio`, as in nanoGPT; Transformers' schedules would reach it one step later.
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


def decay_progress(step: int, peak_step: int, steps: int) -> float:
    """Return 0 up to `peak_step`, then rise linearly to 1 at the last step. A run of one step is at its peak."""
    last_step = steps - 1
    if step == last_step and step > 0:  # also if the peak is there
        return 1.0
    return max(0, step - peak_step) / max(1, last_step - peak_step)


def interpolate(config: CosineSchedule, remaining: float) -> float:
    """Return the factor between `final_ratio` (`remaining` is 0) and the peak (1)."""
    return config.final_ratio + (1 - config.final_ratio) * remaining


def cosine(config: CosineSchedule, step: int, steps: int) -> float:
    """Decay from 1 to `final_ratio` along half a cosine."""
    return interpolate(config, (1 + math.cos(math.pi * decay_progress(step, config.warmup_steps, steps))) / 2)


def linear(config: LinearSchedule, step: int, steps: int) -> float:
    """Decay linearly from 1 to `final_ratio`."""
    return interpolate(config, 1 - decay_progress(step, config.warmup_steps, steps))


def wsd(config: WSDSchedule, step: int, steps: int) -> float:
    """Return 1, then decay to `final_ratio` over the last `decay_steps`."""
    last_at_peak = max(config.warmup_steps, steps - 1 - config.decay_steps)
    return interpolate(config, DECAY_SHAPES[config.decay_shape](decay_progress(step, last_at_peak, steps)))


def constant(config: ConstantSchedule, step: int, steps: int) -> float:  # noqa: ARG001 (one signature)
    return 1.0


def inverse_sqrt(config: InverseSqrtSchedule, step: int, steps: int) -> float:  # noqa: ARG001 (one signature)
    return math.sqrt((config.warmup_steps + 1) / (step + 1))


# The remaining share of the decay, from 1 to 0, as functions of the progress, from 0 to 1.
DECAY_SHAPES = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}

SCHEDULES = {
    CosineSchedule: cosine,
    LinearSchedule: linear,
    WSDSchedule: wsd,
    ConstantSchedule: constant,
    InverseSqrtSchedule: inverse_sqrt,
}
