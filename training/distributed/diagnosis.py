"""The state of the ranks and their processes, and which rank is dead or stuck. Nothing here acts on the run."""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

# timed: other ranks wait for it at most `limit` seconds. collective: timed, and contains collectives outside of World
# (FSDP), so a rank without progress may be waiting itself. untimed: others wait until it ends or its heartbeats stop.
ActivityKind = Literal["timed", "collective", "untimed"]
FRESH_S = 2.5  # seconds; an older heartbeat may be out of date about its rank's activity
LOOP, BACKGROUND = "the loop", "the background"  # the threads of a rank that run collectives


@dataclass(frozen=True)
class ProcessId:
    """The identity of a process: unique across hosts, containers and reuse of its pid."""

    host: str
    kernel: str  # its boot and pid namespace: two containers on one machine may both have a pid 7
    pid: int
    start_time: str  # in clock ticks since boot; empty without /proc

    def is_local(self) -> bool:
        """Return True if it has the host and pid namespace of this process."""
        return (self.host, self.kernel) == (current_process().host, current_process().kernel)

    def is_dead(self) -> bool:
        """Return True if it is local and has ended. A zombie has ended."""
        return self.is_local() and self._state() in ("", "Z", "X")

    def is_running(self) -> bool:
        """Return True if it is local, has not ended and is not stopped."""
        return self.is_local() and self._state() not in ("", "Z", "X", "T", "t")

    def kill(self) -> None:
        """Send SIGKILL if it is local and still the same process."""
        if self.is_local() and not self.is_dead():
            os.kill(self.pid, signal.SIGKILL)

    def _state(self) -> str:
        state, start_time = _proc_stat(self.pid)
        return state if start_time == self.start_time else ""


@cache
def current_process() -> ProcessId:
    """Return the identity of this process."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    kernel = f"{boot.read_text().strip()} {namespace.readlink()}" if boot.exists() and namespace.is_symlink() else ""
    return ProcessId(socket.gethostname(), kernel, os.getpid(), _proc_stat(os.getpid())[1])


def _proc_stat(pid: int) -> tuple[str, str]:
    """Return (state, start time) of a process, see proc(5); state "" if there is none."""
    try:
        if not Path("/proc/self/stat").exists():  # not Linux
            os.kill(pid, 0)
            return "R", ""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass
class Activity:
    """The current activity of one thread of a rank."""

    name: str = "the start"
    kind: ActivityKind = "timed"
    collective: str = ""  # the collective that the thread is in, or empty
    n_collectives: int = 0  # number of collectives entered so far
    changed_at: float = field(default=0.0, compare=False)  # last change of the fields above, by the observer's clock

    def text(self) -> str:
        """Return the activity as text: "the all-reduce of gradients of step 5"."""
        return f"{self.collective} of {self.name}" if self.collective else self.name


@dataclass
class Rank:
    """The state of a rank, as this process knows it."""

    number: int
    process: ProcessId | None = None  # None until the rank has joined
    activities: dict[str, Activity] = field(
        default_factory=lambda: {LOOP: Activity(), BACKGROUND: Activity(BACKGROUND)}
    )
    has_ended: bool = False  # True if it announced its end
    heartbeat: float = -1.0  # time of its latest heartbeat, by its own clock
    last_heartbeat: float = 0.0  # time when that arrived, by our clock
    missing_since: float | None = None  # time when its process was first found dead, by our clock

    def update(self, message: dict[str, Any], now: float) -> None:
        """Set the fields from the rank's own heartbeat, which arrived at the time `now`."""
        if message["heartbeat"] != self.heartbeat:
            self.heartbeat, self.last_heartbeat = message["heartbeat"], now
        self.process = ProcessId(**message["process"])
        for thread, fields in message["activities"].items():
            activity = Activity(**fields | {"changed_at": now})
            if activity != self.activities[thread]:
                self.activities[thread] = activity
        self.has_ended = message["has_ended"]

    def text(self) -> str:
        """Return the rank, host and pid as text."""
        return f"rank {self.number}" + (f" (host {self.process.host}, pid {self.process.pid})" if self.process else "")

    def current_activity(self) -> Activity:
        """Return the activity of a thread that is in a collective; without one, that of the loop."""
        waiting = (activity for activity in self.activities.values() if activity.collective)
        return next(waiting, self.activities[LOOP])


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, and the rank that prints it."""

    message: str  # empty: the reporter prints its own error
    status: int
    lost: Sequence[int] = ()
    reporter: int = -1


def diagnose(
    me: Rank, others: Sequence[Rank], now: float, limit: float, silence: float, read_at: float
) -> Verdict | None:
    """Return a verdict if a rank is dead, silent or stuck, else None. Times are in seconds.

    `limit` is the longest wait, `silence` the longest time without a heartbeat. `read_at` is the time of the latest
    request that the store answered: a dead process counts only if a later answer does not announce its end.
    """
    activity = me.current_activity()
    during = f"while {me.text()} {'waited for it' if activity.collective else 'was'} in {activity.text()}"
    running = [rank for rank in others if not rank.has_ended]
    for rank in running:
        if rank.missing_since is not None and read_at > rank.missing_since:
            return Verdict(f"{rank.text()} died {during}", 1, (rank.number,))
    for rank in running:
        if read_at - rank.last_heartbeat > silence:
            silent = "has sent no heartbeat for" if rank.process else "has not joined for"
            return Verdict(f"{rank.text()} {silent} {read_at - rank.last_heartbeat:.0f} s, {during}", 1, (rank.number,))
    if any(read_at - rank.last_heartbeat > FRESH_S for rank in running):
        return None
    verdicts = (_stuck(me, thread, others, now, limit, read_at) for thread in me.activities)
    return next(filter(None, verdicts), None)


def _stuck(me: Rank, thread: str, others: Sequence[Rank], now: float, limit: float, read_at: float) -> Verdict | None:
    """Return a verdict if this rank and all others made no progress in a thread for longer than `limit`."""
    mine, theirs = me.activities[thread], {rank.number: rank.activities[thread] for rank in others}
    if not (mine.collective or mine.kind == "collective"):
        return None
    if now - mine.changed_at <= limit or any(read_at - activity.changed_at <= limit for activity in theirs.values()):
        return None
    working = (theirs[rank.number] for rank in others if not rank.has_ended)
    if any(activity.kind == "untimed" and not activity.collective for activity in working):
        return None
    seconds = f"{now - mine.changed_at:.0f} s"
    last = min(others, key=lambda rank: theirs[rank.number].n_collectives)
    if theirs[last.number].n_collectives < mine.n_collectives:
        state = "has ended" if last.has_ended else f"is stuck in {theirs[last.number].text()}"
        message = f"{last.text()} {state}, while {me.text()} waited {seconds} for it in {mine.text()}"
        return Verdict(message, 1, (last.number,))
    listed = "; ".join(f"rank {number} is in {activity.text()}" for number, activity in list(theirs.items())[:8])
    return Verdict(f"no rank has made progress for {seconds}: rank {me.number} is in {mine.text()}; {listed}", 1)
