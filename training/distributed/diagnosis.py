"""Who keeps a run from going on: what ranks know of one another, and what follows from it. Nothing here acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.distributed.process_id import Place

# What others may expect of a rank that does something. work: they wait up to the limit for it. collective: there are
# collectives inside that nobody announces, so that it waits itself when it does not go on. untimed: it takes as long as
# it takes, and others wait; only its end, or its silence, is a fault.
ActivityKind = Literal["timed", "collective", "untimed"]
FRESH_S = 2.5  # the age of a beat that still tells where its rank is
LOOP, BACKGROUND = "loop", "background"  # the threads of a rank that wait for other ranks


@dataclass
class Lane:
    """What a thread of a rank is in."""

    doing: str = "the start"
    kind: ActivityKind = "timed"
    waits: str = ""  # the collective that it is in
    count: int = 0  # collectives entered so far
    since: float = field(default=0.0, compare=False)  # when the rest last changed, by the clock of who knows it

    def text(self) -> str:
        """What it is in, in words."""
        return f"{self.waits} of {self.doing}" if self.waits else self.doing


@dataclass
class Rank:
    """A rank as another, or itself, knows it; `place` is None until it has come."""

    number: int
    place: Place | None = None
    lanes: dict[str, Lane] = field(default_factory=dict)
    ended: bool = False  # and said so
    beat: float = -1.0  # its clock, when it was last heard of
    heard: float = 0.0  # ours
    gone: float | None = None  # when its process was first missed here

    def text(self) -> str:
        """Its name, in words."""
        return f"rank {self.number}" + (f" (host {self.place.host}, pid {self.place.pid})" if self.place else "")

    def lane(self) -> Lane:
        """The lane that waits, else the loop's."""
        return next((lane for lane in self.lanes.values() if lane.waits), self.lanes[LOOP])


@dataclass(frozen=True)
class Verdict:
    """Why the run ends; `by` is the rank that says so."""

    line: str  # empty: it says it in its own way
    status: int
    lost: Sequence[int] = ()
    by: int = -1


def lost(me: Rank, others: Sequence[Rank], now: float, limit: float, silence: float, read: float) -> Verdict | None:
    """Who keeps the run from going on, if anybody does.

    `limit` is the longest wait and `silence` the longest time without a beat, in seconds; `read` is when the store was
    last asked for beats and answered: a rank that told of its end is not missed, nor one that is not asked for.
    """
    lane = me.lane()
    during = f"while {me.text()} {'waited for it' if lane.waits else 'was'} in {lane.text()}"
    for rank in others:
        if not rank.ended and rank.gone is not None and read > rank.gone:
            return Verdict(f"{rank.text()} died {during}", 1, (rank.number,))
    for rank in others:
        if not rank.ended and read - rank.heard > silence:
            how = "has not been heard of for" if rank.place else "has not come in"
            return Verdict(f"{rank.text()} {how} {read - rank.heard:.0f} s, {during}", 1, (rank.number,))
    if any(not rank.ended and read - rank.heard > FRESH_S for rank in others):
        return None  # what it was in then says little
    found = (_behind(me, name, [r for r in others if name in r.lanes], now, limit, read) for name in me.lanes)
    return next(filter(None, found), None)


def _behind(me: Rank, name: str, others: Sequence[Rank], now: float, limit: float, read: float) -> Verdict | None:
    """Who is behind, where this rank has waited too long in a lane and nobody else has moved in it either."""
    mine, theirs = me.lanes[name], {rank.number: rank.lanes[name] for rank in others}
    if not (others and (mine.waits or mine.kind == "collective")):
        return None
    if now - mine.since <= limit or any(read - lane.since <= limit for lane in theirs.values()):
        return None
    if any(
        lane.kind == "untimed" and not lane.waits and not rank.ended for rank in others if (lane := rank.lanes[name])
    ):
        return None
    seconds = f"{now - mine.since:.0f} s"
    last = min(others, key=lambda rank: rank.lanes[name].count)
    if theirs[last.number].count < mine.count:
        state = "has ended" if last.ended else f"does not come out of {theirs[last.number].text()}"
        line = f"{last.text()} {state}, while {me.text()} waited {seconds} for it in {mine.text()}"
        return Verdict(line, 1, (last.number,))
    places = "; ".join(f"rank {number} is in {lane.text()}" for number, lane in list(theirs.items())[:8])
    return Verdict(f"no rank has gone on for {seconds}: rank {me.number} is in {mine.text()}; {places}", 1)
