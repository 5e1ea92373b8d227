"""Processes that import nothing: forks of a server that has imported torch and training once.

A command or a rank starts in 20 ms this way, instead of 5 CPU seconds. Start-up itself, torchrun, and the cost of
imports are tested with real processes (`conftest.command`, `launched.py`).

    python tests/warm.py      the server: one JSON request a line on stdin; it ends with stdin

The server writes `pid-RANK`, then `status-RANK` into the request's folder, beside the rank's `out-RANK` and `err-RANK`.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parent.parent
PRELOAD = [
    "trajectory",
    "crashes",
    "training.train",
    "training.engine",
    "training.session",
    "training.evaluate",
    "training.generate",
    "training.export",
    "training.distributed.consistency",
    "training.logging.console",
    "training.logging.tensorboard",
    "torch.utils.tensorboard",
    "torch.profiler._cupti_monitor",
    "huggingface_hub.serialization",
    "jinja2",
    "s3fs",
]


class Result(NamedTuple):
    """The result of a launch: each rank's exit status, negative for a signal, and the concatenated outputs."""

    statuses: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0 if every rank ended with 0, else the first status that is not 0."""
        return next((status for status in self.statuses if status), 0)


class Launch:
    """Processes of one request."""

    def __init__(self, folder: Path, n_ranks: int, server: subprocess.Popen):
        self.folder, self.n_ranks, self.server = folder, n_ranks, server
        self.pids = [int(self._read(f"pid-{rank}")) for rank in range(n_ranks)]

    def _read(self, name: str, timeout_s: float = 60) -> str:
        path, until = self.folder / name, time.monotonic() + timeout_s
        while not path.exists():
            assert self.server.poll() is None, "the server of warm processes has ended"
            assert time.monotonic() < until, f"no {name} after {timeout_s} s\n{self.output('err')}"
            time.sleep(0.005)
        return path.read_text()

    def has_ended(self, rank: int) -> bool:
        """Return True if the rank has ended."""
        return (self.folder / f"status-{rank}").exists()

    def output(self, name: str) -> str:
        """Return the text of `out` or `err` so far, rank by rank."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}-*")))

    def poll(self) -> int | None:
        """Return the exit status of the first rank that ended; None while all run."""
        ended = sorted(self.folder.glob("status-*"))
        return int(ended[0].read_text()) if ended else None

    def wait(self, timeout_s: float = 240) -> Result:
        """Wait until every rank has ended."""
        statuses = [int(self._read(f"status-{rank}", timeout_s)) for rank in range(self.n_ranks)]
        return Result(statuses, self.output("out"), self.output("err"))

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Kill every rank that still runs and wait for its end."""
        for rank, pid in enumerate(self.pids):
            if not self.has_ended(rank):
                os.kill(pid, signal.SIGKILL)
        self.wait()


class Server:
    """The server, started with the first launch."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment, self.n_launches = folder, environment, 0
        self.process: subprocess.Popen | None = None
        self.stores: list[object] = []

    def start(
        self, target: str, *arguments: str, n_ranks: int = 1, env: dict[str, str | None] | None = None, stdout: str = ""
    ) -> Launch:
        """Call `target` on every rank: "module:function" with the list of arguments, or the path of a script.

        The function's result is the exit status. A variable in `env` that is None is removed. `stdout` is a file or
        terminal to write to, instead of `out-RANK`.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        self.n_launches += 1
        folder = self.folder / f"launch-{self.n_launches}"
        folder.mkdir()
        variables = (self._rendezvous(n_ranks) if n_ranks > 1 else {}) | (env or {})
        request = {"folder": str(folder), "target": target, "arguments": list(arguments), "n_ranks": n_ranks}
        request["stdout"] = stdout
        self.process.stdin.write(json.dumps(request | {"env": variables}).encode() + b"\n")
        self.process.stdin.flush()
        return Launch(folder, n_ranks, self.process)

    def run(self, target: str, *arguments: str, n_ranks: int = 1, env: dict[str, str | None] | None = None) -> Result:
        """`start` and wait."""
        return self.start(target, *arguments, n_ranks=n_ranks, env=env).wait()

    def _rendezvous(self, n_ranks: int) -> dict[str, str]:
        """Return the variables that torchrun sets. The store is in this process, as torchrun's is in its own."""
        import torch.distributed as dist

        self.stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.stores[0].port),
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def close(self) -> None:
        """End the server and every process that it started."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def serve() -> int:
    """Fork for every request, until stdin ends."""
    for module in PRELOAD:
        importlib.import_module(module)
    template = importlib.import_module("training.logging.template")
    template.environment(template.HERE).get_template("report.html.j2")  # compiled once
    running: dict[int, Path] = {}
    while True:
        ready, _, _ = select.select([0], [], [], 0.01 if running else None)
        if ready:
            line = sys.stdin.buffer.readline()
            if not line:
                break
            request = json.loads(line)
            for rank in range(request["n_ranks"]):
                child = os.fork()
                if child == 0:
                    end(work(request, rank))
                running[child] = Path(request["folder"], f"status-{rank}")
                write(Path(request["folder"], f"pid-{rank}"), child)
        while running:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            write(running.pop(child), os.waitstatus_to_exitcode(status))
    for child in running:
        os.kill(child, signal.SIGKILL)
    return 0


def work(request: dict, rank: int) -> int:
    """Run one rank of the request; return its exit status."""
    os.environ |= {name: value for name, value in request["env"].items() if value is not None}
    for name in (name for name, value in request["env"].items() if value is None):
        os.environ.pop(name, None)
    if request["n_ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, path in ((1, request["stdout"] or f"out-{rank}"), (2, f"err-{rank}")):
        os.dup2(os.open(Path(request["folder"], path), flags), fd)
    # As in Python itself: standard error is line-buffered, standard output only on a terminal.
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering, closefd=False) for fd, buffering in ((1, -1), (2, 1)))
    module, _, function = request["target"].partition(":")
    sys.argv = [module, *request["arguments"]]
    try:
        if module.endswith(".py"):
            sys.path.insert(0, str(Path(module).parent))
            runpy.run_path(module, run_name="__main__")
            return 0
        return getattr(importlib.import_module(module), function)(request["arguments"])
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def end(status: int) -> NoReturn:
    """End a fork like the interpreter does, but without tearing down every module, which would take 0.3 s."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def write(path: Path, number: int) -> None:
    """Write a number to a file atomically."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(str(number))
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(serve())
