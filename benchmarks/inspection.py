"""Measure what the figures by layer cost: a step of the quickstart that computes them, and one that does not.

    python benchmarks/inspection.py | tee benchmarks/results/inspection.txt

Both runs are in one process and take turns; a ratio is the median of the ratios within each round. A run computes the
figures in one of `logging.histogram_every` steps, by default 100.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import against, header, line, ratio, turns
from training_run import TrainingRun

from training.config import LoggingConfig
from training.options import cli

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BAR = 0.01  # of the time of a run
CPU = torch.device("cpu")
SIDES = {"with figures": 1, "without": 10**9}  # logging.histogram_every


def main() -> int:
    """Print the seconds of both sides and the share of a run's time; the exit status is 1 if it misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="turns of each side (default %(default)s)")
    args = parser.parse_args()
    every = LoggingConfig.model_fields["histogram_every"].default
    print(header(CPU))
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name, interval in SIDES.items():
            options = {"out_dir": folder, "name": name.replace(" ", "-"), "logging.histogram_every": str(interval)}
            config = cli.load_config(CONFIG, options)
            sides[name] = TrainingRun(config, CPU)
        run = sides["without"]
        print(f"{run.stats.n_parameters:,} parameters, {config.batch_tokens:,} tokens a step, {args.rounds} rounds")
        times = turns({name: side.step for name, side in sides.items()}, args.rounds, CPU, warm=8)
    for name, seconds in times.items():
        print(line(name, seconds, config.batch_tokens))
    cost = (ratio(times, *SIDES) - 1) / every
    print(f"    share of a run's time, in one of {every} steps: {against(cost, BAR, least=False)}")
    return 0 if cost <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
