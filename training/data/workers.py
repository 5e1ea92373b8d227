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

from training.data.chunks import Chunk
from training.data.tokenizer import Tokenizer
from training.errors import UserError

REQUEST_CHARS = 1 << 20  # characters that are sent at once
MIN_REQUESTS = 2  # requests for which starting processes costs more than it saves


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_chunks(chunks: Iterable[Chunk], folder: Path, workers: int | None) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Each chunk with its tokens, in order, by the tokenizer in `folder`; a few requests in memory at a time."""
    requests = to_requests(chunks)
    first = list(islice(requests, MIN_REQUESTS))
    requests = chain(first, requests)
    workers = workers or n_cores()
    tokenizer = Tokenizer.load(folder)
    if workers > 1 and len(first) == MIN_REQUESTS:
        yield from encode_in_processes(requests, folder, tokenizer.dtype, workers)
        return
    for request in requests:
        yield from zip(request, tokenizer.encode_batch([chunk.text for chunk in request]), strict=True)


def to_requests(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Consecutive chunks, together about REQUEST_CHARS characters long."""
    request, length = [], 0
    for chunk in chunks:
        request.append(chunk)
        length += len(chunk.text)
        if length >= REQUEST_CHARS:
            yield request
            request, length = [], 0
    if request:
        yield request


def encode_in_processes(
    requests: Iterator[list[Chunk]], folder: Path, dtype: np.dtype, workers: int
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Chunks go to the workers in turn and come back in that order, one at a time at each worker."""
    with ExitStack() as stack:
        idle = [stack.enter_context(Worker(folder, dtype)) for _ in range(workers)]
        busy = deque((worker.send(request), request) for worker, request in zip(idle, requests, strict=False))
        while busy:
            worker, request = busy.popleft()
            ids = worker.receive()
            if following := next(requests, None):
                busy.append((worker.send(following), following))
            yield from zip(request, ids, strict=True)


class Worker:
    """A process that tokenizes one request at a time."""

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

    def send(self, request: Sequence[Chunk]) -> Worker:
        """Give it a request to work on."""
        try:
            self.process.stdin.write(json.dumps([chunk.text for chunk in request]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self

    def receive(self) -> list[np.ndarray]:
        """The tokens of each text of the request, when it is done."""
        header = self.process.stdout.readline()
        counts = json.loads(header) if header.endswith(b"\n") else None
        data = self.process.stdout.read(sum(counts) * self.dtype.itemsize) if counts else b""
        if counts is None or len(data) != sum(counts) * self.dtype.itemsize:
            raise self._died()
        return np.split(np.frombuffer(data, self.dtype), np.cumsum(counts)[:-1])

    def _died(self) -> UserError:
        status = self.process.wait()
        return UserError(f"a tokenizing process ended with status {status} (out of memory?); lower data.workers")
