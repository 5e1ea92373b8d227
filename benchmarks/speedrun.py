"""Measure the share of recipes/plain.yaml's time in which recipes/speedrun.yaml ends as low, on the standard library.

    python benchmarks/speedrun.py --plot benchmarks/results/speedrun.png | tee benchmarks/results/speedrun.txt

The two take turns with each seed (race.py). The bar: a quarter of the time.
"""

import argparse
from pathlib import Path

import torch
from common import header
from race import draw, race, report

from training.options import cli

RECIPES = Path(__file__).parent.parent / "recipes"
BAR = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, help="folder of plain.yaml and speedrun.yaml (default: recipes)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--cache_dir", default="data_cache", help="folder of the token shards (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    args = parser.parse_args()
    print(header(torch.device("cpu")), flush=True)
    options = {"data.cache_dir": args.cache_dir}
    plain, speedrun = (cli.load_config(args.recipes / f"{name}.yaml", options) for name in ("plain", "speedrun"))
    pairs = race((plain, speedrun), args.seeds, torch.device("cpu"))
    report(pairs, None, BAR)
    if args.plot:
        draw(pairs, args.plot)


if __name__ == "__main__":
    main()
