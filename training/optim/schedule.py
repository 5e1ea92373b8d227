"""The learning rate over the run, as a factor of the peak: pure functions of the step."""

from __future__ import annotations

import math

from training.config import ConstantSchedule, CosineSchedule, LinearSchedule, WSDSchedule


def _down(progress: float, final_ratio: float) -> float:
    """A straight line from 1 at progress 0 to `final_ratio` at progress 1."""
    return 1 - (1 - final_ratio) * progress


def cosine(section: CosineSchedule, step: int, steps: int) -> float:
    progress = (step - section.warmup_steps) / (steps - section.warmup_steps)
    return _down((1 - math.cos(math.pi * progress)) / 2, section.final_ratio)


def linear(section: LinearSchedule, step: int, steps: int) -> float:
    return _down((step - section.warmup_steps) / (steps - section.warmup_steps), section.final_ratio)


def wsd(section: WSDSchedule, step: int, steps: int) -> float:
    return _down(max(0, step - (steps - section.decay_steps)) / section.decay_steps, section.final_ratio)


def constant(section: ConstantSchedule, step: int, steps: int) -> float:  # noqa: ARG001 (one signature)
    return 1.0


SCHEDULES = {CosineSchedule: cosine, LinearSchedule: linear, WSDSchedule: wsd, ConstantSchedule: constant}


def lr_factor(section: CosineSchedule | ConstantSchedule, step: int, steps: int) -> float:
    """Learning rate over its peak for step 0 .. steps - 1; warm-up ends at the peak, step `warmup_steps`."""
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    return SCHEDULES[type(section)](section, step, steps)
