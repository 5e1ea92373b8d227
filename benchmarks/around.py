"""Measure what surrounds a step: time to the first step, batches, logs and saves. Real runs of quickstart.

    python benchmarks/around.py | tee benchmarks/results/around.txt

Shares are of the time of all steps, from the `time_*` metrics of the run: `data` is reading batches, `idle` is logging
(including TensorBoard), `checkpoint` is how long the loop waits for background saves. The compiled run has 12 equal
blocks and starts with an empty compiler cache.
"""

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
    """Return the command line of a training run."""
    return [sys.executable, "-m", "training.train", *map(str, arguments)]


def seconds_of_help() -> float:
    """Return the duration of the command."""
    start = time.perf_counter()
    subprocess.run(command("--help"), cwd=HERE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def seconds_to_first_step(options: list[object], **env: str) -> float:
    """Return the time from the command to the console line of the first step."""
    start = time.perf_counter()
    words = command(*options, "--logging.every", 1)
    run = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    with run:
        for line in run.stdout:
            if line.startswith("step "):  # the header has a line "steps"
                elapsed = time.perf_counter() - start
                run.kill()
                return elapsed
    raise SystemExit("the run ended before its first step")


def shares(options: list[object], folder: Path) -> dict[str, float]:
    """Return each phase's share of the time of all steps, without the first five rows, which include one-time work."""
    subprocess.run(command(*options), cwd=HERE, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][5:]
    steps = sum(row["step_s"] for row in rows)
    return {phase: sum(row[f"time_{phase}"] for row in rows) / steps for phase in BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="the run (default: quickstart)")
    parser.add_argument("--steps", type=int, default=160, help="steps of the measured run (default %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between saves (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of short measurements (default %(default)s)")
    parser.add_argument("--uncompiled", action="store_true", help="skip the compiled runs")
    args = parser.parse_args()
    print(header(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        common = ["--config", args.config.absolute(), "--out_dir", folder, "--data.cache_dir", f"{folder}/cache"]
        config, _ = cli.parse_command_line(list(map(str, common)), prog="around", doc="", flags={})
        prepare(config.data, quiet=True)
        help_s = statistics.median(seconds_of_help() for _ in range(args.rounds))
        print(f"--help: {against(help_s, 0.5, least=False)} s", flush=True)
        common += ["--resume", "never"]
        first_s = statistics.median(seconds_to_first_step(common) for _ in range(args.rounds))
        print(f"first step of the cached {config.name}: {against(first_s, 8, least=False)} s", flush=True)
        if not args.uncompiled:
            compiled = [*common, "--parallel.compile", "true", "--model.n_layer", 12]
            for title in ("12 equal blocks, compiled, first step", "again, from the cache"):
                first_s = seconds_to_first_step(compiled, TORCHINDUCTOR_CACHE_DIR=f"{folder}/compiled")
                print(f"{title}: {against(first_s, 40, least=False)} s", flush=True)
        decay_steps = (args.steps - config.schedule.fitted(args.steps).warmup_steps) // 2
        common += ["--steps", args.steps, "--schedule.decay_steps", decay_steps, "--eval.every", "null"]
        by_phase = shares([*common, "--checkpoint.every", args.every], Path(folder) / config.name)
        for phase, share in by_phase.items():
            print(f"{phase:<10} {share:7.3%} of the steps' time; bar {BARS[phase]:.0%}", flush=True)


if __name__ == "__main__":
    main()
