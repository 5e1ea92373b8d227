"""The loop's phases, and the events that are due after a step: log, evaluate, save or stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from training.config import Config
from training.distributed.diagnosis import ActivityKind
from training.distributed.world import World
from training.engine.state import Checkpoints, TrainState
from training.logging.phase_timer import PhaseTimer

# Schedulers send SIGUSR1 before a job's time is over.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
SECOND_SIGNAL_S = 1.0  # terminal and launcher both forward a signal: repeats within 1 s count once, later ones kill


class Phases:
    """The loop's phases: `with phase("data"):` times its block as `data` and the code after it as `idle`."""

    def __init__(self, timer: PhaseTimer, world: World):
        self.timer, self.world = timer, world

    @contextmanager
    def __call__(self, name: str, activity: str | None = None, kind: ActivityKind | None = None) -> Iterator[None]:
        """Enter the phase `name` of `logging/phases.py`; other ranks' errors name the `activity` if this rank hangs.

        The default `kind` is "untimed" on the main rank, which writes files, and "timed" on the others.
        """
        if activity is not None:
            self.world.set_activity(activity, kind or ("untimed" if self.world.is_main else "timed"))
        self.timer.enter(name)
        try:
            yield
        finally:
            self.timer.enter("idle")


class Due(NamedTuple):
    """The events after one step, equal on all ranks."""

    log: bool
    evaluate: bool
    save: bool
    signal: int  # the number of the signal that stops the run, or 0


class Events:
    """The events after a step, by its number, the clock and signals. As a context manager it catches stop signals."""

    def __init__(self, config: Config, world: World, checkpoints: Checkpoints):
        self.config, self.world, self.checkpoints = config, world, checkpoints
        self.signal, self.received_at, self.saved_at = 0, 0.0, time.monotonic()
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Events":
        # Python allows handlers in the main thread only. Ray, which trains in another thread, stops runs itself.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > SECOND_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def after(self, state: TrainState) -> Due:
        """Return what is due after the step just done. Raises UserError if a save has failed. Collective."""
        config, step = self.config, state.step
        is_last, minutes = step == config.steps, config.checkpoint.every_minutes
        is_late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        has_failed = self.checkpoints.writer.failure is not None
        received, is_late, has_failed = self.world.max_int(self.signal, is_late, has_failed)
        if has_failed:
            self.checkpoints.wait()  # raises the failure, on all ranks
        # No periodic save after a non-finite update: the cause may be bad weights, which would replace good ones.
        is_healthy = state.guard.consecutive == 0
        save = is_last or received > 0 or (is_healthy and (is_late > 0 or _is_multiple(step, config.checkpoint.every)))
        if save:
            self.saved_at = time.monotonic()
        evaluate = is_last or _is_multiple(step, config.eval.every)
        log = save or evaluate or state.guard.is_stuck or _is_multiple(step, config.logging.every)
        return Due(log, evaluate, save, received)


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
