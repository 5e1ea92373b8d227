"""Monitor of the ranks: if one dies, hangs or fails, all others exit soon after, and one of them prints the reason.

Each rank writes heartbeats to the ranks' store and reads the others'. From these, and from the processes of its host,
it decides which rank is lost (diagnosis.py). The first verdict in the store counts: its author prints it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from training.distributed.diagnosis import LOOP, ActivityKind, Rank, Verdict, current_process, diagnose
from training.errors import UserError, library_error
from training.terminal import print_note

RESTART_HINT = "run the same command again to resume from the latest checkpoint"
WATCH_S = 0.2  # interval of checks
GRACE_S = 2.5  # time to find out which rank is lost, after a broken connection or a SIGTERM
CONNECTION_ERRORS = ("onnection", "Broken pipe", "imed out", "NCCL", "gloo")  # parts of failed collectives' messages


class Monitor:
    """Heartbeats of this rank; ends this process when another rank is lost."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, store_owner: str):
        """Start the threads. `store` is a connection of our own, as each answers one request at a time."""
        self.store, self.limit, self.store_owner = store, timeout_s, store_owner
        self.period = max(0.5, size / 100)  # seconds between heartbeats; a rank reads at most 100 per second
        self.ranks = [Rank(number) for number in range(size)]
        self.me = self.ranks[rank]
        self.me.process = current_process()
        self.others = [each for each in self.ranks if each is not self.me]
        self.now = 0.0  # seconds; stops while this process is: ranks that are stopped together report nobody
        self.request_at: float | None = None  # time of the pending request to the store
        self.read_at = -1.0  # time of the latest answered request
        self.store_lost_at: float | None = None
        self.has_broken_connection = False  # to another rank
        self.sigterm_at: float | None = None
        self.verdict: Verdict | None = None
        self.store_lock, self.end_lock, self.closed = threading.Lock(), threading.Lock(), threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        self.exchange_heartbeats()
        for thread in (self._heartbeat, self._watch):
            threading.Thread(target=thread, name=f"monitor{thread.__name__}", daemon=True).start()

    def set_activity(self, name: str, kind: ActivityKind) -> None:
        """Set the activity of the loop."""
        activity = self.me.activities[LOOP]
        activity.name, activity.kind, activity.changed_at = name, kind, self.now

    @contextmanager
    def in_collective(self, name: str, thread: str) -> Iterator[None]:
        """Mark a collective of a thread. If a rank is lost during it, the process exits."""
        activity = self.me.activities[thread]
        activity.n_collectives += 1
        activity.collective, activity.changed_at = name, self.now
        try:
            yield
        except RuntimeError as error:
            self._handle_connection_error(error)
            raise
        finally:
            activity.collective, activity.changed_at = "", self.now

    def finish(self) -> None:
        """End without an error. Other ranks wait for rank 0, because a launcher stops all after the first exit."""
        self.me.has_ended = True
        with suppress(RuntimeError):
            self.exchange_heartbeats()
        is_first, deadline = self.me.number == 0, time.monotonic() + GRACE_S
        while is_first and not all(rank.has_ended for rank in self.others) and time.monotonic() < deadline:
            time.sleep(WATCH_S)  # this process may hold the store
        while not (is_first or self.ranks[0].has_ended or self.store_lost_at is not None):
            time.sleep(WATCH_S)
        self.close()

    def close(self) -> None:
        """Stop the threads and restore SIGTERM."""
        self.closed.set()
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fail(self, error: BaseException) -> BaseException:
        """End with an error. Returns the exception to raise: `error`, or SystemExit if another rank reports."""
        self._handle_connection_error(error)
        text, keys = f"{type(error).__name__}: {error}", [f"error/{rank.number}" for rank in self.others]
        self._query(lambda: self.store.set(f"error/{self.me.number}", text))
        self.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it after the first exit
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        verdict = self._agree_on(Verdict("", status, reporter=self.me.number))
        if verdict.reporter != self.me.number:
            self._leave(verdict)
            return SystemExit(verdict.status)
        deadline = time.monotonic() + 1.0
        while not (all_failed := self._query(lambda: self.store.check(keys))) and time.monotonic() < deadline:
            time.sleep(0.05)
        texts = self._query(lambda: self.store.multi_get(keys)) if all_failed else None
        self._leave(verdict)
        is_same_error = texts == [text.encode()] * len(keys)
        if isinstance(error, UserError) and not is_same_error and self.me.number:
            return UserError(f"{self.me.text()}: {error}")  # rank 0's errors are printed without a name
        if not isinstance(error, UserError | KeyboardInterrupt):
            where = f"{self.me.text()} failed in {self.me.current_activity().text()}"
            print_note(f"error: {where} with {library_error(error)}")
        return error

    def _handle_connection_error(self, error: BaseException) -> None:
        """Handle a broken connection: give the monitor time to name the lost rank, then end the run."""
        if isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_ERRORS):
            where, self.has_broken_connection = self.me.current_activity().text(), True
            time.sleep(GRACE_S + self.period)
            self._end_run(Verdict(f"{self.me.text()} lost its connection in {where}: {library_error(error)}", 1))

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        self.sigterm_at = self.now  # may be a launcher's reaction to a dead rank: first find that rank

    def _heartbeat(self) -> None:
        try:
            while not self.closed.wait(self.period):
                self.exchange_heartbeats()
        except RuntimeError:
            self.store_lost_at = self.now

    def exchange_heartbeats(self) -> None:
        """Write this rank's state to the store; read the states of the others, and the verdict if any."""
        with self.store_lock:
            self.request_at = self.me.heartbeat = request_at = self.now
            self.store.set(f"heartbeat/{self.me.number}", json.dumps(asdict(self.me)))
            joined = [r for r in self.others if r.process or self.store.check([f"heartbeat/{r.number}"])]
            heartbeats = self.store.multi_get([f"heartbeat/{rank.number}" for rank in joined]) if joined else []
            for rank, heartbeat in zip(joined, map(json.loads, heartbeats), strict=True):
                rank.update(heartbeat, request_at)
            if self.store.check(["verdict"]):
                self.verdict = Verdict(**json.loads(self.store.get("verdict")))
            self.read_at, self.request_at = request_at, None

    def _watch(self) -> None:
        """Check for lost ranks until this rank or the run ends."""
        before = time.monotonic()
        while not self.closed.wait(WATCH_S):
            self.now, before = self.now + min(time.monotonic() - before, 1.0), time.monotonic()
            if self.verdict is not None:
                if self.verdict.status == 2:
                    self.closed.wait(0.7)  # give the loop time to raise the same error
                self._end_run(self.verdict)
            for rank in self.others:
                if rank.missing_since is None and rank.process is not None and rank.process.is_dead():
                    rank.missing_since = self.now
            is_urgent = self.has_broken_connection or self.sigterm_at is not None
            silence = min(2 * self.period + 1, self.limit) if is_urgent else self.limit
            times = self.now, self.limit, silence, self.read_at
            if verdict := self._diagnose_store() or diagnose(self.me, self.others, *times):
                self._end_run(verdict)
            if self.sigterm_at is not None and self.now - self.sigterm_at > GRACE_S:
                self.me.has_ended = True
                self._query(self.exchange_heartbeats)
                os._exit(128 + signal.SIGTERM)

    def _diagnose_store(self) -> Verdict | None:
        """Return a verdict if the store is gone or does not answer. It also names ranks of other hosts."""
        if self.store_lost_at is not None and self.now - self.store_lost_at > 1 and not self.ranks[0].has_ended:
            problem = "has ended"
        elif self.request_at is not None and self.now - self.request_at > self.limit:
            self.store_lost_at = self.now  # no further requests
            problem = f"has not answered for {self.now - self.request_at:.0f} s"
        else:
            return None
        remote = [r.text() for r in self.others if r.process and not r.process.is_local() and not r.has_ended]
        more = f" and {len(remote) - 1} more are" if remote[1:] else " is"
        unreachable = f"; {remote[0]}{more} out of reach" if remote else ""
        during = f"while {self.me.text()} was in {self.me.current_activity().text()}{unreachable}"
        return Verdict(f"{self.store_owner} {problem}, {during}", 1)

    def _end_run(self, verdict: Verdict) -> None:
        """End this process; print the verdict if this rank is the reporter."""
        with self.end_lock:
            if self.closed.is_set():  # the loop is ending the process
                return
            verdict = self.verdict or self._agree_on(replace(verdict, reporter=self.me.number))
            if self.closed.is_set():  # meanwhile
                return
            if verdict.reporter == self.me.number:
                print_note(f"error: {verdict.message}; {RESTART_HINT}")
            for number in verdict.lost:
                if (process := self.ranks[number].process) is not None:
                    process.kill()
            self._leave(verdict)
            os._exit(verdict.status)

    def _agree_on(self, mine: Verdict) -> Verdict:
        """Return the first verdict in the store. If the store is lost, the lowest running rank of each host reports."""
        first = self._query(lambda: self.store.compare_set("verdict", "", json.dumps(asdict(mine))))
        if first is not None:
            return Verdict(**json.loads(first))
        running = [r.number for r in self.ranks if r.process and r.process.is_running() and r.number not in mine.lost]
        return replace(mine, reporter=min(running, default=mine.reporter))

    def _leave(self, verdict: Verdict) -> None:
        """Announce the exit. The reporter, and rank 0, which may hold the store, wait until the others have left."""
        self._query(lambda: self.store.set(f"left/{self.me.number}", ""))
        if self.me.number not in (0, verdict.reporter):
            return
        keys = [f"left/{r.number}" for r in self.others if not r.has_ended and r.number not in verdict.lost]
        deadline = time.monotonic() + (1.5 if self.store_lost_at is None else 0.5)
        while keys and time.monotonic() < deadline and not self._query(lambda: self.store.check(keys)):
            time.sleep(0.05)

    def _query(self, request: Callable[[], Any]) -> Any:
        """Return the store's answer, or None after one second without an answer."""
        answers = []

        def send() -> None:
            with suppress(RuntimeError):
                answers.append(request())

        if self.store_lost_at is None:
            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            thread.join(1.0)
        return answers[0] if answers else None
