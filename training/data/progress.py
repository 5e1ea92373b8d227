"""Progress of `prepare`: a bar on a terminal, two lines for each stage elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(stage: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a stage on stderr. Call the yielded function with the bytes of text processed since its last call."""
    if quiet:
        yield lambda _n_bytes: None
    elif sys.stderr.isatty():
        with _bar(stage) as advance:
            yield advance
    else:
        start, total = time.perf_counter(), 0

        def count(n_bytes: int) -> None:
            nonlocal total
            total += n_bytes

        print(f"{stage} ...", file=sys.stderr, flush=True)
        yield count
        seconds = time.perf_counter() - start
        print(f"{stage}: {total / 1e6:.1f} MB in {seconds:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _bar(stage: str) -> Iterator[Callable[[int], object]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(stage, total=None)  # unknown: text may be compressed, or come from the network
        yield lambda n_bytes: bar.advance(task, n_bytes)
