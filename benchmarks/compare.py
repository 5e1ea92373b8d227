"""Measure what a comparison adds to its steps: ten small runs of the quickstart's model by one command.

    python benchmarks/compare.py | tee benchmarks/results/compare.txt

The figure is the time of the whole command, imports included, over the sum of the times of all steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import against, header

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BAR = 1.5
SEEDS = 5


def main() -> int:
    """Print both times and their ratio; the exit status is 1 if it misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default %(default)s)")
    args = parser.parse_args()
    print(header(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": args.steps, "eval.tokens": 4096, "eval.prompts": "[]", "data.cache_dir": f"{folder}/cache"}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "training.compare", str(CONFIG), "--vary", "optim.learning_rate=3e-3,6e-3"]
        command += ["--seeds", str(SEEDS), "--out", f"{folder}/out", *flags]
        prepare = [sys.executable, "-m", "training.prepare", "--config", str(CONFIG), *flags]
        subprocess.run(prepare, check=True, capture_output=True)
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        elapsed = time.perf_counter() - start
        content = json.loads(Path(folder, "out", "compare.json").read_text())
    steps = sum(run["time_s"] for variant in content["variants"] for run in variant["runs"])
    print(f"{2 * SEEDS} runs: {steps:.1f} s of steps, {elapsed:.1f} s in all")
    print(f"    in all / steps: {against(elapsed / steps, BAR, least=False)}")
    return 0 if elapsed <= BAR * steps else 1


if __name__ == "__main__":
    raise SystemExit(main())
