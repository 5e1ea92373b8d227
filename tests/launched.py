"""Start the ranks of a run, by torchrun or as forks of a warm server, and watch them from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, environment
from warm import Launch

TRAIN = ["-m", "training.train"]


class TorchrunRanks:
    """`torchrun ARGUMENTS` in a process of its own."""

    def __init__(self, logs: Path, *arguments: str, prefix: tuple[str, ...] = (), **variables: str):
        torchrun = [*prefix, sys.executable, "-m", "torch.distributed.run", "--redirects", "3", "--log-dir", str(logs)]
        variables |= {"PYTHONPATH": str(ROOT), "TEST_LAUNCH": str(logs)}
        self.logs = logs
        logs.mkdir(parents=True)
        with (logs / "launcher").open("w") as log:
            self.process = subprocess.Popen(
                [*torchrun, *arguments], cwd=ROOT, env=environment() | variables, stdout=log, stderr=log
            )

    def pids(self) -> dict[int, int]:
        """Return the process ID of each running rank."""
        return ranks_of(self.logs)

    def running(self) -> bool:
        """Return True while the launcher or a rank runs."""
        return self.process.poll() is None or bool(self.pids())

    def kill(self) -> None:
        """Kill all remaining processes; for a `finally`."""
        for pid in [*self.pids().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def errors(self) -> str:
        """Return the ranks' stderr, concatenated."""
        return "".join(path.read_text() for path in sorted(self.logs.rglob("stderr.log")))

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids()[rank], number)

    def ends(self, within: float) -> float:
        """Wait until the launcher and all ranks have ended; returns the seconds it took."""
        began = time.monotonic()
        while self.running():
            assert time.monotonic() - began < within, f"{self.pids()} run after {within} s\n{self.errors()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def line(self) -> str:
        """Return the run's only error line; fails if there are more, or a traceback."""
        errors = self.errors()
        assert "Traceback" not in errors and "frame #" not in errors, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        return line


class ForkedRanks(TorchrunRanks):
    """The command on the ranks of one host, as forks of the warm server."""

    def __init__(self, launch: Launch):
        self.launch = launch

    def pids(self) -> dict[int, int]:
        return {rank: pid for rank, pid in enumerate(self.launch.pids) if not self.launch.has_ended(rank)}

    def running(self) -> bool:
        return bool(self.pids())

    def kill(self) -> None:
        self.launch.kill()

    def others_end(self, rank: int, within: float) -> None:
        """Wait until all ranks but this one have ended."""
        until = time.monotonic() + within
        while self.pids().keys() - {rank}:
            assert time.monotonic() < until, f"{self.pids()} run after {within} s\n{self.errors()}"
            time.sleep(0.05)

    def errors(self) -> str:
        return self.launch.output("err")


def ranks_of(logs: Path) -> dict[int, int]:
    """Return the process ID of each rank, by RANK and this TEST_LAUNCH in its environment."""
    mine, ranks = f"TEST_LAUNCH={logs}", {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_text().split("\0")  # a zombie has none
            if mine in variables:
                ranks |= {int(v[5:]): int(path.name) for v in variables if v.startswith("RANK=")}
        except OSError:
            continue
    return ranks


def train(logs: Path, config: Path, ranks: int = 2, **variables: str) -> TorchrunRanks:
    """Start the command on one host by torchrun."""
    where = ["--standalone", "--nproc-per-node", str(ranks)]
    return TorchrunRanks(logs, *where, *TRAIN, "--config", str(config), **variables)


def rows_in(folder: Path) -> int:
    """Count the rows of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(folder: Path, at_least: int, *launched: TorchrunRanks) -> None:
    """Wait until the run has written this many rows."""
    for _ in range(3000):
        if rows_in(folder) >= at_least:
            return
        for each in launched:
            assert each.running(), each.errors()
        time.sleep(0.02)
    raise AssertionError(f"{at_least} rows never came")
