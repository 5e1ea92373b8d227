"""Tokenizing on all cores, by processes that run `training.data.worker`.

They are started anew: nothing is forked, torch is not imported, and the user's main module is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np

from training.data.chunks import Piece
from training.data.tokenizer import Tokenizer
from training.errors import UserError

CHUNK = 1 << 20  # characters that are sent at once
SMALL = 2  # chunks for which starting processes costs more than it saves


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoded(pieces: Iterable[Piece], folder: Path, workers: int | None) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its tokens, in order, by the tokenizer in `folder`; a few chunks in memory at a time."""
    several = chunks(pieces)
    first = list(islice(several, SMALL))
    several = chain(first, several)
    workers = workers or cores()
    tokenizer = Tokenizer.load(folder)
    if workers > 1 and len(first) == SMALL:
        yield from in_processes(several, folder, tokenizer.dtype, workers)
        return
    for chunk in several:
        yield from zip(chunk, tokenizer.encode_batch([piece.text for piece in chunk]), strict=True)


def chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces, together about CHUNK characters long."""
    chunk, length = [], 0
    for piece in pieces:
        chunk.append(piece)
        length += len(piece.text)
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def in_processes(
    several: Iterator[list[Piece]], folder: Path, dtype: np.dtype, workers: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Chunks go to the workers in turn and come back in that order, one at a time at each worker."""
    with ExitStack() as stack:
        idle = [stack.enter_context(Worker(folder, dtype)) for _ in range(workers)]
        busy = deque((worker.send(chunk), chunk) for worker, chunk in zip(idle, several, strict=False))
        while busy:
            worker, chunk = busy.popleft()
            ids = worker.receive()
            if following := next(several, None):
                busy.append((worker.send(following), following))
            yield from zip(chunk, ids, strict=True)


class Worker:
    """A process that tokenizes one chunk at a time."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtype = dtype
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "training.data.worker", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, chunk: Sequence[Piece]) -> Worker:
        """Give it a chunk to work on."""
        try:
            self.process.stdin.write(json.dumps([piece.text for piece in chunk]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self

    def receive(self) -> list[np.ndarray]:
        """The tokens of each text of the chunk, when it is done."""
        header = self.process.stdout.readline()
        counts = json.loads(header) if header.endswith(b"\n") else None
        data = self.process.stdout.read(sum(counts) * self.dtype.itemsize) if counts else b""
        if counts is None or len(data) != sum(counts) * self.dtype.itemsize:
            raise self._died()
        return np.split(np.frombuffer(data, self.dtype), np.cumsum(counts)[:-1])

    def _died(self) -> UserError:
        status = self.process.wait()
        return UserError(f"a tokenizing process ended with status {status} (out of memory?); lower data.workers")
