"""Tokenizing on all cores, in processes that run `serve`.

Not `multiprocessing`: a process that it spawns runs the user's main module again, so every caller would need a
`__main__` guard. These processes import neither that module nor torch.

The protocol: a line of JSON with texts goes in; a line of JSON with the number of tokens of each comes out, then the
tokens. A process ends when its input ends, which also happens when its owner is killed.
"""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np

from training.data.chunks import Chunk
from training.data.tokenizer import Tokenizer
from training.errors import UserError

REQUEST_CHARS = 1 << 20
MIN_REQUESTS = 2  # for less text, starting processes costs more than it saves
PROGRAM = "import sys; from training.data.workers import serve; serve(sys.argv[1])"


def encode_chunks(chunks: Iterable[Chunk], folder: Path, workers: int | None) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Yield each chunk with its tokens, in order, by the tokenizer in `folder`. Holds a few requests in memory."""
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


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_requests(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group consecutive chunks into requests of about REQUEST_CHARS characters."""
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
    """Send requests to the workers in turn, one at a time each, and yield the answers in the same order."""
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
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, request: list[Chunk]) -> "Worker":
        """Send a request. Raises UserError if the process has died."""
        try:
            self.process.stdin.write(json.dumps([chunk.text for chunk in request]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self

    def receive(self) -> list[np.ndarray]:
        """Wait for the tokens of each text of the request. Raises UserError if the process has died."""
        header = self.process.stdout.readline()
        counts = json.loads(header) if header.endswith(b"\n") else None
        data = self.process.stdout.read(sum(counts) * self.dtype.itemsize) if counts else b""
        if counts is None or len(data) != sum(counts) * self.dtype.itemsize:
            raise self._died()
        return np.split(np.frombuffer(data, self.dtype), np.cumsum(counts)[:-1])

    def _died(self) -> UserError:
        status = self.process.wait()
        return UserError(f"a tokenizing process ended with status {status} (out of memory?); lower data.workers")


def serve(folder: str) -> None:
    """Answer requests on stdin, in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, who then ends this process
    tokenizer = Tokenizer.load(folder)
    for line in sys.stdin.buffer:
        ids = tokenizer.encode_batch(json.loads(line))
        sys.stdout.buffer.write(json.dumps([len(each) for each in ids]).encode() + b"\n")
        sys.stdout.buffer.writelines(each.tobytes() for each in ids)
        sys.stdout.buffer.flush()
