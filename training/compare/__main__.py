"""Train configurations with the same seeds, and say which is better and how sure that is.

    python -m training.compare a.yaml b.yaml --seeds 5
    python -m training.compare moe.yaml --twin --equal time
    python -m training.compare a.yaml --vary optim.learning_rate=1e-3,2e-3 --steps 500
    python -m training.compare runs/a runs/b

Configurations and finished runs come first, then flags; other flags are options of all configurations. The first one is
the baseline. All runs of a seed read the same data in the same order, so their differences are paired. Started again,
the same command goes on where it stopped, and uses the runs that are finished.

Exit status: 0 done, 1 some runs failed, 2 wrong input, 128 + n saved and stopped by signal n.
"""

import argparse
import itertools
import os
import sys

from training.compare.page import write_page
from training.compare.results import METRICS, compare_runs, table_lines, verdict_lines
from training.compare.runner import Runner, Stopped
from training.compare.variants import Variant, build_variants, comparison_folder, read_settings
from training.errors import UserError, command
from training.files import mkdir_durable, write_atomically
from training.options import cli
from training.terminal import print_line, print_note, print_result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args, settings = parse(sys.argv[1:] if argv is None else argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training.compare trains one run at a time in one process; start it without torchrun")
    variants = build_variants(args.runs, settings, args.vary, with_twins=args.twin)
    folder = comparison_folder(variants, args.vary, args.out)
    seeds = seeds_of(variants, args.seeds)
    runner = Runner(folder, seeds, args.equal)
    try:
        if has_runs_to_train(variants, args.seeds):
            variants = runner.train_all(variants)
    except Stopped as error:
        print_note(f"{folder}: stopped; the same command goes on")
        return error.status
    comparison = compare_runs(variants, seeds, folder, args.equal, args.metric, runner.failures)
    mkdir_durable(folder)
    write_atomically(folder / "compare.json", comparison.as_json())
    write_page(comparison, folder)
    print_line()
    for line in [*table_lines(comparison), "", *verdict_lines(comparison), "", f"{folder}/compare.html"]:
        print_result(line)
    return 1 if runner.failures else 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the command's arguments, and the settings of options as {option: YAML text}. Raises UserError."""
    parser = cli.Parser(prog="python -m training.compare", description=__doc__)
    parser.add_argument("--seeds", type=int, help="runs of each configuration, with consecutive seeds (default 3)")
    parser.add_argument(
        "--equal",
        default="tokens",
        choices=["tokens", "time", "flops"],
        help="what all have as much of as the first: their steps follow from it (default %(default)s)",
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
        "--metric", choices=list(METRICS), help="default: val_loss, or for different texts val_bits_per_byte"
    )
    parser.add_path("--out", help="folder of the comparison (default: compare/NAMES in the first one's out_dir)")
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    args, others = parser.parse_known_args(argv[len(runs) :])
    if not runs:
        raise UserError("name configurations or finished runs first, as in training.compare a.yaml b.yaml --seeds 5")
    args.runs = [cli.flag_path("training.compare", run) for run in runs]
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds: {args.seeds} is less than 1")
    if len(args.vary) > 2:
        parser.error("--vary: at most two options at a time")
    return args, read_settings(others)


def has_runs_to_train(variants: list[Variant], n_seeds: int | None) -> bool:
    """Return False if all variants are finished runs and no number of seeds was given."""
    return n_seeds is not None or not all(variant.finished for variant in variants)


def seeds_of(variants: list[Variant], n_seeds: int | None) -> list[int]:
    """Return the seeds to compare: `n_seeds` of them, or those that the finished runs have."""
    if not has_runs_to_train(variants, n_seeds):
        return sorted({seed for variant in variants for seed in variant.finished})
    first = min(variants[0].finished, default=variants[0].config.seed)
    return list(range(first, first + (n_seeds or 3)))


if __name__ == "__main__":
    sys.exit(main())
