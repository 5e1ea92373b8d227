"""Copies finished checkpoints, and the run's other files, to `checkpoint.copy_to` in a thread beside the training.

One checkpoint at a time; after it the newest, so that a slow server skips some and never holds the training up. A
failure is one line, and the next checkpoint tries again.
"""

import threading
from pathlib import Path

from training.checkpoint.read import is_complete, is_kept_for_good, list_checkpoints, read_state
from training.checkpoint.remote_run import LATE, RemoteRun, is_hidden
from training.checkpoint.write import CheckpointWriter
from training.errors import UserError, library_error
from training.terminal import print_line, print_note

NOTE_S = 5.0  # a wait for a copy that takes longer is announced
STOP_S = 60.0  # a run that a signal stops waits for its copy no longer
CLOSE_S = 5.0
NOT_COPIED = ("checkpoints", "wandb")  # W&B has its own copy, and its files are made again from metrics.jsonl


class Closed(Exception):
    """The run has ended: no file more is copied."""


class Copier:
    """The thread that copies a run. Its first copy is what an earlier process could not finish."""

    def __init__(self, run_dir: Path, remote: RemoteRun, writer: CheckpointWriter, *, keep_best: bool):
        self.run_dir, self.remote, self.writer, self.keep_best = run_dir, remote, writer, keep_best
        self.problem: UserError | None = None  # of the last copy
        self._sizes: dict[str, tuple[int, int]] = {}  # time and size of each file when it was copied
        self._condition = threading.Condition()
        self._is_due, self._is_busy, self._is_ending, self._is_closed = True, False, False, False
        # As a daemon it cannot keep a process alive whose server does not answer.
        threading.Thread(target=self._run, name="copier", daemon=True).start()
        writer.on_saved = self.start

    def start(self) -> None:
        """Start a copy of what is new, now or after the one in progress. Does not wait."""
        with self._condition:
            self._is_due = True
            self._condition.notify_all()

    def finish(self, limit_s: float | None = None) -> None:
        """Copy what is new and wait for it, for `limit_s` at most; print whether the newest checkpoint is there.

        Without a limit the run is over: its final model and summary are copied as well.
        """
        checkpoints = list_checkpoints(self.writer.folder)
        if not checkpoints:
            return
        newest, url = checkpoints[-1][0], self.remote.url
        with self._condition:
            self._is_ending = limit_s is None
            self._is_due = True
            self._condition.notify_all()
            if not self._is_over(NOTE_S if limit_s is None else min(NOTE_S, limit_s)):
                limit = "" if limit_s is None else f", for {limit_s:g} s at most"
                print_line(f"checkpoint.copy_to: copying step {newest:,} to {url}{limit}")
                self._is_over(None if limit_s is None else limit_s - NOTE_S)
            is_over, problem = not (self._is_due or self._is_busy), self.problem
        if is_over and problem is None:
            print_line(f"checkpoint.copy_to: step {newest:,} is at {url}{' with the final model' * (limit_s is None)}")
        else:
            reason = problem or f"not finished after {limit_s:g} s"
            place = "the checkpoint is there, but not all" if newest in self.remote.verified else "not there"
            print_note(f"checkpoint.copy_to: step {newest:,}: {place}: {reason}; the same command copies it")

    def close(self) -> None:
        """End the thread after the file that it copies; wait for that for 5 seconds at most."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._is_busy, CLOSE_S)

    def _is_over(self, timeout_s: float | None) -> bool:
        return self._condition.wait_for(lambda: not (self._is_due or self._is_busy), timeout_s)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_due or self._is_closed)
                if self._is_closed:
                    return
                self._is_due, self._is_busy, is_ending = False, True, self._is_ending
            problem = None
            try:
                self._copy(is_ending)
            except Closed:
                pass
            except UserError as error:
                problem = error
            except Exception as error:  # the training goes on
                problem = UserError(library_error(error))
            with self._condition:
                previous, self.problem = self.problem, problem
                self._is_busy = False
                if not self._is_ending:
                    self._report(previous)
                self._condition.notify_all()

    def _report(self, previous: UserError | None) -> None:
        """Print a line at the first failure, and at the first copy that works again."""
        if self.problem is not None and previous is None:
            print_note(f"checkpoint.copy_to: {self.problem}; training goes on, and the next checkpoint tries again")
        elif self.problem is None and previous is not None:
            print_line(f"checkpoint.copy_to: works again; step {max(self.remote.verified):,} is at {self.remote.url}")

    def _copy(self, is_ending: bool) -> None:
        """Copy the missing checkpoints, the newest first; then remove older ones there."""
        while (step := self._next_step()) is not None:
            with self.writer.pinned(step) as path:
                if path is not None:
                    self._put_files(is_late=False)  # the rows of the checkpoint's steps come before it
                    self.remote.put(path, self._check_open)
        steps = self._local_steps()
        if steps and steps[-1] in self.remote.verified:  # also what a process that was killed has left there
            config = self.writer.config
            self.remote.prune(config.keep, self._best_step(steps[-1]), config.keep_every)
        if is_ending:
            self._put_files(is_late=False)
            self._put_files(is_late=True)

    def _next_step(self) -> int | None:
        """Return the step to copy: the newest one, or an older one that is kept for good; None if all are there."""
        self._check_open()
        steps = self._local_steps()
        if not steps or steps[-1] not in self.remote.verified:
            return steps[-1] if steps else None
        every, best = self.writer.config.keep_every, self._best_step(steps[-1])
        kept = [step for step in steps if is_kept_for_good(step, best, every)]
        return next((step for step in reversed(kept) if step not in self.remote.complete), None)

    def _local_steps(self) -> list[int]:
        return [step for step, path in list_checkpoints(self.writer.folder) if is_complete(path)]

    def _best_step(self, step: int) -> int | None:
        """Return the best step as the checkpoint of a step knows it; None if it is not to be kept."""
        path = dict(list_checkpoints(self.writer.folder)).get(step)
        best = read_state(path)["best"] if path is not None and self.keep_best else None
        return best and best["step"]

    def _put_files(self, *, is_late: bool) -> None:
        """Copy the files beside the checkpoints that changed since the last copy; summary.json is the last one."""
        paths = [path for path in self.run_dir.rglob("*") if path.is_file()]
        names = {path.relative_to(self.run_dir).as_posix(): path for path in paths}
        for name, path in sorted(names.items(), key=lambda item: (item[0] == "summary.json", item[0])):
            if is_hidden(name) or name.split("/")[0] in NOT_COPIED or name.startswith(LATE) != is_late:
                continue
            self._check_open()
            status = path.stat()
            state = status.st_mtime_ns, status.st_size
            if self._sizes.get(name) != state:
                self.remote.folder.put(path, name)
                self._sizes[name] = state

    def _check_open(self) -> None:
        """Raise Closed once the run has ended."""
        if self._is_closed:
            raise Closed
