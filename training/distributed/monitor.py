"""Ranks that die, hang or fail: every other one ends soon after, and one of them says why, in one line.

Each half second a rank tells the store that joined the ranks where it runs and what its threads are in (a beat), and
reads the others'. From these and the processes of its own host it finds out who is lost (`lost.py`). The first to
write its verdict into the store prints it; the others read it there, and end in silence.

Time counts only while this process runs: one that is stopped and continued together with all others misses nobody.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from training.distributed.diagnosis import LOOP, ActivityKind, Lane, Rank, Verdict, lost
from training.distributed.process_id import Place, here
from training.errors import UserError

AGAIN = "start again with the same command: the run goes on from its newest checkpoint"
LOOK_S = 0.2  # between two looks at what is known
GRACE_S = 2.5  # after a sign that some rank is lost, to find out which
BROKEN = ("onnection", "Broken pipe", "imed out", "NCCL", "gloo")  # in the errors of a collective


class Monitor:
    """Tells the other ranks what this one is in, and ends this process where one of them is lost.

    `store` is a connection of its own, to `owner` (in words): a connection answers one question at a time.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, owner: str):
        self.store, self.limit, self.owner = store, timeout_s, owner
        self.pause = max(0.5, size / 100)  # the store then has to tell some 100 beats per second and rank at most
        self.ranks = [Rank(number) for number in range(size)]
        self.me = self.ranks[rank]
        self.me.place, self.me.lanes[LOOP] = here(), Lane()
        self.others = [each for each in self.ranks if each is not self.me]
        self.now = 0.0  # seconds that this process has run
        self.asked: float | None = None  # when the store was asked what it has not answered
        self.read = -1.0  # when it was asked what it has answered last
        self.cut: float | None = None  # when the connection to the store broke
        self.broken = False  # a connection to another rank broke
        self.terminated: float | None = None  # when SIGTERM came
        self.verdict: Verdict | None = None
        self.telling, self.concluding, self.closed = threading.Lock(), threading.Lock(), threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
        self._tell()
        for thread in (self._beat, self._look):
            threading.Thread(target=thread, name=f"monitor{thread.__name__}", daemon=True).start()

    # --- said by this rank's threads ---------------------------------------------------------------

    def meet(self) -> None:
        """Know all other ranks, which have come."""
        self._tell()

    def set_activity(self, what: str, kind: ActivityKind) -> None:
        """The loop is in `what` from now on."""
        lane = self.me.lanes[LOOP]
        lane.doing, lane.kind, lane.since = what, kind, self.now

    @contextmanager
    def in_collective(self, what: str, name: str) -> Iterator[None]:
        """Around a collective of the lane `name`. Does not return where a rank is lost."""
        lane = self.me.lanes.setdefault(name, Lane(doing=f"the {name}"))
        lane.waits, lane.count, lane.since = what, lane.count + 1, self.now
        try:
            yield
        except RuntimeError as error:
            self._look_into(error)
            raise
        finally:
            lane.waits, lane.since = "", self.now

    def end(self) -> None:
        """This rank's clean end: not before rank 0's, since a launcher stops the others when one has ended."""
        self.me.ended = True
        with suppress(RuntimeError):
            self._tell()
        first, until = self.me.number == 0, time.monotonic() + GRACE_S
        while first and not all(rank.ended for rank in self.others) and time.monotonic() < until:
            time.sleep(LOOK_S)  # the store may end with this process
        while not (first or self.ranks[0].ended or self.cut is not None):
            time.sleep(LOOK_S)
        self.close()

    def close(self) -> None:
        """End the threads, and give SIGTERM back."""
        self.closed.set()
        if signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fail(self, error: BaseException) -> BaseException:
        """This rank's end by an error. Returns what it ends with: a silent SystemExit where another one speaks."""
        self._look_into(error)
        text, keys = f"{type(error).__name__}: {error}", [f"error/{rank.number}" for rank in self.others]
        self._ask(lambda: self.store.set(f"error/{self.me.number}", text))
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        self.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it when the first rank has ended
        verdict = self._agree(Verdict("", status, by=self.me.number))
        if verdict.by != self.me.number:
            self._ask(lambda: self.store.set(f"left/{self.me.number}", ""))
            return SystemExit(verdict.status)
        until = time.monotonic() + 1.0
        while not (come := self._ask(lambda: self.store.check(keys))) and time.monotonic() < until:
            time.sleep(0.05)
        texts = self._ask(lambda: self.store.multi_get(keys)) if come else None
        self._linger(verdict)
        alike = texts is not None and all(each == text.encode() for each in texts)
        if isinstance(error, UserError) and not alike and self.me.number:  # rank 0 is the one that is expected to speak
            return UserError(f"{self.me.text()}: {error}")
        if not isinstance(error, UserError | KeyboardInterrupt):
            say(f"{self.me.text()} failed in {self.me.lane().text()} with {first_line(text)}")
        return error

    def _look_into(self, error: BaseException) -> None:
        """Where a connection broke, its other end is missed soon; does not return then."""
        if isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN):
            at, self.broken = self.me.lane().text(), True
            time.sleep(GRACE_S + self.pause)
            self._conclude(Verdict(f"{self.me.text()} lost its connection in {at}: {first_line(str(error))}", 1))

    def _terminate(self, _number: int, _frame: object) -> None:
        self.terminated = self.now  # by a launcher, maybe, because a rank died: then that one is to be named

    # --- the threads that know the others ----------------------------------------------------------

    def _beat(self) -> None:
        try:
            while not self.closed.is_set():
                self._tell()
                self.closed.wait(self.pause)
        except RuntimeError:
            self.cut = self.now

    def _tell(self) -> None:
        """Tell the store of this rank, and ask it for the others and for a verdict."""
        with self.telling:
            self.asked = asked = self.now
            lanes = {name: asdict(lane) for name, lane in dict(self.me.lanes).items()}
            beat = {"beat": asked, "ended": self.me.ended, "place": asdict(self.me.place), "lanes": lanes}
            self.store.set(f"beat/{self.me.number}", json.dumps(beat))
            come = [rank for rank in self.others if rank.place or self.store.check([f"beat/{rank.number}"])]
            beats = self.store.multi_get([f"beat/{rank.number}" for rank in come]) if come else []
            for rank, heard in zip(come, beats, strict=True):
                self._hear(rank, json.loads(heard), asked)
            if self.store.check(["verdict"]):
                self.verdict = Verdict(**json.loads(self.store.get("verdict")))
            self.read, self.asked = asked, None

    def _hear(self, rank: Rank, beat: dict[str, Any], asked: float) -> None:
        if beat["beat"] != rank.beat:
            rank.heard = asked
        rank.beat, rank.place = beat["beat"], Place(**beat["place"])
        for name, fields in beat["lanes"].items():
            lane = Lane(**fields | {"since": asked})
            if rank.lanes.get(name) != lane:
                rank.lanes[name] = lane
        rank.ended = beat["ended"]

    def _look(self) -> None:
        """Look at what is known, until this rank's end or that of the run."""
        before = time.monotonic()
        while not self.closed.wait(LOOK_S):
            self.now, before = self.now + min(time.monotonic() - before, 1.0), time.monotonic()
            if self.verdict is not None:
                if self.verdict.status == 2:
                    self.closed.wait(0.7)  # the loop may find the same error itself
                with self.concluding:
                    self._leave(self.verdict)
            for rank in self.others:
                if rank.gone is None and rank.place is not None and rank.place.dead():
                    rank.gone = self.now
            if found := self._store_lost() or self._rank_lost():
                self._conclude(found)
            if self.terminated is not None and self.now - self.terminated > GRACE_S:
                self._obey_sigterm()

    def _rank_lost(self) -> Verdict | None:
        hurry = self.broken or self.terminated is not None
        silence = min(2 * self.pause + 1, self.limit) if hurry else self.limit
        return lost(self.me, self.others, self.now, self.limit, silence, self.read)

    def _store_lost(self) -> Verdict | None:
        """Where the store is gone, or does not answer: with it go the ranks of other hosts."""
        far = [rank.text() for rank in self.others if rank.place and not rank.place.near() and not rank.ended]
        reach = f"; {far[0]}{f' and {len(far) - 1} more are' if far[1:] else ' is'} out of reach" if far else ""
        during = f"while {self.me.text()} was in {self.me.lane().text()}{reach}"
        if self.cut is not None and self.now - self.cut > 1 and not self.ranks[0].ended:
            return Verdict(f"{self.owner} has ended, {during}", 1)
        if self.asked is not None and self.now - self.asked > self.limit:
            self.cut = self.now  # it is not asked any more
            return Verdict(f"{self.owner} has not answered for {self.now - self.asked:.0f} s, {during}", 1)
        return None

    def _obey_sigterm(self) -> None:
        self.me.ended = True
        self._ask(self._tell)
        os._exit(128 + signal.SIGTERM)

    # --- the end of the run ------------------------------------------------------------------------

    def _conclude(self, found: Verdict) -> None:
        """End this process, after the line if it is this one's to say."""
        with self.concluding:
            verdict = self._agree(replace(found, by=self.me.number))
            if verdict.by == self.me.number:
                say(f"{verdict.line}; {AGAIN}")
            self._leave(verdict)

    def _leave(self, verdict: Verdict) -> None:
        if self.closed.is_set():  # the loop ends the process itself
            return
        for number in verdict.lost:
            if (place := self.ranks[number].place) is not None:
                place.kill()
        self._ask(lambda: self.store.set(f"left/{self.me.number}", ""))
        if self.me.number in (0, verdict.by):
            self._linger(verdict)
        sys.stdout.flush()
        os._exit(verdict.status)

    def _agree(self, mine: Verdict) -> Verdict:
        """The verdict that was first. Without a store, the first rank of a host that still runs speaks there."""
        first = self._ask(lambda: self.store.compare_set("verdict", "", json.dumps(asdict(mine))))
        if first is not None:
            return Verdict(**json.loads(first))
        able = [rank.number for rank in self.ranks if rank.place and rank.place.able() and rank.number not in mine.lost]
        return replace(mine, by=min(able, default=mine.by))

    def _linger(self, verdict: Verdict) -> None:
        """Until the others know, which may not be told once this process has ended."""
        keys = [f"left/{rank.number}" for rank in self.others if not rank.ended and rank.number not in verdict.lost]
        until = time.monotonic() + (1.5 if self.cut is None else 0.5)
        while keys and time.monotonic() < until and not self._ask(lambda: self.store.check(keys)):
            time.sleep(0.05)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer, or None where it does not come within a second."""
        answers: SimpleQueue = SimpleQueue()

        def ask() -> None:
            with suppress(RuntimeError):
                answers.put(question())

        if self.cut is None:
            threading.Thread(target=ask, daemon=True).start()
            with suppress(Empty):
                return answers.get(timeout=1.0)
        return None


def first_line(text: str) -> str:
    """Of an error, without what C++ adds."""
    return text.strip().partition("\n")[0]


def say(line: str) -> None:
    """The one line."""
    print(f"error: {line}", file=sys.stderr, flush=True)
