"""Measure how the rounding of sums grows in training: two runs that differ only in their micro-batch.

    python benchmarks/rounding.py | tee benchmarks/results/rounding.txt      about 20 minutes on one core

One run takes the samples of a step one by one, the other all at once: the same sums in another order. For each
optimizer and text, a table has the relative difference of loss, gradient norm and weights (as one vector) by step, in
float32. The last line compares the validation losses at the end with the spread over seeds. In the text of one letter,
attention has no effect: the true gradient of its queries and keys is zero, and rounding is all there is.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import header
from training_run import TrainingRun

from training.config import Config
from training.engine import train_step
from training.options import cli

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
AT = (1, 2, 3, 4, 10, 30, 100, 200, 400)
N_SAMPLES = 16  # of a step
SMALL = {
    "model.n_layer": "2", "model.n_embd": "64", "model.n_positions": "64", "batch_tokens": str(64 * N_SAMPLES),
    "data.tokenizer.vocab_size": "512", "precision": "fp32", "parallel.device": "cpu",
    "schedule": "{type: cosine, warmup_steps: 10}",
    "logging.every": "1000000", "eval.tokens": "20000", "logging.tensorboard": "false", "eval.prompts": "[]",
}  # fmt: skip
OPTIMIZERS = {
    "AdamW": "{type: adamw, learning_rate: 3e-3, weight_decay: 0.0}",
    "Lion": "{type: lion, learning_rate: 3e-4, weight_decay: 0.0}",
    "Muon": "{type: muon, muon_learning_rate: 0.02, learning_rate: 3e-3, weight_decay: 0.0}",
}
Figures = dict[int, tuple[float, float, torch.Tensor]]  # by step: loss, gradient norm, all weights


def train(config: Config) -> tuple[Figures, float]:
    """Train a run to its end; return its figures at the steps of AT, and its validation loss."""
    run = TrainingRun(config, torch.device("cpu"))
    figures = {}
    for number in range(1, config.steps + 1):
        metrics, n_targets = train_step(run.setup, run.phase)
        if number in AT:
            weights = torch.cat([p.detach().flatten() for p in run.setup.model.model.parameters()]).double()
            figures[number] = metrics["loss_sum"].item() / n_targets, metrics["grad_norm"].item(), weights
    return figures, run.validation_loss()


def main() -> None:
    """Print a table for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(header(torch.device("cpu")))
    print(
        f"2 layers of width 64 with 8 experts, {N_SAMPLES} samples of 64 tokens a step: micro-batch 1 and {N_SAMPLES}"
    )
    with TemporaryDirectory() as folder:
        letter = Path(folder, "letter.txt")
        letter.write_text(("a" * 4000 + "\n\n") * 200)
        for text in ("{type: stdlib}", f"{{paths: [{letter}]}}"):
            for name in args.optimizers:
                compare(f"{name}, {text}", args, folder, {"data.sources": f"[{text}]", "optim": OPTIMIZERS[name]})


def compare(title: str, args: argparse.Namespace, folder: str, own: dict[str, str]) -> None:
    """Print a table of two runs with the options `own`."""
    options = SMALL | own | {"steps": str(args.steps), "out_dir": folder}
    seeds = [
        [train(cli.load_config(CONFIG, options | {"seed": str(seed), "micro_batch": size})) for size in ("1", "auto")]
        for seed in range(args.seeds)
    ]
    print(f"{title}: largest difference over {args.seeds} seeds")
    print(f"{'step':>8} {'loss':>10} {'grad norm':>10} {'weights':>10}")
    for step in seeds[0][0][0]:
        pairs = [(one[step], all_[step]) for (one, _), (all_, _) in seeds]
        loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in pairs) for i in (0, 1))
        weights = max(float((a[2] - b[2]).norm() / b[2].norm()) for a, b in pairs)
        print(f"{step:>8} {loss:>10.1e} {norm:>10.1e} {weights:>10.1e}", flush=True)
    ends = [(one, all_) for (_, one), (_, all_) in seeds]
    apart = max(abs(one - all_) for one, all_ in ends)
    spread = statistics.stdev(all_ for _, all_ in ends)
    print(
        f"validation loss {ends[0][1]:.4f}: apart by at most {apart:.5f}; standard deviation over seeds {spread:.5f}\n"
    )


if __name__ == "__main__":
    main()
