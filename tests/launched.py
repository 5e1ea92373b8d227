"""Ranks that torchrun starts, each with a log of its own, watched from outside: what the tests of faults share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, environment

TRAIN = ["-m", "training.train"]


class Launched:
    """`torchrun ARGUMENTS` in a process of its own."""

    def __init__(self, logs: Path, *arguments: str, prefix: tuple[str, ...] = (), **variables: str):
        torchrun = [*prefix, sys.executable, "-m", "torch.distributed.run", "--redirects", "3", "--log-dir", str(logs)]
        variables |= {"PYTHONPATH": str(ROOT), "TEST_LAUNCH": str(logs)}
        self.logs = logs
        logs.mkdir(parents=True)
        with (logs / "launcher").open("w") as said:
            self.process = subprocess.Popen(
                [*torchrun, *arguments], cwd=ROOT, env=environment() | variables, stdout=said, stderr=said
            )

    def pids(self) -> dict[int, int]:
        """Each rank's process."""
        return ranks_of(self.logs)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pids()[rank], number)

    def ends(self, within: float) -> float:
        """Wait until the launcher and all ranks have ended; returns the seconds it took."""
        began = time.monotonic()
        while self.process.poll() is None or self.pids():
            assert time.monotonic() - began < within, f"{self.pids()} run after {within} s\n{self.said()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def kill(self) -> None:
        """End what is left, in a `finally`."""
        for pid in [*self.pids().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def said(self) -> str:
        """What the ranks wrote to stderr."""
        return "".join(path.read_text() for path in sorted(self.logs.rglob("stderr.log")))

    def line(self) -> str:
        """The one line that says why the run ended; and no rank said more."""
        said = self.said()
        assert "Traceback" not in said and "frame #" not in said, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        return line


def ranks_of(logs: Path) -> dict[int, int]:
    """The processes that were given a rank and TEST_LAUNCH."""
    mine, found = f"TEST_LAUNCH={logs}", {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_text().split("\0")  # a zombie has none
            if mine in variables:
                found |= {int(v[5:]): int(path.name) for v in variables if v.startswith("RANK=")}
        except OSError:
            continue
    return found


def train(logs: Path, config: Path, ranks: int = 2, **variables: str) -> Launched:
    """The command on one host."""
    where = ["--standalone", "--nproc-per-node", str(ranks)]
    return Launched(logs, *where, *TRAIN, "--config", str(config), **variables)


def rows_in(folder: Path) -> int:
    """Rows of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(folder: Path, at_least: int, *launched: Launched) -> None:
    """Until the run has come so far."""
    for _ in range(3000):
        if rows_in(folder) >= at_least:
            return
        for each in launched:
            assert each.process.poll() is None, each.said() + (each.logs / "launcher").read_text()
        time.sleep(0.02)
    raise AssertionError(f"{at_least} rows never came")
