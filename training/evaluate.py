"""Evaluate a trained model: its loss on the run's validation text or on other text, or its scores on tasks.

python -m training.evaluate --run runs/quickstart
python -m training.evaluate --run runs/quickstart --data book.txt notes/ --json
python -m training.evaluate --run runs/finetune_chat --data dialogues.jsonl --messages_column messages
python -m training.evaluate --run runs/quickstart --tasks hellaswag=hellaswag_val.jsonl arc=ARC-Easy-Test.jsonl
python -m training.evaluate --run openai-community/gpt2 --data book.txt
"""

import json
import sys
from argparse import Namespace
from itertools import chain
from typing import TYPE_CHECKING

from training.config import SHIPPED_TASKS, RowsConfig, TaskConfig
from training.errors import UserError, command
from training.options import cli
from training.terminal import aligned_table, print_note, print_result

if TYPE_CHECKING:
    from training.data import Split
    from training.data.shards import Stream
    from training.engine.evaluate import Losses
    from training.engine.load_run import LoadedModel

TASKS_HELP = f"""score tasks: TYPE=PATH with a TYPE of {", ".join(SHIPPED_TASKS)}, or the configuration of a run,
such as my.yaml, for its eval.tasks; default: those of --run"""
TEXT_COLUMNS = {"loss": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f", "tokens": ",", "bytes": ","}  # formats
TASK_COLUMNS = {"items": ",", "acc": ".4f", "stderr": ".4f", "acc_norm": ".4f", "chance": ".4f"}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command: print the figures of all of the text or items; `eval.tokens` has no effect."""
    parser = cli.Parser(prog="python -m training.evaluate", description=__doc__)
    parser.add_path("--run", required=True, help=cli.MODEL_HELP)
    parser.add_path("--data", nargs="+", metavar="PATH", help="files, folders or globs, a row each; default: the run's")
    parser.add_argument("--tasks", nargs="*", metavar="TASK", help=TASKS_HELP)
    for name, field in RowsConfig.model_fields.items():
        parser.add_argument(f"--{name}", help=f"of --data: {field.description}")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples per forward (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    args = parser.parse_args(argv)
    if args.micro_batch < 1:
        parser.error(f"--micro_batch: {args.micro_batch} is less than 1")
    if args.tasks is not None and args.data:
        parser.error("--tasks: leave --data out, or run two commands")
    columns = read_columns(parser, args)
    named = [task for text in args.tasks or () for task in read_tasks(text)]

    from training.engine.load_run import load_model

    loaded = load_model(args.run, args.device)
    if args.tasks is None:
        split = read_text(args.data, columns, loaded, args.run)
        result, lines = text_losses(loaded, split, args.micro_batch)
    else:
        own_tasks = () if loaded.run is None else loaded.run.config.eval.tasks
        result, lines = task_scores(loaded, named or own_tasks)
    for line in [json.dumps(result)] if args.json else lines:
        print_result(line)
    return 0


def read_columns(parser: cli.Parser, args: Namespace) -> RowsConfig:
    """Return the columns of --data. Ends the program with a message if the options do not go together."""
    named = {name: value for name in RowsConfig.model_fields if (value := getattr(args, name)) is not None}
    columns = RowsConfig.model_construct(**named)
    problems = ((name, "has no effect without --data") for name in named if not args.data)
    for name, problem in chain(problems, columns.rules()):
        parser.error(f"--{name}: {problem}")
    return columns


def read_text(paths: list[str] | None, columns: RowsConfig, loaded: "LoadedModel", name: str) -> "Split":
    """Return the text at `paths`, or the validation text of the run. Raises UserError without one or if it changed."""
    from training.data import prepare
    from training.data.dataset import read_split

    if paths:
        return read_split(paths, loaded.tokenizer, columns)
    if loaded.run is None:
        raise UserError(f"--run {name}: a model without a run's text; name text with --data, or items with --tasks")
    dataset = prepare(loaded.run.config.data, quiet=True)
    if not dataset.is_same_as(loaded.run.data):
        raise UserError(f"--run {name}: its text has changed since it was trained; name other text with --data")
    return dataset.val


def read_tasks(text: str) -> tuple[TaskConfig, ...]:
    """Return the tasks that a value of --tasks stands for. Raises UserError for another value."""
    name, is_pair, path = text.partition("=")
    if is_pair and name in SHIPPED_TASKS:
        return (SHIPPED_TASKS[name](paths=(cli.flag_path("--tasks", path),)),)
    if not text.endswith((".yaml", ".yml")):
        raise UserError(
            f"--tasks {text}: neither {'=PATH, '.join(SHIPPED_TASKS)}=PATH nor the .yaml configuration of a run"
        )
    if not (tasks := cli.load_config(cli.flag_path("--tasks", text)).eval.tasks):
        raise UserError(f"--tasks {text}: this config has no eval.tasks")
    return tasks


def text_losses(loaded: "LoadedModel", split: "Split", micro_batch: int) -> tuple[dict, list[str]]:
    """Return the losses of a text by its parts and in total, as plain data and as lines."""
    from training.data import build_samples
    from training.distributed.world import World
    from training.engine.evaluate import total, validation_losses

    model, tokenizer = loaded.model, loaded.tokenizer
    too_long = "cut" if loaded.run is None else loaded.run.config.data.too_long
    samples = build_samples(split, model.config, tokenizer, too_long=too_long)
    for line in samples.describe():
        print_note(f"data: {line}")
    losses = validation_losses(model, samples, tokenizer, None, micro_batch, World(0, 1, model.wte.weight.device))
    rows = [
        {"name": stream.name, **losses[stream.name].figures(), **sizes(stream, losses[stream.name])}
        for stream in split.streams
    ]
    all_sizes = {name: sum(row[name] for row in rows) for name in ("tokens", "bytes")}
    sums = {"name": "total", **total(losses.values()).figures(), **all_sizes}
    loss, perplexity, bits, tokens, n_bytes = cells_of(sums, TEXT_COLUMNS)
    lines = [
        f"{loaded.title}: loss {loss}, perplexity {perplexity}, {bits} bits/byte over {tokens} tokens, {n_bytes} bytes"
    ]
    if len(rows) > 1:
        lines = table(loaded.title, [*rows, sums], TEXT_COLUMNS)
    return {"step": loaded.run and loaded.run.step, "rows": rows, "total": sums}, lines


def sizes(stream: "Stream", losses: "Losses") -> dict[str, int]:
    """Return the tokens and bytes of a text, or of its answers, if only they are learned."""
    if stream.targets is not None:
        return {"tokens": round(losses.n_targets), "bytes": round(losses.n_bytes)}
    return {"tokens": len(stream.tokens), "bytes": stream.n_bytes}


def task_scores(loaded: "LoadedModel", tasks: tuple[TaskConfig, ...]) -> tuple[dict, list[str]]:
    """Return the scores of tasks and their mean, as plain data and as lines. Raises UserError if there are none."""
    from training.distributed.world import World
    from training.engine.tasks import compute_scores, load_tasks, task_row

    if not tasks:
        raise UserError("--tasks: --run has no eval.tasks of its own; name some, such as arc=ARC-Easy-Test.jsonl")
    model = loaded.model
    items = load_tasks(tasks, loaded.tokenizer, model.config.n_positions)
    scores = compute_scores(model, items, World(0, 1, model.wte.weight.device))
    rows = [
        {"name": name, "items": score.n, "acc": score.acc, "stderr": score.stderr, "acc_norm": score.acc_norm}
        | {"chance": score.chance}
        for name, score in scores.items()
    ]
    mean = task_row(scores)["tasks_mean"]
    lines = [*table(loaded.title, rows, TASK_COLUMNS), f"mean accuracy, centered (0: chance, 1: all right): {mean:.4f}"]
    return {"step": loaded.run and loaded.run.step, "rows": rows, "mean": mean}, lines


def table(title: str, rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Return the rows as lines under the title: their names on the left, and the columns on the right."""
    titles = [title, *(name.replace("bits_per_byte", "bits/byte") for name in columns)]
    cells = [titles, *([row["name"], *cells_of(row, columns)] for row in rows)]
    return aligned_table(cells)


def cells_of(row: dict, columns: dict[str, str]) -> list[str]:
    """Return a row's values in the formats of the columns, "" for None."""
    return ["" if row[name] is None else format(row[name], spec) for name, spec in columns.items()]


if __name__ == "__main__":
    sys.exit(main())
