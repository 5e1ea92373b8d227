"""Where the time of a run goes: every moment belongs to one phase.

The loop says `enter(phase)` where one ends and the next begins. On CUDA that is an event in the device's queue,
resolved when rows are fetched: nothing waits inside a step, and a phase lasts as long as it keeps the device. A batch
that is read while the device still computes costs nothing; one that the device waits for is `data`. Elsewhere it is
the host's clock. What is sent within forward and backward (FSDP2, tokens to experts on other ranks) overlaps with
them and is `compute`; `communication` is what is waited for besides.

On several ranks the main one's timer is written. Its sums are those of the run's whole life, over restarts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise

import torch

from training.logging import phases as times
from training.logging.phases import PHASES

RARE = ("start", "redone")  # in rows only where there is something of it


class PhaseTimer:
    """Seconds by phase. Start-up is one phase whatever it enters, until the first step is done: the first `idle`."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since_row = dict.fromkeys(PHASES, 0.0)
        self._created, self._phase, self._carried = time.perf_counter(), "start", 0.0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("start", self._now())]  # (what begins, when)

    def set_start(self, at: float) -> None:
        """The start was at this value of `time.perf_counter`, before there was a timer."""
        self._spend("start", self._created - at)

    def enter(self, phase: str) -> None:
        """The running phase ends and this one begins."""
        if self._phase == "start" and phase != "idle":
            return
        self._phase = phase
        self._marks.append((phase, self._now()))

    def flush(self) -> None:
        """Count the time until now. Waits for the device, and so has no place inside a step."""
        self._marks.append((self._phase, self._now()))
        if self.on_cuda:
            self._marks[-1][1].synchronize()
        for (phase, begin), (_, end) in pairwise(self._marks):
            self._spend(phase, begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin)
        del self._marks[:-1]

    def row_times(self, n_steps: int) -> dict[str, float]:
        """Seconds a step of each phase, over the steps since the last call: a row's fields `time_data`, ...

        They add up to the time that passed, so the evaluation and the save that follow a row are in the next one.
        """
        self.flush()
        spent, self._since_row = self._since_row, dict.fromkeys(PHASES, 0.0)
        return {
            f"time_{phase}": float(f"{seconds / n_steps:.4g}")
            for phase, seconds in spent.items()
            if seconds or phase not in RARE
        }

    @property
    def goodput(self) -> float:
        """The share of all time that was spent on the steps that count."""
        self.flush()
        return times.goodput(self.seconds)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For a checkpoint: the sums, and what of them no row has yet."""
        self.flush()
        return {"seconds": dict(self.seconds), "since_row": dict(self._since_row)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Go on from a checkpoint's sums; nothing for one that has none."""
        for phase in PHASES:
            self.seconds[phase] += state.get("seconds", {}).get(phase, 0.0)
            self._since_row[phase] += state.get("since_row", {}).get(phase, 0.0)
        self._carried = sum(state.get("since_row", {}).values())

    def add_lost_time(self, rows: Iterable[dict], step: int) -> None:
        """Count the time of the rows past this step, which are about to be removed. Follows `load_state_dict`.

        That of an earlier kill is in them: the first row after it tells it as `time_redone`.
        """
        lost = sum(times.phase_seconds(row for row in rows if row["step"] > step).values())
        if lost:  # the first of them told what the checkpoint's sums have already
            self._spend("redone", max(0.0, lost - self._carried))

    def _spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        self._since_row[phase] += seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
