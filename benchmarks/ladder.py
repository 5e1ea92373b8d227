"""Measure which learning rates are best at several widths: the rule by which recipes/gpt2_124m.yaml has its rates.

    python benchmarks/ladder.py --plot benchmarks/results/ladder.png | tee benchmarks/results/ladder.txt

The recipe's blocks in four layers of heads of 64 channels, on the standard library. At each width Muon's rate varies,
and then the rate of the embeddings. The other one is 0.01. The best rate is the minimum of a parabola through the
lowest loss and its neighbors, over the logarithm of the rate. The rule is the power of the width that fits best, and
gives the rates of the recipe, which is 768 wide.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import header
from training_run import TrainingRun

from training.options import cli

RECIPE = Path(__file__).parent.parent / "recipes" / "gpt2_124m.yaml"
RATES = {
    "optim.muon_learning_rate": (0.005, 0.01, 0.02, 0.04),
    "optim.embedding_learning_rate": (0.005, 0.01, 0.02, 0.04),
}
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
    losses: dict[str, dict[int, list[float]]] = {option: {} for option in RATES}
    for width in args.widths:
        shape = {"model.n_embd": width, "model.n_head": max(1, width // 64), "data.cache_dir": args.cache_dir}
        hidden = f"{{type: mlp, hidden: {width * 8 // 3 // 16 * 16}, activation: silu, gated: true}}"
        shape["model.blocks"] = f"[{{mixer: {{type: attention, qk_norm: true}}, ffn: {hidden}}}]"
        for option, rates in RATES.items():
            found = [loss_of(shape | {"steps": args.steps, option: rate}) for rate in rates]
            losses[option][width] = found
            best = rates[found.index(min(found))]
            line = "  ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(rates, found, strict=True))
            print(f"width {width:4}  {option.removeprefix('optim.'):24} {line}   lowest at {best:g}", flush=True)
    for option, of_width in losses.items():
        best = [best_rate(RATES[option], found) for found in of_width.values()]
        power, log_factor = np.polyfit(np.log(list(of_width)), np.log(best), 1)
        rates = ", ".join(f"{width}: {rate:.4f}" for width, rate in zip(of_width, best, strict=True))
        name, at_768 = option.removeprefix("optim."), np.exp(log_factor) * 768**power
        print(f"{name}: best {rates}; as width to the power of {power:.2f}, {at_768:.4f} at 768")
    if args.plot:
        draw(losses, args.plot)


def best_rate(rates: tuple[float, ...], losses: list[float]) -> float:
    """Return the rate at the minimum of a parabola, or the one with the lowest loss if the three have no minimum."""
    lowest = losses.index(min(losses))
    middle = min(max(lowest, 1), len(rates) - 2)
    around = slice(middle - 1, middle + 2)
    square, linear, _ = np.polyfit(np.log(rates[around]), losses[around], 2)
    return float(np.exp(-linear / (2 * square))) if square > 0 else rates[lowest]


def draw(losses: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Draw the loss over its lowest, by rate, with a line for each width."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for panel, (option, of_width) in zip(panels, losses.items(), strict=True):
        for shade, (width, found) in enumerate(of_width.items(), start=1):
            over = [loss - min(found) for loss in found]
            color = f"{0.8 * (1 - shade / len(of_width)):.2f}"  # darker with the width
            panel.plot(RATES[option], over, marker="o", color=color, label=f"width {width}")
        panel.set(xscale="log", xlabel=option.removeprefix("optim."))
        panel.set_xticks(RATES[option], [f"{rate:g}" for rate in RATES[option]], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss over the lowest of the width")
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
