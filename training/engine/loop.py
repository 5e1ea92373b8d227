"""The loop's phases, the events that are due after a step (log, evaluate, save or stop), and its early ends."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from training.config import Config
from training.distributed.world import World
from training.engine.guard import MAX_CONSECUTIVE
from training.engine.state import Checkpoints, TrainState
from training.errors import UserError
from training.logging.phases import PhaseTimer
from training.logging.rows import RunLog
from training.terminal import print_line

# Schedulers send SIGUSR1 before a job's time is over.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
SECOND_SIGNAL_S = 1.0  # terminal and launcher both forward a signal: repeats within 1 s count once, later ones kill


class Phases:
    """The loop's phases: `with phase("data"):` times its block as `data` and the code after it as `idle`."""

    def __init__(self, timer: PhaseTimer, world: World):
        self.timer, self.world = timer, world

    @contextmanager
    def __call__(self, name: str, activity: str | None = None) -> Iterator[None]:
        """Enter the phase `name` of `logging/phases.py`; other ranks' errors name the `activity` if this rank hangs."""
        if activity is not None:  # untimed: the main rank writes files, which may take long
            self.world.set_activity(activity, "untimed" if self.world.is_main else "timed")
        self.timer.enter(name)
        try:
            yield
        finally:
            self.timer.enter("idle")


class Due(NamedTuple):
    """The events after one step, equal on all ranks."""

    log: bool
    evaluate: bool
    tasks: bool
    save: bool
    pause: bool  # the turn of this run is over: save, and let another one train
    signal: int  # the number of the signal that stops the run, or 0


class Events:
    """The events after a step, by its number, the clock and signals. As a context manager it catches stop signals."""

    def __init__(self, config: Config, world: World, checkpoints: Checkpoints, turn_s: float | None = None):
        self.config, self.world, self.checkpoints = config, world, checkpoints
        self.turn_end = math.inf if turn_s is None else time.monotonic() + turn_s
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
        """Return the events after the step that just ended. Raises UserError if a save has failed. Collective."""
        config, step = self.config, state.step
        is_last, minutes = step == config.steps, config.checkpoint.every_minutes
        is_late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        has_failed = self.checkpoints.writer.failure is not None
        is_over = time.monotonic() > self.turn_end and not is_last
        received, is_late, has_failed, is_over = self.world.max_int(self.signal, is_late, has_failed, is_over)
        if has_failed:
            self.checkpoints.wait()  # raises the failure, on all ranks
        # No periodic save after a non-finite update: the cause may be bad weights, which would replace good ones.
        is_healthy = state.guard.consecutive == 0
        is_regular = any(_is_multiple(step, n) for n in (config.checkpoint.every, config.checkpoint.keep_every))
        pause = is_healthy and is_over > 0
        save = is_last or received > 0 or pause or (is_healthy and (is_late > 0 or is_regular))
        if save:
            self.saved_at = time.monotonic()
        evaluate = is_last or _is_multiple(step, config.eval.every)
        tasks = bool(config.eval.tasks) and (is_last or _is_multiple(step, config.eval.tasks_every))
        log = save or evaluate or tasks or state.guard.is_stuck or _is_multiple(step, config.logging.every)
        return Due(log, evaluate, tasks, save, pause, received)


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def is_over(state: TrainState, config: Config) -> bool:
    """Return True after the last step, and if `eval.patience` is at its end: a function of the state alone."""
    return state.step >= config.steps or is_out_of_patience(state, config)


def is_out_of_patience(state: TrainState, config: Config) -> bool:
    """Return True after an evaluation if the best one was `eval.patience` evaluations ago, or more."""
    patience, every = config.eval.patience, config.eval.every
    if patience is None or state.best is None or state.step % every:
        return False
    return state.step // every - state.best["step"] // every >= patience


def check_finite(state: TrainState, log: RunLog) -> None:
    """Raise UserError, after writing the rows, if MAX_CONSECUTIVE updates or the validation loss were not finite.

    The state is not saved, because it would replace a good checkpoint.
    """
    val_loss = log.last_row.get("val_loss", 0.0)
    if state.guard.is_stuck:
        reason = f"the last {MAX_CONSECUTIVE} losses or gradients were NaN or infinite"
    elif not math.isfinite(val_loss):
        reason = f"val_loss is {val_loss}"
    else:
        return
    log.write()
    raise UserError(
        f"step {state.step}: {reason}, and nothing more is saved; lower the learning rate and start over with --resume "
        f"never, or with another --name that starts from --resume {log.config.run_dir / 'checkpoints'}/step-N"
    )


def report_stop(number: int, checkpoints: Checkpoints, state: TrainState, log: RunLog, resume: str) -> int:
    """Close the log, print which signal stopped the run and how to resume it; return the exit status. Collective.

    Waits for the copy of the checkpoint, for a limited time.
    """
    log.close()
    if log.world.is_main:
        command = "the same command" if resume == "auto" else "the same command without --resume"
        name = signal.Signals(number).name
        print_line(f"stopped by {name}, saved after step {state.step}; {command} resumes it")
    log.world.set_activity("the copy of the run", "untimed" if log.world.is_main else "timed")
    checkpoints.finish_copy(is_finished=False)
    return 128 + number
