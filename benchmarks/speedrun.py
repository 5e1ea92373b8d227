"""How soon recipes/speedrun.yaml is where recipes/plain.yaml ends: two real runs on the standard library.

    python benchmarks/speedrun.py --plot benchmarks/results/speedrun.png | tee benchmarks/results/speedrun.txt

Time is that of the steps, by the run's own clock: evaluations and start-up are the same in both and left out. The
second run is as long as it is because its learning rate ends with it; it counts where it is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import against, header

HERE = Path(__file__).parent.parent
BAR = 0.4
NAMES = ("plain", "speedrun")


def rows_of(recipe: Path, folder: Path) -> list[dict]:
    """The rows with an evaluation of the run."""
    command = [sys.executable, "-m", "training.train", "--config", str(recipe), "--out_dir", str(folder)]
    command += ["--data.cache_dir", str(folder / "cache")]
    name = recipe.stem
    with (folder / f"{name}.txt").open("w") as said:
        done = subprocess.run(command, cwd=HERE, stdout=said, stderr=said)
    if done.returncode:
        raise SystemExit((folder / f"{name}.txt").read_text())
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "val_loss" in row]


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Validation loss by time and by tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axes, field, scale, name in zip(
        panels, ("time_s", "tokens"), (1, 1e6), ("seconds", "million tokens"), strict=True
    ):
        for run, rows in runs.items():
            losses = [row["val_loss"] for row in rows]
            axes.plot([row[field] / scale for row in rows], losses, marker="o", markersize=3, label=run)
        axes.axhline(runs["plain"][-1]["val_loss"], color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel=name, ylabel="validation loss (nats a token)" if field == "time_s" else None, xlim=(0, None))
        axes.legend()
    figure.suptitle("Python's standard library, the same model size")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    parser.add_argument("--recipes", type=Path, default=HERE / "recipes", help="folder of the two (default: recipes)")
    asked = parser.parse_args()
    print(header(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: rows_of(asked.recipes.absolute() / f"{name}.yaml", Path(folder)) for name in NAMES}
    for name, rows in runs.items():
        last = rows[-1]
        print(f"    {name:<9} {last['step']:5} steps  {last['time_s']:6.1f} s  validation loss {last['val_loss']:.4f}")
    (*_, plain), speedrun = runs["plain"], runs["speedrun"]
    reached = next((row for row in speedrun if row["val_loss"] <= plain["val_loss"]), None)
    if reached is None:
        print("    the speedrun does not get there")
    else:
        share = against(reached["time_s"] / plain["time_s"], BAR, least=False)
        print(f"    plain's final loss is reached at step {reached['step']}, in so much of its time: {share}")
    if asked.plot:
        draw(runs, asked.plot)


if __name__ == "__main__":
    main()
