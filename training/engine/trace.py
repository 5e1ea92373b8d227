"""Traces of a running job: `logging.trace_at`, or a file `trace` in the run's folder, which `touch` creates."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training.config import Config
from training.distributed.world import World
from training.errors import library_error
from training.files import mkdir_durable
from training.logging.phases import PhaseTimer, phase_shares
from training.terminal import print_line, print_note

STEPS = 3  # that a trace records
TOP_OPERATIONS = 5
MAX_NAME = 60  # characters of an operation's


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

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Begin a trace before this step if one is due, and end one after its last step."""
        is_due = step in self.config.logging.trace_at or self._is_requested(step)
        if self.world.is_main and self.profile is None and is_due:
            self._start(step)
        yield
        if self.profile is not None and step >= self.first + STEPS - 1:
            self.finish()

    def _is_requested(self, step: int) -> bool:
        """Return True if the file is there, and remove it. Looks every `logging.every` steps."""
        if not self.world.is_main or (step - 1) % self.config.logging.every or not self.request.exists():
            return False
        try:
            self.request.unlink()
        except OSError as error:  # it would be there again and again
            print_note(f"{self.request}: {error.strerror}; no trace")
            return False
        return True

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)
        self.profile.start()
        self.timer.flush()  # waits for the device
        self.first, self.seconds, self.started = step, dict(self.timer.seconds), time.perf_counter()

    def finish(self) -> None:
        """End the trace, if one is running: write it and print its summary."""
        if self.profile is None:
            return
        self.timer.flush()
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
    device = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in trace.events() if event.device_type == device]
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    time_of = "device_time_total" if on_cuda else "self_cpu_time_total"  # microseconds; a kernel has no parts
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event.name[:MAX_NAME]] += getattr(event, time_of)
    top = ", ".join(f"{us / elapsed_s / 1e4:.0f} % {name}" for name, us in by_name.most_common(TOP_OPERATIONS))
    busy_s = covered([(event.time_range.start, event.time_range.end) for event in events]) / 1e6
    busy, waits = ("the GPU", "waits") if on_cuda else ("the processor", "is outside of operations")
    shares = ", ".join(f"{100 * share:.0f} % {phase}" for phase, share in phase_shares(phases).items())
    return [
        f"trace: {path} (open it with https://ui.perfetto.dev)",
        f"  the steps took {elapsed_s:.2f} s: {shares}",
        f"  operations: {top}",
        f"  {busy} {waits} {100 * max(0.0, 1 - busy_s / elapsed_s):.0f} % of the time",
    ]


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
