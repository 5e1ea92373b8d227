"""How soon recipes/speedrun.yaml is where recipes/plain.yaml ends, on the standard library.

    python benchmarks/speedrun.py --plot benchmarks/results/speedrun.png | tee benchmarks/results/speedrun.txt

Both runs take turns, whichever has done less of its steps, so that what else the machine does is shared out. A run's
clock stands still while the other trains or any is evaluated. The second is as long as it is because its learning rate
ends with it; it counts where it is evaluated to be done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from common import against, header
from moe_vs_dense import Side

from training.data import prepare
from training.distributed.world import World
from training.engine.build import begin
from training.options import cli

RECIPES = Path(__file__).parent.parent / "recipes"
BAR = 0.4


def side_of(recipe: Path, folder: str) -> Side:
    """The recipe's run, at its beginning."""
    config = cli.load_config(
        recipe, {"out_dir": folder, "data.cache_dir": f"{folder}/cache", "logging.tensorboard": "false"}
    )
    with redirect_stdout(sys.stderr):
        run = begin(config, prepare(config.data, quiet=True), World(0, 1, torch.device("cpu")), "never")
        run.close()
    return Side(config.name, run)


def draw(sides: list[Side], path: Path) -> None:
    """Validation loss by time and by tokens."""
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
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of the two (default: recipes)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    asked = parser.parse_args()
    print(header(torch.device("cpu")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sides = [side_of(asked.recipes / f"{name}.yaml", folder) for name in ("plain", "speedrun")]
        while any(side.run.step < side.run.config.steps for side in sides):
            min(sides, key=lambda side: side.run.step / side.run.config.steps).step()
    for side in sides:
        print(f"{side.name:9} {side.run.step:5} steps, {sum(side.step_s):6.1f} s, validation loss {side.loss:.4f}")
    plain, speedrun = sides
    reached = next(((step, seconds) for step, seconds, loss in speedrun.curve if loss <= plain.loss), None)
    if reached is None:
        print("the speedrun does not get there")
    else:
        share = against(reached[1] / sum(plain.step_s), BAR, least=False)
        print(f"plain's final loss is reached at step {reached[0]}, in so much of its time: {share}")
    if asked.plot:
        draw(sides, asked.plot)


if __name__ == "__main__":
    main()
