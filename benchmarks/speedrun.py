"""Measure when recipes/speedrun.yaml reaches the final loss of recipes/plain.yaml, on Python's standard library.

    python benchmarks/speedrun.py --plot benchmarks/results/speedrun.png | tee benchmarks/results/speedrun.txt

The runs take turns, so that other load on the machine affects both: the run with the smaller share of its steps done
goes on. A run's clock stops while the other trains and during evaluations. The speedrun has arrived at its first
evaluation that is no worse than plain's final loss.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import against, header
from moe_vs_dense import Side
from training_run import TrainingRun

from training.options import cli

RECIPES = Path(__file__).parent.parent / "recipes"
BAR = 0.4


def side_of(recipe: Path, folder: str) -> Side:
    """Return the recipe's run before its first step."""
    config = cli.load_config(
        recipe, {"out_dir": folder, "data.cache_dir": f"{folder}/cache", "logging.tensorboard": "false"}
    )
    return Side(config.name, TrainingRun(config, torch.device("cpu")))


def draw(sides: list[Side], path: Path) -> None:
    """Draw validation loss by time and by tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_time, by_tokens) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for side in sides:
        steps, seconds, losses = zip(*side.curve, strict=True)
        millions = [step * side.run.config.batch_tokens / 1e6 for step in steps]
        for panel, x in ((by_time, seconds), (by_tokens, millions)):
            panel.plot(x, losses, marker="o", markersize=3, label=f"{side.name}: {side.loss:.3f}")
    for panel, unit in ((by_time, "seconds of training"), (by_tokens, "million tokens")):
        panel.axhline(sides[0].loss, color="grey", linestyle="--", linewidth=1)
        panel.set(xlabel=unit, xlim=(0, None))
        panel.grid(alpha=0.25)
    by_time.set_ylabel("validation loss, nats a token")
    by_time.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, help="folder of plain.yaml and speedrun.yaml (default: recipes)"
    )
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    args = parser.parse_args()
    print(header(torch.device("cpu")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sides = [side_of(args.recipes / f"{name}.yaml", folder) for name in ("plain", "speedrun")]
        while any(side.run.n_steps < side.run.config.steps for side in sides):
            min(sides, key=lambda side: side.run.n_steps / side.run.config.steps).step()
    for side in sides:
        print(f"{side.name:9} {side.run.n_steps:5} steps, {sum(side.step_s):6.1f} s, validation loss {side.loss:.4f}")
    plain, speedrun = sides
    reached = next(((step, seconds) for step, seconds, loss in speedrun.curve if loss <= plain.loss), None)
    if reached is None:
        print("the speedrun does not reach plain's final loss")
    else:
        share = against(reached[1] / sum(plain.step_s), BAR, least=False)
        print(f"plain's final loss is reached at step {reached[0]}, share of its time: {share}")
    if args.plot:
        draw(sides, args.plot)


if __name__ == "__main__":
    main()
