"""What is round a step: the time to the first one, batches, logs and saves. Real runs, of quickstart.

    python benchmarks/around.py | tee benchmarks/results/around.txt

Shares are of the time of all steps, as the run's own timer has them in its rows: `data` is what batches take, `idle`
what logs do (TensorBoard among them), `checkpoint` how long the loop stands still for its saves in the background.
Compiled, the run has 12 equal blocks, and the compiler's cache at first is empty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import against, header

from training.data import prepare
from training.options import cli

HERE = Path(__file__).parent.parent
QUICKSTART = HERE / "configs" / "quickstart.yaml"
BARS = {"data": 0.01, "idle": 0.01, "checkpoint": 0.05}


def command(*arguments: object) -> list[str]:
    """The command, as it is typed."""
    return [sys.executable, "-m", "training.train", *map(str, arguments)]


def seconds_of_help() -> float:
    """From the command to its end."""
    start = time.perf_counter()
    subprocess.run(command("--help"), cwd=HERE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def seconds_to_first_step(options: list[object], **env: str) -> float:
    """From the command to the line that says that the first step is done."""
    start = time.perf_counter()
    words = command(*options, "--logging.every", 1)
    run = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    with run:
        for line in run.stdout:
            if line.startswith("step "):  # the header has a line of "steps"
                found = time.perf_counter() - start
                run.kill()
                return found
    raise SystemExit("the run ended before its first step")


def shares(options: list[object], folder: Path) -> dict[str, float]:
    """Of the steps' time, from the sixth row on: those before have what happens once."""
    subprocess.run(command(*options), cwd=HERE, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][5:]
    steps = sum(row["step_s"] for row in rows)
    return {phase: sum(row[f"time_{phase}"] for row in rows) / steps for phase in BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="the run (default: quickstart)")
    parser.add_argument("--steps", type=int, default=160, help="of the run that is looked at (default %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps from save to save (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of what is short (default %(default)s)")
    parser.add_argument("--uncompiled", action="store_true", help="leave out what compiles")
    asked = parser.parse_args()
    print(header(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        common = ["--config", asked.config.absolute(), "--out_dir", folder, "--data.cache_dir", f"{folder}/cache"]
        config, _ = cli.parse_command_line(list(map(str, common)), prog="around", doc="", flags={})
        prepare(config.data, quiet=True)
        help_s = statistics.median(seconds_of_help() for _ in range(asked.rounds))
        print(f"--help: {against(help_s, 0.5, least=False)} s", flush=True)
        common += ["--resume", "never"]
        first_s = statistics.median(seconds_to_first_step(common) for _ in range(asked.rounds))
        print(f"first step of the cached {config.name}: {against(first_s, 8, least=False)} s", flush=True)
        if not asked.uncompiled:
            compiled = [*common, "--parallel.compile", "true", "--model.n_layer", 12]
            for title in ("12 equal blocks, compiled, first step", "again, from the cache"):
                found = seconds_to_first_step(compiled, TORCHINDUCTOR_CACHE_DIR=f"{folder}/compiled")
                print(f"{title}: {against(found, 40, least=False)} s", flush=True)
        decay_steps = (asked.steps - config.schedule.warmup_steps) // 2
        common += ["--steps", asked.steps, "--schedule.decay_steps", decay_steps, "--eval.every", "null"]
        found = shares([*common, "--checkpoint.every", asked.every], Path(folder) / config.name)
        for phase, share in found.items():
            print(f"{phase:<10} {share:7.3%} of the steps' time; bar {BARS[phase]:.0%}", flush=True)


if __name__ == "__main__":
    main()
