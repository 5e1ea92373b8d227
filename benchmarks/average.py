"""Measure what averaging the weights costs: a step of the quickstart with `optim.average`, and one without.

    python benchmarks/average.py | tee benchmarks/results/average.txt

Both runs are in one process and take turns; a ratio is the median of the ratios within each round.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import against, header, line, ratio, turns
from training_run import TrainingRun

from training.options import cli

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BAR = 1.02
CPU = torch.device("cpu")
SIDES = {"with average": "{decay: 0.999}", "without": "null"}


def main() -> int:
    """Print the seconds of both sides and their ratio; the exit status is 1 if it misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="turns of each side (default %(default)s)")
    args = parser.parse_args()
    print(header(CPU))
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name, average in SIDES.items():
            options = {"out_dir": folder, "name": name.replace(" ", "-"), "optim.average": average}
            config = cli.load_config(CONFIG, options | {"schedule.warmup_steps": "1", "schedule.decay_steps": "1"})
            sides[name] = TrainingRun(config, CPU)
        run = sides["without"]
        print(f"{run.stats.n_parameters:,} parameters, {config.batch_tokens:,} tokens a step, {args.rounds} rounds")
        times = turns({name: side.step for name, side in sides.items()}, args.rounds, CPU, warm=8)
    for name, seconds in times.items():
        print(line(name, seconds, config.batch_tokens))
    cost = ratio(times, *SIDES)
    print(f"    with average / without: {against(cost, BAR, least=False)}")
    return 0 if cost <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
