"""Kill a run at an operation on files, let it go on, and compare it with the run that was never killed.

    python tests/crashes.py FOLDER CONFIG.yaml [--few] [--torn] [--chains N]

A warm process forks one for every trial, so that a trial costs no imports. In it, opening, writing, syncing, renaming,
removing and making folders are counted, and at the k-th the process kills itself (--torn: after half of a write). The
next process, unharmed, goes on. Prints JSON: the operations of a run, and what went wrong by k. Of the writes to a file
one after the other, --few takes the first and the last, and away from the second save every seventh operation.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from conftest import TIME_FIELDS

from training.config import Config
from training.options import cli

OPERATIONS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")  # of os


class Operations:
    """Counts what is done to files, of all threads."""

    def __init__(self, kill_at: int | None, torn: bool = False):
        self.kill_at, self.torn, self.count = kill_at, torn, itertools.count(1)
        self.names: list[tuple[str, str]] = []
        self.opened = io.open
        for name in OPERATIONS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        io.open = builtins.open = self.open

    def due(self, name: str, path: object) -> bool:
        """Count one; whether it is the one to be killed at."""
        self.names.append((name, str(path)))
        return next(self.count) == self.kill_at

    def counted(self, name: str, does: Callable) -> Callable:
        def operation(*arguments: Any, **named: Any) -> Any:
            path = arguments[0]
            if isinstance(path, int) and name == "fsync":
                path = Path(f"/proc/self/fd/{path}").readlink()
            if self.due(name, path):
                os.kill(os.getpid(), signal.SIGKILL)
            return does(*arguments, **named)

        return operation

    def open(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if writes and self.due("open", file):
            os.kill(os.getpid(), signal.SIGKILL)
        opened = self.opened(file, mode, *arguments, **named)
        return Written(opened, self) if writes else opened


class Written:
    """A file whose writes are counted."""

    def __init__(self, file: Any, operations: Operations):
        self.file, self.operations = file, operations

    def write(self, data: Any) -> int:
        if self.operations.due("write", self.file.name):
            if self.operations.torn:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Written:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self.file)


def forked(work: Callable[[], int]) -> int:
    """The exit status of a process that does it, negative for a signal; it says nothing but what is wrong."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(config: Config, kill_at: int | None = None, torn: bool = False, told: Path | None = None) -> int:
    """Train in this process, which is a trial's own; `told` is where the operations are written to."""
    from training.train import train as go

    operations = Operations(kill_at, torn)
    status = go(config)
    if told is not None:
        told.write_text(json.dumps([operations.names, sorted(sys.modules)]))
    return status


def digest(config: Config) -> dict[str, str]:
    """What a run has come to, without times: bits of its last checkpoint and its model, its state and its rows."""
    folder = Path(config.out_dir, config.name)
    last = max((folder / "checkpoints").glob("step-*"))
    state = json.loads((last / "state.json").read_text())
    kept = {key: value for key, value in state.items() if key not in ("time_s", "ledger", "last_row")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept |= {"rows": [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in rows]}
    kept["config"] = {key: value for key, value in kept["config"].items() if key != "name"}
    found = {"state and rows": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(), "last": last.name}
    for path in [*last.glob("*.safetensors"), *(folder / "model").glob("*.safetensors")]:
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    if config.logging.tensorboard:
        found["tensorboard"] = shown(folder / "tensorboard")
    return found


def shown(folder: Path) -> str:
    """The losses that TensorBoard shows of all that was written, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder)).Reload()
    return json.dumps([(event.step, event.value) for event in seen.Scalars("train/loss")])


def leftovers(config: Config) -> list[str]:
    """What a killed process may have left, that nothing needs."""
    folder = Path(config.out_dir, config.name)
    most = config.checkpoint.keep + config.checkpoint.keep_best + 1
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    extra = [] if len(checkpoints) <= most else [f"{len(checkpoints)} checkpoints"]
    return extra + [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")]


def lacking(config: Config, operations: list[list[str]], told: Path) -> list[str]:
    """Operations of the reference that another run did not do."""
    done, _ = json.loads(told.read_text())
    named = Counter((name, path.replace(f"/{config.name}", "/reference")) for name, path in done)
    return [f"{name} {path}" for name, path in (Counter(map(tuple, operations)) - named).elements()]


def trial(
    config: Config, expected: dict[str, str], operations: list[list[str]], kills: list[int], torn: bool
) -> str | None:
    """Kill at those operations, each counted from a start of its own, then go on; what is wrong.

    Threads take turns, so the k-th operation is not always the same one; how many there are is, and where it is not
    the difference is told.
    """
    told = Path(config.out_dir, "trial.json")
    shutil.rmtree(Path(config.out_dir, config.name), ignore_errors=True)
    for k in kills:
        status = forked(lambda k=k: train(config, k, torn, told))
        if status == 0 and kills == [k]:
            return f"not killed at operation {k}; did not {lacking(config, operations, told)}"
        if status != -signal.SIGKILL:
            return f"ended with {status} before operation {k}"
    if status := forked(lambda: train(config)):
        return f"went on, and ended with {status}"
    if wrong := leftovers(config):
        return f"left {wrong}"
    found = digest(config)
    return None if found == expected else f"differs in {sorted(k for k in expected if found.get(k) != expected[k])}"


def main(arguments: list[str]) -> int:
    """The reference, then the trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--torn", action="store_true")
    parser.add_argument("--chains", type=int, default=0, help="so many runs of 20 kills each, at random")
    asked = parser.parse_args(arguments)

    import torch

    from training.data import prepare
    from training.logging import report

    torch.set_num_threads(1)
    report._template()
    config = cli.load_config(asked.config).model_copy(update={"out_dir": str(asked.folder / "runs")})
    prepare(config.data, quiet=True)
    reference = config.model_copy(update={"name": "reference"})
    told = asked.folder / "operations.json"
    Path(config.out_dir).mkdir()  # as every trial finds it, so that all do as many operations
    began = time.perf_counter()
    assert forked(lambda: train(reference, told=told)) == 0
    alone_s = time.perf_counter() - began
    (operations, modules), expected = json.loads(told.read_text()), digest(reference)
    for module in modules:  # that a trial would import; computing something here would start threads
        with suppress(ImportError):
            importlib.import_module(module)
    named = config.model_copy(update={"name": "trial"})
    trials = [[k] for k in points(operations, few=asked.few, torn=asked.torn)]
    if asked.chains:
        draw = random.Random(0)
        furthest = len(operations) // 20  # so that twenty do not reach the end
        trials = [[draw.randrange(1, furthest) for _ in range(20)] for _ in range(asked.chains)]
    wrong = {str(kills): found for kills in trials if (found := trial(named, expected, operations, kills, asked.torn))}
    rows = (asked.folder / "runs/reference/metrics.jsonl").read_text().splitlines()
    found = {"operations": operations, "trials": len(trials), "wrong": wrong, "run_s": alone_s}
    print(json.dumps(found | {"skipped": json.loads(rows[-1])["skipped_steps"]}))
    return 0


def points(operations: list[tuple[str, str]], *, few: bool, torn: bool) -> list[int]:
    """Where to kill, counted from 1; torn: at writes alone."""
    names = [tuple(operation) for operation in operations]
    ks = [k for k, (name, _) in enumerate(names, start=1) if name == "write" or not torn]
    if not few:
        return ks
    alike = {k for k in ks if 1 < k < len(names) and names[k - 2] == names[k - 1] == names[k]}
    saves = [k for k, (name, path) in enumerate(names, start=1) if name == "mkdir" and "step-" in path]
    return [k for i, k in enumerate(ks) if k not in alike and (saves[1] <= k < saves[2] or i % 7 == 0)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
