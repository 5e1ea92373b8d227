"""Evaluate a trained model: its loss on the run's validation text, or on other text, by source and in total.

python -m training.evaluate --run runs/quickstart
python -m training.evaluate --run runs/quickstart --data book.txt notes/ --json
"""

import json
import sys
from typing import TYPE_CHECKING

from training.errors import UserError, command
from training.options.cli import Parser
from training.terminal import print_result

if TYPE_CHECKING:
    from training.data import Split
    from training.engine.load_run import LoadedRun

Row = dict[str, str | float | int]  # of the table: name, loss, perplexity, bits_per_byte, tokens, bytes


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command: print the figures of all of the text; `eval.tokens` has no effect."""
    parser = Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_path("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_path("--data", nargs="+", metavar="PATH", help="files, folders or globs, a row each; default: the run's")
    parser.add_argument("--text_column", default="text", help="column of .jsonl and .parquet (default %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples per forward (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    args = parser.parse_args(argv)
    if args.micro_batch < 1:
        parser.error(f"--micro_batch: {args.micro_batch} is less than 1")

    from training.data import Samples
    from training.distributed.world import World
    from training.engine.evaluate import total, validation_losses
    from training.engine.load_run import load_model

    model, run = load_model(args.run, args.device)
    split = read_text(args.data, args.text_column, run, args.run)
    end_of_text = run.tokenizer.end_of_text if model.config.isolate_documents else None
    samples = Samples(split, n_positions=model.config.n_positions, seed=None, end_of_text=end_of_text)
    world = World(0, 1, model.wte.weight.device)
    losses = validation_losses(model, samples, run.tokenizer, None, args.micro_batch, world)
    rows: list[Row] = [
        {"name": stream.name, **losses[stream.name].figures(), "tokens": len(stream.tokens), "bytes": stream.n_bytes}
        for stream in split.streams
    ]
    sums: Row = {"name": "total", **total(losses.values()).figures(), "tokens": split.n_tokens, "bytes": split.n_bytes}
    if args.json:
        print_result(json.dumps({"step": run.step, "rows": rows, "total": sums}))
    elif len(rows) == 1:
        print_result(f"step {run.step}: {sentence(sums)}")
    else:
        for line in table(run.step, [*rows, sums]):
            print_result(line)
    return 0


def read_text(paths: list[str] | None, text_column: str, run: "LoadedRun", name: str) -> "Split":
    """Return the text at `paths`, or the run's validation text. Raises UserError if that has changed."""
    from training.data import prepare
    from training.data.dataset import read_split

    if paths:
        return read_split(paths, text_column, run.tokenizer)
    dataset = prepare(run.config.data, quiet=True)
    if not dataset.is_same_as(run.data):
        raise UserError(f"--run {name}: its text has changed since it was trained; name other text with --data")
    return dataset.val


def sentence(row: Row) -> str:
    """Return a row as one line."""
    return (
        f"loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}, {row['bits_per_byte']:.4f} bits/byte "
        f"over {row['tokens']:,} tokens, {row['bytes']:,} bytes"
    )


def table(step: int, rows: list[Row]) -> list[str]:
    """Return the rows as lines in columns, under a title."""
    cells = [[f"step {step}", "loss", "perplexity", "bits/byte", "tokens", "bytes"]]
    for row in rows:
        figures = f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}"
        cells.append([row["name"], *figures, f"{row['tokens']:,}", f"{row['bytes']:,}"])
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(figures, others, strict=True))])
        for name, *figures in cells
    ]


if __name__ == "__main__":
    sys.exit(main())
