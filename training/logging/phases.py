"""Where the main rank's time goes, over all restarts of a run: every moment belongs to one phase of `PHASES`.

On CUDA `PhaseTimer` records events in the device's queue and reads them when rows are fetched: nothing waits inside a
step, and a phase lasts as long as it keeps the device busy. Reading a batch while the device computes costs nothing; if
the device waits for it, that is `data`. Elsewhere the host's clock counts. Collectives inside forward and backward
overlap with them and count as `compute`; `communication` is all other waiting for ranks.
"""

import time
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PHASES = {  # name and meaning
    "compute": "forward and backward",
    "optimizer": "clipping and the update",
    "data": "waiting for a batch",
    "communication": "waiting for other ranks",
    "evaluation": "validation and samples",
    "checkpoint": "waiting for a save",
    "idle": "rows and logs",
    "start": "start-up, with the first step",
    "redone": "steps lost to a kill, done again",
}
PRODUCTIVE = ("compute", "optimizer", "data", "communication")  # counted by goodput
RARE = ("start", "redone")  # in a row only if they are not 0
MIN_SHARE = 0.005  # a smaller share rounds to 0 %


def goodput(seconds: dict[str, float]) -> float | None:
    """Return the share of all time that went into steps that count; None if nothing was measured."""
    total = sum(seconds.values())
    return sum(seconds[phase] for phase in PRODUCTIVE) / total if total else None


def phase_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Return each phase's share of all time, the largest first, without those that round to 0 %."""
    total = sum(seconds.values())
    shares = {phase: value / total for phase, value in seconds.items() if total and value / total >= MIN_SHARE}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def as_text(seconds: dict[str, float]) -> str:
    """Return the shares and goodput on a line: "92 % compute, 3 % optimizer, 5 % start; goodput 95 %"."""
    text = ", ".join(f"{100 * share:.0f} % {phase}" for phase, share in phase_shares(seconds).items())
    return f"{text}; goodput {100 * goodput(seconds):.0f} %" if text else ""


class PhaseTimer:
    """Seconds by phase. Everything from `started`, a `time.perf_counter`, to `finish_startup` is the phase `start`."""

    def __init__(self, device: "torch.device", started: float | None = None) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds, self._since_row = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self._since_row_at_load = 0.0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []  # (phase, its beginning); the last one is current
        if started is not None:
            self._add("start", time.perf_counter() - started)
        self._mark("start")

    def finish_startup(self) -> None:
        """End start-up after the first step: from here on, `enter` counts."""
        if self._marks[-1][0] == "start":
            self._mark("idle")

    def enter(self, phase: str) -> None:
        """End the current phase and begin this one."""
        if self._marks[-1][0] != "start":
            self._mark(phase)

    def flush(self) -> None:
        """Add the time until now to `seconds`. Synchronizes with the device: do not call it inside a step."""
        self._mark(self._marks[-1][0])
        if self.on_cuda:
            self._marks[-1][1].synchronize()
        for (phase, begin), (_, end) in pairwise(self._marks):
            self._add(phase, begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin)
        del self._marks[:-1]

    def row_times(self, n_steps: int) -> dict[str, float]:
        """Return a row's `time_data`, ...: each phase's seconds per step over the `n_steps` since the last call."""
        self.flush()
        elapsed, self._since_row = self._since_row, dict.fromkeys(PHASES, 0.0)
        return {
            f"time_{phase}": float(f"{seconds / n_steps:.4g}")
            for phase, seconds in elapsed.items()
            if seconds or phase not in RARE
        }

    @property
    def goodput(self) -> float:
        """Share of all time that went into steps that count."""
        self.flush()
        return goodput(self.seconds)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the sums for a checkpoint, and the part of them that no row has yet."""
        self.flush()
        return {"seconds": dict(self.seconds), "since_row": dict(self._since_row)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Add a checkpoint's sums; {} adds nothing."""
        seconds, since_row = state.get("seconds", {}), state.get("since_row", {})
        for phase in PHASES:
            self.seconds[phase] += seconds.get(phase, 0.0)
            self._since_row[phase] += since_row.get(phase, 0.0)
        self._since_row_at_load = sum(since_row.values())

    def add_lost_time(self, lost_s: float) -> None:
        """Count the time of the rows past the checkpoint, which a restart removes, as `redone`.

        Call it after `load_state_dict`. Time lost to an earlier kill is in those rows as `time_redone`.
        """
        if lost_s:  # the first of these rows contains the checkpoint's `since_row`, which counts already
            self._add("redone", max(0.0, lost_s - self._since_row_at_load))

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        self._since_row[phase] += seconds

    def _mark(self, phase: str) -> None:
        now = time.perf_counter()
        if self.on_cuda:
            import torch

            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((phase, now))
