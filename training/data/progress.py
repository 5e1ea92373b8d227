"""Progress of preparing data, on stderr: a bar on a terminal, else lines, so that no phase is silent for a minute."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from training.terminal import is_terminal, print_note, redirects, rich_console

Result = TypeVar("Result")
LINE_EVERY_S = 30.0  # without a terminal
POLL_S = 0.05


class Progress:
    """The progress of one stage, in bytes of text. `total` is None if it is unknown, as for compressed text.

    The bytes that are read of files, of `total_read`, tell the share that is done in any case. The stage ends after
    `at_most` bytes of text, if there are as many.
    """

    def __init__(
        self, stage: str, total: int | None = None, *, total_read: int | None = None, at_most: int | None = None
    ):
        self.stage, self.total, self.total_read, self.at_most = stage, total, total_read, at_most
        self.n_bytes, self.n_read, self.start = 0, 0, time.perf_counter()
        self.is_reading = True
        self.on_change: Callable[[], object] = lambda: None

    def __call__(self, text: str) -> str:
        """Count a text that was processed, and return it."""
        self.add(len(text.encode()))
        return text

    def add(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        self.on_change()

    def add_read(self, n_bytes: int) -> None:
        """Count bytes that were read of a file, before decompression."""
        self.n_read += n_bytes
        self.on_change()

    @property
    def share(self) -> float | None:
        """The share of the stage that is done; None if no size is known."""
        pairs = ((self.n_bytes, self.total), (self.n_bytes, self.at_most), (self.n_read, self.total_read))
        shares = [done / total for done, total in pairs if total]
        return min(1.0, max(shares)) if shares and (self.total or self.total_read) else None

    def forget_sizes(self) -> None:
        """Forget all sizes: what remains of the stage is no text."""
        self.total = self.total_read = self.at_most = None

    def watch(self, texts: Iterable[str], next_stage: str) -> Iterator[str]:
        """Yield the texts and count them; then, or once the generator is closed, the next stage begins."""
        try:
            yield from map(self, texts)
        finally:
            self.stage, self.is_reading = next_stage, False
            self.forget_sizes()
            self.on_change()

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total / 1e6:.1f}"
        seconds = time.perf_counter() - self.start
        return f"{self.stage}: {self.n_bytes / 1e6:.1f}{total} MB in {seconds:.1f} s{self.outlook(seconds)}"

    def outlook(self, seconds: float) -> str:
        """Return the share done, the speed and the time left after some seconds; "" before anything is done."""
        if not (self.n_bytes and self.is_reading):
            return ""
        speed = f"{self.n_bytes / 1e6 / max(seconds, 1e-3):.1f} MB/s"
        if not self.share:
            return f", {speed}"
        left = timedelta(seconds=round(seconds * (1 - self.share) / self.share))
        return f", {self.share:.0%}, {speed}, {left} left"


@contextmanager
def show_progress(stage: str, quiet: bool, *, only_if_slow: bool = False, **sizes: int | None) -> Iterator[Progress]:
    """Show a stage until the block ends. `only_if_slow`: print no line for a stage of less than LINE_EVERY_S.

    `sizes` are those of `Progress`.
    """
    progress = Progress(stage, **sizes)
    if quiet:
        yield progress
    elif is_terminal("stderr"):
        with _bar(progress, transient=only_if_slow):
            yield progress
    else:
        with _lines(progress, only_if_slow):
            yield progress


@contextmanager
def _lines(progress: Progress, only_if_slow: bool) -> Iterator[None]:
    if not only_if_slow:
        print_note(f"{progress.stage} ...")
    stage, end = progress.stage, threading.Event()

    def beat() -> None:
        while not end.wait(LINE_EVERY_S):
            print_note(f"{progress} ...")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    progress.stage = stage
    progress.forget_sizes()
    if not only_if_slow or time.perf_counter() - progress.start > LINE_EVERY_S:
        print_note(str(progress))


@contextmanager
def _bar(progress: Progress, transient: bool) -> Iterator[None]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[size]}"),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=rich_console("stderr"), transient=transient, **redirects()) as bar:
        task = bar.add_task(progress.stage, total=None, size="")

        def update() -> None:
            total = "" if progress.total is None else f" / {progress.total / 1e6:.1f}"
            outlook = progress.outlook(time.perf_counter() - progress.start)
            size = f"{progress.n_bytes / 1e6:.1f}{total} MB{outlook}"
            bar.tasks[0].total = None if progress.share is None else 1.0  # `update` keeps the old total for None
            bar.update(task, completed=progress.share or 0.0, description=progress.stage, size=size)

        progress.on_change = update
        yield


def run_interruptibly(work: Callable[[], Result]) -> Result:
    """Return `work()`, run in a thread, because native code that takes minutes would hold back Ctrl-C.

    After an exception here, such as KeyboardInterrupt, the thread goes on until `work` returns or the process ends.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
    if errors:
        raise errors[0]
    return results[0]
