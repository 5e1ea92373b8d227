"""Kill a run at a file operation, resume it, and compare it with the run that was never killed.

    main([FOLDER, CONFIG.yaml, "--few", "--torn", "--chains", "N"])     in a process of its own (`warm.py`)

Every trial is a fork, which saves the imports. The fork counts its file operations (open, write, fsync, rename,
remove, mkdir) and kills itself at the k-th (--torn: after half of a write). The next fork resumes and is not killed.
Prints JSON: the operations of a run, and the errors by k. --few kills only at the first and the last of consecutive
writes to a file, and at every tenth operation outside the second save.
"""

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
    """Counts the file operations of all threads."""

    def __init__(self, kill_at: int | None, torn: bool = False):
        self.kill_at, self.torn, self.count = kill_at, torn, itertools.count(1)
        self.names: list[tuple[str, str]] = []
        self.opened = io.open
        for name in OPERATIONS:
            setattr(os, name, self.count_calls(name, getattr(os, name)))
        io.open = builtins.open = self.open

    def due(self, name: str, path: object) -> bool:
        """Count an operation; returns True if the process must die at it."""
        self.names.append((name, str(path)))
        return next(self.count) == self.kill_at

    def count_calls(self, name: str, does: Callable) -> Callable:
        def operation(*arguments: Any, **options: Any) -> Any:
            path = arguments[0]
            if isinstance(path, int) and name == "fsync":
                path = Path(f"/proc/self/fd/{path}").readlink()
            if self.due(name, path):
                os.kill(os.getpid(), signal.SIGKILL)
            return does(*arguments, **options)

        return operation

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if writes and self.due("open", file):
            os.kill(os.getpid(), signal.SIGKILL)
        opened = self.opened(file, mode, *arguments, **options)
        return CountedFile(opened, self) if writes else opened


class CountedFile:
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

    def __enter__(self) -> "CountedFile":
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self.file)


def run_in_fork(work: Callable[[], int]) -> int:
    """Call `work` in a fork, which prints only errors; returns its exit status, negative for a signal."""
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


def train(config: Config, kill_at: int | None = None, torn: bool = False, report: Path | None = None) -> int:
    """Train in this process, a fork; write the operations and the imported modules to `report`."""
    from training.train import train as go

    operations = Operations(kill_at, torn)
    status = go(config)
    if report is not None:
        report.write_text(json.dumps([operations.names, sorted(sys.modules)]))
    return status


def digest(config: Config) -> dict[str, str]:
    """Hash the result of a run, without times: last checkpoint, exported model, state, rows."""
    folder = Path(config.out_dir, config.name)
    last = max((folder / "checkpoints").glob("step-*"))
    state = json.loads((last / "state.json").read_text())
    content = {key: value for key, value in state.items() if key not in ("time_s", "ledger", "last_row")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    content |= {"rows": [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in rows]}
    content["config"] = {key: value for key, value in content["config"].items() if key != "name"}
    hashes = {"state and rows": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
    hashes["last"] = last.name
    for path in [*last.glob("*.safetensors"), *(folder / "model").glob("*.safetensors")]:
        hashes[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    if config.logging.tensorboard:
        hashes["tensorboard"] = tensorboard_losses(folder / "tensorboard")
    return hashes


def tensorboard_losses(folder: Path) -> str:
    """Return the losses that TensorBoard shows, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder)).Reload()
    return json.dumps([(event.step, event.value) for event in seen.Scalars("train/loss")])


def leftovers(config: Config) -> list[str]:
    """List the files of a killed process that should have been removed."""
    folder = Path(config.out_dir, config.name)
    most = config.checkpoint.keep + config.checkpoint.keep_best + 1
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    extra = [] if len(checkpoints) <= most else [f"{len(checkpoints)} checkpoints"]
    return extra + [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")]


def missing(config: Config, operations: list[list[str]], report: Path) -> list[str]:
    """List the operations of the reference run that another run lacks."""
    done, _ = json.loads(report.read_text())
    named = Counter((name, path.replace(f"/{config.name}", "/reference")) for name, path in done)
    return [f"{name} {path}" for name, path in (Counter(map(tuple, operations)) - named).elements()]


def trial(
    config: Config, expected: dict[str, str], operations: list[list[str]], kills: list[int], torn: bool
) -> str | None:
    """Kill a run at these operations, each counted from its own start, then resume it; returns an error or None.

    Two threads interleave, so the k-th operation varies; the number of operations does not.
    """
    report = Path(config.out_dir, "trial.json")
    shutil.rmtree(Path(config.out_dir, config.name), ignore_errors=True)
    for k in kills:
        status = run_in_fork(lambda k=k: train(config, k, torn, report))
        if status == 0 and kills == [k]:
            return f"not killed at operation {k}; did not {missing(config, operations, report)}"
        if status != -signal.SIGKILL:
            return f"ended with {status} before operation {k}"
    if status := run_in_fork(lambda: train(config)):
        return f"resumed, and ended with {status}"
    if wrong := leftovers(config):
        return f"left {wrong}"
    hashes = digest(config)
    return None if hashes == expected else f"differs in {sorted(k for k in expected if hashes.get(k) != expected[k])}"


def main(arguments: list[str]) -> int:
    """Train the reference, then run the trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--torn", action="store_true")
    parser.add_argument("--chains", type=int, default=0, help="number of runs with 20 kills each, at random operations")
    args = parser.parse_args(arguments)

    import torch

    from training.data import prepare
    from training.logging import template

    torch.set_num_threads(1)
    template.environment(template.HERE).get_template("report.html.j2")  # compiled once, for all trials
    config = cli.load_config(args.config).model_copy(update={"out_dir": str(args.folder / "runs")})
    prepare(config.data, quiet=True)
    reference = config.model_copy(update={"name": "reference"})
    report = args.folder / "operations.json"
    Path(config.out_dir).mkdir()  # exists in every trial, so that each has the same number of operations
    began = time.perf_counter()
    assert run_in_fork(lambda: train(reference, report=report)) == 0
    alone_s = time.perf_counter() - began
    (operations, modules), expected = json.loads(report.read_text()), digest(reference)
    for module in modules:  # so that no trial imports them; a computation here would start threads
        with suppress(ImportError):
            importlib.import_module(module)
    named = config.model_copy(update={"name": "trial"})
    trials = [[k] for k in points(operations, few=args.few, torn=args.torn)]
    if args.chains:
        draw = random.Random(0)
        furthest = len(operations) // 20  # so that twenty kills do not reach the end
        trials = [[draw.randrange(1, furthest) for _ in range(20)] for _ in range(args.chains)]
    wrong = {str(kills): error for kills in trials if (error := trial(named, expected, operations, kills, args.torn))}
    rows = (args.folder / "runs/reference/metrics.jsonl").read_text().splitlines()
    result = {"operations": operations, "trials": len(trials), "wrong": wrong, "run_s": alone_s}
    print(json.dumps(result | {"skipped": json.loads(rows[-1])["skipped_steps"]}))
    return 0


def points(operations: list[tuple[str, str]], *, few: bool, torn: bool) -> list[int]:
    """Return the numbers of the operations to kill at, from 1; `torn`: only writes."""
    names = [tuple(operation) for operation in operations]
    ks = [k for k, (name, _) in enumerate(names, start=1) if name == "write" or not torn]
    if not few:
        return ks
    alike = {k for k in ks if 1 < k < len(names) and names[k - 2] == names[k - 1] == names[k]}
    saves = [k for k, (name, path) in enumerate(names, start=1) if name == "mkdir" and "step-" in path]
    return [k for i, k in enumerate(ks) if k not in alike and (saves[1] <= k < saves[2] or i % 10 == 0)]
