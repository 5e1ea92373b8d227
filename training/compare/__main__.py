"""Train configurations with the same seeds, and say which is better and how sure that is.

    python -m training.compare a.yaml b.yaml --seeds 5
    python -m training.compare moe.yaml --twin --equal time
    python -m training.compare a.yaml --vary optim.learning_rate=1e-3,2e-3 --steps 500
    python -m training.compare runs/a runs/b

Configurations and finished runs come first, then flags; other flags are options of all configurations. The first one is
the baseline. All runs of a seed read the same data in the same order, so their differences are paired. Started again,
the same command resumes where it stopped, and uses the runs that are finished.

Exit status: 0 done, 1 some runs failed, 2 wrong input, 128 + n saved and stopped by signal n.
"""

import argparse
import itertools
import os
import sys

from training.compare.page import write_page
from training.compare.results import FIGURES, compare_runs
from training.compare.runner import Runner, Stopped
from training.compare.text import table, verdict_lines
from training.compare.variants import Variant, build_variants, comparison_folder, read_settings
from training.config import HORIZONS
from training.errors import UserError, command
from training.files import mkdir_durable, run_lock, write_atomically
from training.options import cli
from training.terminal import aligned_table, print_line, print_note, print_result

DEFAULT_SEEDS = 3


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args, settings = parse(sys.argv[1:] if argv is None else argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training.compare trains one run at a time in one process; start it without torchrun")
    variants = build_variants(args.runs, settings, args.vary, with_twins=args.twin, train_runs=args.seeds is not None)
    check_figure(variants, args.metric)
    folder, seeds = comparison_folder(variants, args.vary, args.out), seeds_of(variants, args.seeds)
    runner = Runner(folder, seeds, args.equal)
    with run_lock(folder, "--out"):
        if any(variant.is_trained for variant in variants):
            try:
                variants = runner.train_all(variants)
            except Stopped as error:
                print_note(f"{folder}: stopped; the same command resumes it")
                return error.status
        comparison = compare_runs(variants, seeds, folder, args.equal, args.metric, runner.failures)
        mkdir_durable(folder)
        write_atomically(folder / "compare.json", comparison.as_json())
        write_page(comparison, folder)
    print_line()
    lines = [*aligned_table(table(comparison)), "", *verdict_lines(comparison), "", f"{folder}/compare.html"]
    for line in lines:
        print_result(line)
    return 1 if runner.failures else 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the command's arguments, and the settings of options as {option: YAML text}. Raises UserError."""
    parser = cli.Parser(prog="python -m training.compare", description=__doc__)
    parser.usage = "%(prog)s CONFIG_OR_RUN ... [flags] [--section.option VALUE ...]"  # the first are taken off below
    parser.add_argument("--seeds", type=int, help=f"runs of each configuration (default {DEFAULT_SEEDS})")
    parser.add_argument(
        "--equal",
        choices=["tokens", "time", "flops", "none"],
        help="give each configuration as many steps as read the tokens, take the time or compute the FLOPs of the "
        "first (default tokens); none: as many as it says",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="OPTION=A,B",
        help="train with each of these values; given twice, with each pair of values",
    )
    parser.add_argument("--twin", action="store_true", help="also train the dense twin of each Mixture of Experts")
    parser.add_argument(
        "--metric", choices=list(FIGURES), help="default: val_loss; for different text val_bits_per_byte"
    )
    parser.add_path("--out", help="folder of the comparison (default: compare/NAMES beside the first one's runs)")
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args, others = parser.parse_known_args(argv[len(runs) :])
    if not runs:
        raise UserError("name configurations or finished runs first, as in training.compare a.yaml b.yaml --seeds 5")
    args.runs = [cli.flag_path("training.compare", run) for run in runs]
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds: {args.seeds} is less than 1")
    if len(args.vary) > 2:
        parser.error("--vary: at most two options at a time")
    settings = read_settings(others)
    horizons = [option for text in args.vary if (option := text.partition("=")[0]) in HORIZONS]
    if args.equal is None:
        args.equal = "tokens"
    elif args.equal != "none" and horizons:
        parser.error(f"--equal {args.equal}: it sets the steps; leave it out to vary {horizons[0]}")
    if horizons:
        args.equal = "none"
    return args, settings


def seeds_of(variants: list[Variant], n_seeds: int | None) -> list[int]:
    """Return the seeds to compare: those of the finished runs, and free ones up to `n_seeds`, by default 3."""
    seeds = {seed for variant in variants for seed in variant.finished}
    if any(variant.is_trained for variant in variants):
        free = itertools.count(min(seeds, default=variants[0].config.seed))
        while len(seeds) < (n_seeds or DEFAULT_SEEDS):
            seeds.add(next(free))
    return sorted(seeds)


def check_figure(variants: list[Variant], name: str | None) -> None:
    """Raise UserError if a run would not have the figure."""
    for variant in variants:
        if name == "averaged_val_loss" and variant.config.optim.average is None:
            raise UserError(f"--metric {name}: {variant.label} has no optim.average")
        if name == "tasks_mean" and not variant.config.eval.tasks:
            raise UserError(f"--metric {name}: {variant.label} has no eval.tasks")


if __name__ == "__main__":
    sys.exit(main())
