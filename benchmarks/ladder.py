"""Measure which learning rates are best at several widths: the rule by which recipes/gpt2_124m.yaml has its rates.

    python benchmarks/ladder.py --plot benchmarks/results/ladder.png | tee benchmarks/results/ladder.txt

The recipe's blocks in four layers of heads of 64 channels, on the standard library. At each width Muon's rate varies,
and then the rate of the embeddings. The other one is 0.01. The best rate is the minimum of a parabola through the
lowest loss and its neighbors, over the logarithm of the rate. The rule is the power of the width that fits best, and
gives the rates of the recipe, which is 768 wide.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import header
from training_run import TrainingRun

from training.options import cli

RECIPE = Path(__file__).parent.parent / "recipes" / "gpt2_124m.yaml"
OPTIONS = ("muon_learning_rate", "embedding_learning_rate")
RATES = (0.005, 0.01, 0.02, 0.04)
Curves = dict[str, dict[int, list[float]]]  # losses at each rate, by option and width
SMALL = {
    "model.n_layer": 4,
    "model.n_positions": 128,
    "model.vocab_size": "null",
    "data.sources": "[{type: stdlib}]",
    "data.val_fraction": 0.05,
    "data.tokenizer": "{type: bpe, vocab_size: 4096}",
    "batch_tokens": 2048,
    "precision": "auto",
    "eval.every": "null",
    "eval.tokens": 65536,
    "checkpoint.every": "null",
    "optim.muon_learning_rate": 0.01,
    "optim.embedding_learning_rate": 0.01,
    "optim.learning_rate": 0.003,
    "logging.tensorboard": "false",
}


def loss_of(options: dict[str, object]) -> float:
    """Train the small model with these options; return its validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {name: str(value) for name, value in (SMALL | options | {"out_dir": folder}).items()}
        run = TrainingRun(cli.load_config(RECIPE, texts), torch.device("cpu"))
        for _ in range(run.config.steps):
            run.step()
        return run.validation_loss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default %(default)s)")
    parser.add_argument("--cache_dir", default="data_cache", help="folder of the token shards (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the losses into this PNG")
    args = parser.parse_args()
    print(header(torch.device("cpu")), flush=True)
    curves: Curves = {option: {} for option in OPTIONS}
    for width, option in product(args.widths, OPTIONS):
        shape = shape_of(width) | {"steps": args.steps, "data.cache_dir": args.cache_dir}
        losses = curves[option][width] = [loss_of(shape | {f"optim.{option}": rate}) for rate in RATES]
        line = "  ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(RATES, losses, strict=True))
        lowest = RATES[losses.index(min(losses))]
        print(f"width {width:4}  {option:24} {line}   lowest at {lowest:g}", flush=True)
    for option, by_width in curves.items():
        best = list(map(best_rate, by_width.values()))
        power, log_factor = np.polyfit(np.log(list(by_width)), np.log(best), 1)
        rates = ", ".join(f"{width}: {rate:.4f}" for width, rate in zip(by_width, best, strict=True))
        at_768 = np.exp(log_factor) * 768**power
        print(f"{option}: best {rates}; as width to the power of {power:.2f}, {at_768:.4f} at 768")
    if args.plot:
        draw(curves, args.plot)


def shape_of(width: int) -> dict[str, object]:
    """Return the options of the recipe's model at another width."""
    mlp = f"{{type: mlp, hidden: {width * 8 // 3 // 16 * 16}, activation: silu, gated: true}}"
    blocks = f"[{{mixer: {{type: attention, qk_norm: true}}, ffn: {mlp}}}]"
    return {"model.n_embd": width, "model.n_head": max(1, width // 64), "model.blocks": blocks}


def best_rate(losses: list[float]) -> float:
    """Return the rate at the minimum of a parabola, or the one with the lowest loss if the three have no minimum."""
    lowest = losses.index(min(losses))
    middle = min(max(lowest, 1), len(RATES) - 2)
    around = slice(middle - 1, middle + 2)
    square, linear, _ = np.polyfit(np.log(RATES[around]), losses[around], 2)
    return float(np.exp(-linear / (2 * square))) if square > 0 else RATES[lowest]


def draw(curves: Curves, path: Path) -> None:
    """Draw the loss over its lowest, by rate, with a line for each width."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for panel, (option, by_width) in zip(panels, curves.items(), strict=True):
        for shade, (width, losses) in enumerate(by_width.items(), start=1):
            over_lowest = [loss - min(losses) for loss in losses]
            color = f"{0.8 * (1 - shade / len(by_width)):.2f}"  # darker with the width
            panel.plot(RATES, over_lowest, marker="o", color=color, label=f"width {width}")
        panel.set(xscale="log", xlabel=option)
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss over the lowest of the width")
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
