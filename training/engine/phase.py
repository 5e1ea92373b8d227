"""Say where the loop is, to the phase timer and to the ranks that wait for this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from training.distributed.diagnosis import ActivityKind
from training.distributed.world import World
from training.logging.phase_timer import PhaseTimer


class Phases:
    """`with phase("data"):` counts the time of the block as `data`, and what follows as `idle`."""

    def __init__(self, timer: PhaseTimer, world: World):
        self.timer, self.world = timer, world

    @contextmanager
    def __call__(self, name: str, activity: str | None = None, kind: ActivityKind | None = None) -> Iterator[None]:
        """Enter the phase `name` of `logging/phases.py`; `activity` is what other ranks read about this one.

        By default the main rank may take as long as it needs, since it writes files, and others may not.
        """
        if activity is not None:
            self.world.set_activity(activity, kind or ("untimed" if self.world.is_main else "timed"))
        self.timer.enter(name)
        try:
            yield
        finally:
            self.timer.enter("idle")
