"""Evaluate a trained model: its loss on the run's validation set, or on other text.

python -m training.evaluate --run runs/quickstart
python -m training.evaluate --run runs/quickstart --data book.txt notes/
"""

import sys

from training.errors import UserError, command
from training.options.cli import Parser
from training.terminal import print_result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command: print one line of figures over all of the text; `eval.tokens` has no effect."""
    parser = Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_path("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_path("--data", nargs="+", metavar="PATH", help="files, folders or globs; default: the run's own")
    parser.add_argument("--text_column", default="text", help="column of .jsonl and .parquet (default %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples per forward (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args(argv)
    if args.micro_batch < 1:
        parser.error(f"--micro_batch: {args.micro_batch} is less than 1")

    from training.data import Samples, prepare
    from training.data.dataset import read_split
    from training.distributed.world import World
    from training.engine.evaluate import validation_loss
    from training.engine.load_run import load_model

    model, run = load_model(args.run, args.device)
    if args.data:
        split = read_split(args.data, args.text_column, run.tokenizer)
    else:
        dataset = prepare(run.config.data, quiet=True)
        if not dataset.is_same_as(run.data):
            raise UserError(f"--run {args.run}: its text has changed since it was trained; name other text with --data")
        split = dataset.val
    end_of_text = run.tokenizer.end_of_text if model.config.isolate_documents else None
    samples = Samples(split, n_positions=model.config.n_positions, seed=None, end_of_text=end_of_text)
    world = World(0, 1, model.wte.weight.device)
    figures = validation_loss(model, samples, run.tokenizer, None, args.micro_batch, world)
    print_result(
        f"step {run.step}: loss {figures['val_loss']:.4f}, perplexity {figures['val_perplexity']:.2f}, "
        f"{figures['val_bits_per_byte']:.4f} bits/byte over {split.n_tokens:,} tokens, {split.n_bytes:,} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
