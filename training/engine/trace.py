"""Traces of a running job: `logging.trace_at`, or a file `trace` in the run's folder, which `touch` creates."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from training.config import Config
from training.distributed.world import World
from training.errors import library_error
from training.files import mkdir_durable
from training.logging.phases import PhaseTimer, phase_shares
from training.terminal import print_line, print_note

STEPS = 3  # that a trace records
TOP_OPERATIONS = 5


class Tracer:
    """Records steps of the main rank with torch.profiler. As a context manager it ends a trace that has begun."""

    def __init__(self, config: Config, world: World, timer: PhaseTimer) -> None:
        self.config, self.world, self.timer = config, world, timer
        self.request = config.run_dir / "trace"
        self.profile: profile | None = None
        self.first = 0  # step of the trace

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def before(self, step: int) -> None:
        """Begin a trace if one is due at this step, and end one that has all its steps."""
        if not self.world.is_main:
            return
        if self.profile is not None and step >= self.first + STEPS:
            self.finish()
        if self.profile is None and (step in self.config.logging.trace_at or self._is_requested(step)):
            self._start(step)

    def _is_requested(self, step: int) -> bool:
        """Return True if the file is there, and remove it. Looks once per `logging.every` steps."""
        if (step - 1) % self.config.logging.every or not self.request.exists():
            return False
        self.request.unlink(missing_ok=True)
        return True

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.timer.flush()
        self.first, self.seconds, self.started = step, dict(self.timer.seconds), time.perf_counter()
        self.profile = profile(activities=activities)
        self.profile.start()

    def finish(self) -> None:
        """End the trace, if one is running: write it and print its summary."""
        if self.profile is None:
            return
        self.timer.flush()  # waits for the device
        elapsed = time.perf_counter() - self.started
        phases = {phase: seconds - self.seconds[phase] for phase, seconds in self.timer.seconds.items()}
        trace, self.profile = self.profile, None
        trace.stop()
        path = self.config.run_dir / "traces" / f"step-{self.first:08d}.json.gz"
        try:
            mkdir_durable(path.parent)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a run does not stop for its trace
            print_note(f"{path}: {library_error(error)}; no trace")
            return
        for line in summary_lines(trace, path, elapsed, phases, on_cuda=self.world.device.type == "cuda"):
            print_line(line)


def summary_lines(trace: Any, path: Path, elapsed_s: float, phases: dict[str, float], *, on_cuda: bool) -> list[str]:
    """Return what a trace shows, in words."""
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    operations = [event for event in trace.key_averages() if getattr(event, time_of) > 0]
    if on_cuda:  # operations on the host launch these
        operations = [event for event in operations if event.device_type != torch.autograd.DeviceType.CPU]
    operations.sort(key=lambda event: -getattr(event, time_of))
    total = sum(getattr(event, time_of) for event in operations) / 1e6
    shares_of = {event.key[:60]: getattr(event, time_of) / 1e6 / elapsed_s for event in operations[:TOP_OPERATIONS]}
    top = ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares_of.items())
    busy, waits = ("the GPU", "waits") if on_cuda else ("the main thread", "is outside of operations")
    shares = ", ".join(f"{100 * share:.0f} % {phase}" for phase, share in phase_shares(phases).items())
    return [
        f"trace: {path} (open it with https://ui.perfetto.dev)",
        f"  time of the steps in {elapsed_s:.2f} s: {shares}",
        f"  operations: {top}",
        f"  {busy} {waits} {100 * max(0.0, 1 - total / elapsed_s):.0f} % of the time",
    ]
