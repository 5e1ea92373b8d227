"""Judge a trained model: its loss on the run's validation set, or on other text.

python -m training.evaluate --run runs/quickstart
python -m training.evaluate --run runs/quickstart --data book.txt notes/
"""

from __future__ import annotations

import argparse
import sys

from training.errors import UserError
from training.options.cli import Parser


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files, folders or globs; default: the run's own")
    parser.add_argument("--text_column", default="text", help="column of .jsonl and .parquet (default %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples at a time (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    found = parser.parse_args(argv)
    if found.micro_batch < 1:
        parser.error(f"--micro_batch: {found.micro_batch} is less than 1")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command: one line of figures on standard output. Exit status 0, or 2 for wrong input."""
    try:
        asked = arguments(argv)
        print(evaluated(asked))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluated(asked: argparse.Namespace) -> str:
    """The figures in a line: over all of the text, whatever `eval.tokens` says."""
    from training.data import prepare
    from training.data.in_memory import read_split
    from training.data.loader import Samples
    from training.distributed.world import World
    from training.engine import load_run as trained
    from training.engine.step import evaluate

    model, (config, _, tokenizer, step, data) = trained.load(asked.run, asked.device)
    if asked.data:
        split = read_split(asked.data, asked.text_column, tokenizer)
    else:
        dataset = prepare(config.data, quiet=True)
        if dataset.fingerprint != data:
            raise UserError(f"--run {asked.run}: its text has changed since; name text to judge it on with --data")
        split = dataset.val
    batches = Samples(split, n_positions=config.model.n_positions, seed=None)
    world = World(0, 1, model.wte.weight.device)
    found = evaluate(model, batches, tokenizer, None, asked.micro_batch, world)
    return (
        f"step {step}: loss {found['val_loss']:.4f}, perplexity {found['val_perplexity']:.2f}, "
        f"{found['val_bits_per_byte']:.4f} bits/byte over {split.n_tokens:,} tokens, {split.n_bytes:,} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
