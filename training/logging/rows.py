"""Rows of metrics: kept on the device while steps run, fetched all at once, described for the log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training import device as devices
from training.config import Config
from training.distributed.world import World
from training.logging.phase_timer import PhaseTimer
from training.model import ModelStats
from training.model.metrics import step_metrics
from training.optim.schedule import lr_factor


@dataclass
class RunLog:
    """RunLog of the steps since the last row was written, and the clock of training."""

    config: Config
    world: World
    model: ModelStats
    timer: PhaseTimer
    time_s: float = 0.0  # spent training, over restarts; evaluations and saves do not count
    _pending: list[tuple[int, dict[str, Tensor], int, int]] = field(default_factory=list)
    _since: float = 0.0

    def start_clock(self) -> None:
        """Training begins, or goes on after an evaluation or a save."""
        self._since = time.perf_counter()

    def add(self, step: int, totals: dict[str, Tensor], n_targets: int, n_skipped: int) -> None:
        """Keep the summed metrics of step 0 .. steps - 1, and "grad_norm", on the device; and steps skipped so far."""
        self._pending.append((step, totals, n_targets, n_skipped))

    def flush(self) -> list[dict]:
        """The rows of the steps since the last call; their times are an average. Waits for the device."""
        if not self._pending:
            return []
        self.timer.enter("compute")  # which is what is waited for here
        fetched = _fetch([totals for _, totals, _, _ in self._pending])
        self.timer.enter("idle")
        now, times = time.perf_counter(), self.timer.row_times(len(fetched))
        seconds, self._since = (now - self._since) / len(fetched), now
        counts = [(step, n_targets, n_skipped) for step, _, n_targets, n_skipped in self._pending]
        self._pending.clear()
        return [self._row(*of_step, values, seconds) | times for of_step, values in zip(counts, fetched, strict=True)]

    def _row(self, step: int, n_targets: int, n_skipped: int, values: dict[str, list[float]], seconds: float) -> dict:
        config = self.config
        (grad_norm,) = values.pop("grad_norm")
        tokens_per_s = config.batch_tokens / seconds
        peak = devices.peak_flops(self.world.device, config.precision)
        self.time_s += seconds
        return {
            "step": step + 1,
            **step_metrics(values, n_targets, self.model.top_ks),
            "learning_rate": config.optim.learning_rate * lr_factor(config.schedule, step, config.steps),
            "grad_norm": grad_norm,
            "skipped_steps": n_skipped,
            "tokens": (step + 1) * config.batch_tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": peak and tokens_per_s * self.model.flops_per_token / (peak * self.world.size),
            "memory_gib": devices.peak_memory_gib(self.world.device),
            "step_s": seconds,
            "time_s": self.time_s,
        }


def _fetch(steps: list[dict[str, Tensor]]) -> list[dict[str, list[float]]]:
    """Steps' tensors as flat lists of numbers, in one transfer."""
    flat = torch.cat([value.flatten().float() for totals in steps for value in totals.values()]).tolist()
    fetched, start = [], 0
    for totals in steps:
        values = {}
        for name, value in totals.items():
            values[name] = flat[start : start + value.numel()]
            start += value.numel()
        fetched.append(values)
    return fetched
