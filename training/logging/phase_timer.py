"""Where the time of a run goes: every moment belongs to one phase of `PHASES`.

The loop calls `enter(phase)` where one phase ends and the next begins. On CUDA that records an event in the device's
queue, which is read when rows are fetched: nothing waits inside a step, and a phase lasts as long as it keeps the
device busy. Reading a batch while the device still computes costs nothing; if the device waits for it, that is `data`.
Elsewhere the host's clock counts. Collectives inside forward and backward (FSDP2, tokens to experts on other ranks)
overlap with them and count as `compute`; `communication` is all other waiting for ranks.

Logs and checkpoints have the main rank's times. Their sums cover all restarts of the run.
"""

import time
from collections.abc import Iterable
from itertools import pairwise

import torch

from training.logging import phases
from training.logging.phases import PHASES

RARE = ("start", "redone")  # in a row only if they are not 0


class PhaseTimer:
    """Seconds by phase. Everything before `finish_startup` is the phase `start`."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since_row = dict.fromkeys(PHASES, 0.0)
        self._created, self._phase, self._since_row_at_load = time.perf_counter(), "start", 0.0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("start", self._now())]  # (phase, its beginning)

    def set_start(self, start: float) -> None:
        """Count the time from `start`, a value of `time.perf_counter`, to the timer's creation as start-up."""
        self._add("start", self._created - start)

    def finish_startup(self) -> None:
        """End start-up after the first step: from here on, `enter` counts."""
        if self._phase == "start":
            self._mark("idle")

    def enter(self, phase: str) -> None:
        """End the current phase and begin this one."""
        if self._phase != "start":
            self._mark(phase)

    def flush(self) -> None:
        """Add the time until now to `seconds`. Synchronizes with the device: do not call it inside a step."""
        self._mark(self._phase)
        if self.on_cuda:
            self._marks[-1][1].synchronize()
        for (phase, begin), (_, end) in pairwise(self._marks):
            self._add(phase, begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin)
        del self._marks[:-1]

    def row_times(self, n_steps: int) -> dict[str, float]:
        """Return a row's `time_data`, ...: seconds per step of each phase over the `n_steps` since the last call.

        They add up to the time that passed: an evaluation or save after a row counts in the next row.
        """
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
        return phases.goodput(self.seconds)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the sums for a checkpoint, and the part of them that no row has yet."""
        self.flush()
        return {"seconds": dict(self.seconds), "since_row": dict(self._since_row)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Add a checkpoint's sums; {} adds nothing."""
        for phase in PHASES:
            self.seconds[phase] += state.get("seconds", {}).get(phase, 0.0)
            self._since_row[phase] += state.get("since_row", {}).get(phase, 0.0)
        self._since_row_at_load = sum(state.get("since_row", {}).values())

    def add_lost_time(self, rows: Iterable[dict], step: int) -> None:
        """Count the time of the rows past `step`, which are about to be removed, as `redone`.

        Call it after `load_state_dict`. Time lost to an earlier kill is included: the first row after that kill has
        it as `time_redone`.
        """
        lost = sum(phases.phase_seconds(row for row in rows if row["step"] > step).values())
        if lost:  # the first of these rows contains the checkpoint's `since_row`, which counts already
            self._add("redone", max(0.0, lost - self._since_row_at_load))

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        self._since_row[phase] += seconds

    def _mark(self, phase: str) -> None:
        self._phase = phase
        self._marks.append((phase, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
