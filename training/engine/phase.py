"""Report the loop's current phase to the phase timer and to the other ranks' hang monitors."""

from collections.abc import Iterator
from contextlib import contextmanager

from training.distributed.diagnosis import ActivityKind
from training.distributed.world import World
from training.logging.phases import PhaseTimer


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
