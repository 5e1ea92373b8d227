"""The log of the training loop: metrics stay on the device until rows are due, then go to all sinks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training import device as devices
from training.config import Config
from training.distributed.world import World
from training.logging.history import History
from training.logging.phases import PhaseTimer
from training.logging.report import update_report
from training.logging.sinks import RunInfo, Sink
from training.optim.batch_schedule import BatchSchedule
from training.optim.schedule import lr_factor


@dataclass
class RunLog:
    """Metrics of the updates since the last rows, the clock of training, and the sinks of the main rank."""

    config: Config
    world: World
    step_metrics: Callable[[dict[str, Sequence[float]], int], dict[str, Any]]  # model.metrics.step_metrics
    flops_per_token: float  # of the whole model, forward and backward
    timer: PhaseTimer
    peak_learning_rates: dict[str, float]  # by group of parameters
    info: RunInfo | None = None  # on the main rank, as the next two
    history: History | None = None  # of the written rows
    sinks: list[Sink] = field(default_factory=list)
    time_s: float = 0.0  # seconds of training over all restarts, without evaluations and saves
    rows: list[dict] = field(default_factory=list)  # fetched, not written yet
    last_row: dict = field(default_factory=dict)  # the newest fetched row
    _pending: list[tuple[int, dict[str, Tensor], int, int]] = field(default_factory=list)  # arguments of `add`
    _clock: float = 0.0

    def __post_init__(self) -> None:
        self.batches = BatchSchedule.of(self.config)

    def start_clock(self) -> None:
        """Count the time from now on as training. Call it before the first step, and after evaluations and saves."""
        self._clock = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Tensor], n_targets: int, n_skipped: int) -> None:
        """Keep an update's metrics on the device. `step_metrics` turns loss_sum and those with a "." into values."""
        self.timer.finish_startup()
        self._pending.append((step, metrics, n_targets, n_skipped))

    def fetch(self) -> None:
        """Turn the pending updates into `rows`, in one transfer; times are means. Synchronizes with the device."""
        if not self._pending:
            return
        self.timer.enter("compute")  # the transfer waits for the device to finish its updates
        tensors = [value for _, metrics, _, _ in self._pending for value in metrics.values()]
        numbers = iter(torch.cat([value.flatten().float() for value in tensors]).tolist())
        self.timer.enter("idle")
        now, n_steps = time.perf_counter(), len(self._pending)
        step_s, first = (now - self._clock) / n_steps, self._pending[0][0] - 1
        n_tokens = self.batches.tokens(self._pending[-1][0]) - self.batches.tokens(first)
        times = {"tokens_per_s": n_tokens / (now - self._clock), "step_s": step_s}
        self._clock = now
        phase_times = self.timer.row_times(n_steps)
        for step, metrics, n_targets, n_skipped in self._pending:
            values = {name: [next(numbers) for _ in range(value.numel())] for name, value in metrics.items()}
            self.rows.append(self._row(step, values, n_targets, n_skipped, times) | phase_times)
        self._pending.clear()
        self.last_row = self.rows[-1]

    def write(self, *, with_report: bool = False) -> None:
        """Hand the fetched rows to all sinks, and update the report if asked to."""
        rows, self.rows = self.rows, []
        for sink in self.sinks:
            sink.write(rows)
        if with_report and self.info is not None:
            update_report(self.info, self.history)

    def close(self, summary: dict | None = None) -> None:
        """Close all sinks; `summary` is None if the run stopped before its end."""
        while self.sinks:
            self.sinks.pop(0).close(summary)

    def _row(self, step: int, values: dict[str, list[float]], n_targets: int, n_skipped: int, times: dict) -> dict:
        config = self.config
        layers = {name.removeprefix("layers."): values.pop(name) for name in list(values) if name.startswith("layers.")}
        factor = lr_factor(config.schedule, step - 1, config.steps)
        rates = {name: peak * factor for name, peak in self.peak_learning_rates.items()}
        scalars = {name: values.pop(name)[0] for name in list(values) if "." not in name and name != "loss_sum"}
        peak = devices.peak_flops(self.world.device, config.precision)
        self.time_s += times["step_s"]
        return {
            "step": step,
            **self.step_metrics(values, n_targets),
            "learning_rate": config.optim.learning_rate * factor,
            **scalars,
            **({"learning_rates": rates, "layers": layers} if layers else {}),
            "skipped_steps": n_skipped,
            "tokens": self.batches.tokens(step),
            "tokens_per_s": times["tokens_per_s"],
            "mfu": peak and times["tokens_per_s"] * self.flops_per_token / (peak * self.world.size),
            "memory_gib": devices.peak_memory_gib(self.world.device),
            "step_s": times["step_s"],
            "time_s": self.time_s,
        }
