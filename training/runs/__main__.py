"""List the runs of a folder, and what they and their cached text take on disk.

    python -m training.runs                                 the runs in runs/, the latest one last
    python -m training.runs runs/compare --sort best
    python -m training.runs --state stopped --name '*124m*' --json
    python -m training.runs --caches                        the cached text, and which runs it belongs to
    python -m training.runs --remove_caches_unused_for 30   remove what none of them was trained on, and what no
                                                            command has opened for 30 days

A run that needs a removed cache again makes it again from its text.
"""

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from training.errors import UserError, command
from training.logging.format import age_text, bytes_text, count, number
from training.options.cli import Parser
from training.runs.listing import STATES, RunEntry, find_runs, read_run
from training.terminal import aligned_table, print_note, print_result

SORTS = {  # of a run; runs without the figure come last
    "name": lambda run: run.name,
    "age": lambda run: -run.age_s,
    "steps": lambda run: run.step,
    "loss": lambda run: run.val_loss,
    "best": lambda run: run.best_val_loss,
    "speed": lambda run: run.tokens_per_s and -run.tokens_per_s,
    "size": lambda run: -run.bytes,
}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m training.runs", description=__doc__)
    parser.add_path("folder", nargs="?", default="runs", help="folder of runs, searched at any depth (default runs)")
    parser.add_argument("--sort", choices=list(SORTS), default="age", help="default: age, the latest one last")
    parser.add_argument("--state", choices=STATES, help="only runs in this state")
    parser.add_argument("--name", help="only runs whose name has this text, or matches it if it has a *")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--caches", action="store_true", help="list the cached text instead")
    parser.add_argument(
        "--remove_caches_unused_for",
        type=int,
        metavar="DAYS",
        help="remove the cached text of no run in FOLDER that no command has opened for DAYS days",
    )
    args = parser.parse_args(argv)
    if args.remove_caches_unused_for is not None and args.remove_caches_unused_for < 0:
        parser.error(f"--remove_caches_unused_for: {args.remove_caches_unused_for} is less than 0")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder; name the out_dir of your runs")
    runs = [read_run(path, folder) for path in find_runs(folder)]
    if args.caches or args.remove_caches_unused_for is not None:
        return show_caches(runs, args.json, args.remove_caches_unused_for)
    pattern = args.name if args.name is None or "*" in args.name else f"*{args.name}*"
    runs = [
        run for run in runs if args.state in (None, run.state) and (pattern is None or fnmatchcase(run.name, pattern))
    ]
    key = SORTS[args.sort]
    runs.sort(key=lambda run: (key(run) is None, key(run) or 0))
    if args.json:
        print_result(json.dumps([run.as_json() for run in runs]))
    elif not runs:
        print_note(f"{folder}: no such run")
    else:
        for line in aligned_table([TITLES, *(cells(run) for run in runs), total(runs)]):
            print_result(line)
    return 0


TITLES = ["run", "state", "step", "of", "loss", "val loss", "best", "tokens/s", "size", "last written"]


def cells(run: RunEntry) -> list[str]:
    """Return a run's line in the table."""
    figures = (run.loss, run.val_loss, run.best_val_loss)
    return [
        run.name,
        run.state,
        f"{run.step:,}",
        "" if run.steps is None else f"{run.steps:,}",
        *("" if figure is None else number(figure) for figure in figures),
        "" if run.tokens_per_s is None else count(run.tokens_per_s),
        bytes_text(run.bytes),
        age_text(run.age_s),
    ]


def total(runs: list[RunEntry]) -> list[str]:
    """Return the table's last line."""
    return [f"{len(runs)} runs", *[""] * 7, bytes_text(sum(run.bytes for run in runs)), ""]


def show_caches(runs: list[RunEntry], as_json: bool, remove_after_days: int | None) -> int:
    """List the cached datasets, or remove those that no run needs and nobody has used since; return the exit status."""
    from training.runs.caches import find_caches, remove_cache

    caches = find_caches(runs)
    if remove_after_days is not None:
        unused = [cache for cache in caches if not cache.runs and cache.unused_s >= 86400 * remove_after_days]
        caches = [cache for cache in unused if remove_cache(cache)]
    if as_json:
        print_result(json.dumps([cache.as_json() for cache in caches]))
        return 0
    titles = ["cached text" if remove_after_days is None else "removed", "tokens", "size", "last used", "used by"]
    rows = [
        [str(c.folder), count(c.n_tokens), bytes_text(c.bytes), age_text(c.unused_s), users(c.runs)] for c in caches
    ]
    size = bytes_text(sum(cache.bytes for cache in caches))
    for line in aligned_table([titles, *rows, [f"{len(caches)} datasets", "", size, "", ""]]):
        print_result(line)
    return 0


def users(names: list[str]) -> str:
    """Return the name of a run, and how many there are beside it."""
    if not names:
        return "no run"
    return names[-1] if len(names) == 1 else f"{names[-1]} and {len(names) - 1} more"


if __name__ == "__main__":
    sys.exit(main())
