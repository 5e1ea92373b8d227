"""A run's checkpoints: look whether they are whole, list them, remove old ones.

    python -m training.checkpoints verify runs/NAME      every byte of every file
    python -m training.checkpoints list runs/NAME
    python -m training.checkpoints prune runs/NAME [--keep 2]      the best stays too, and what is not whole

Exit status: 0 done, 1 where one is damaged, 2 wrong input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from training.errors import UserError, one_line
from training.options.cli import Parser


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = Parser(prog="python -m training.checkpoints", description=__doc__)
    parser.add_argument("what", choices=["verify", "list", "prune"])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--keep", type=int, default=2, help="newest checkpoints that prune leaves (default 2)")
    try:
        asked = parser.parse_args(argv)
        folder = _folder(asked.run)
        if asked.what == "prune":
            _prune(asked.run, folder, asked.keep)
        return _tell(folder, verify=asked.what == "verify")
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _folder(run: Path) -> Path:
    """The folder of the run's checkpoints. Raises UserError where there is none."""
    from training.checkpoint import list_checkpoints

    folder = run / "checkpoints"
    if not list_checkpoints(folder):
        raise UserError(f"{run}: no run with a checkpoint is here; give a run's folder, such as runs/quickstart")
    return folder


def _tell(folder: Path, *, verify: bool) -> int:
    """A line a checkpoint."""
    from training.checkpoint import corruption, is_complete, list_checkpoints

    n_damaged = 0
    for step, path in list_checkpoints(folder):
        try:
            size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        except FileNotFoundError:  # removed meanwhile, or a link that leads nowhere
            continue
        problem = corruption(path) if verify else None if is_complete(path) else f"{path}: damaged"
        n_damaged += problem is not None
        print(f"step {step:>10,}  {size:>10,.1f} MiB  {problem or ('whole' if verify else path)}")
    return 1 if n_damaged else 0


def _prune(run: Path, folder: Path, keep: int) -> None:
    """Raises UserError for a number that leaves none, and where the run is being trained."""
    from training.checkpoint import corruption, latest, prune, read_state, remove_leftovers
    from training.files import run_lock

    if keep < 1:
        raise UserError(f"--keep: {keep} would leave no checkpoint; give 1 or more")
    with run_lock(run):
        best = read_state(latest(folder, lambda problem: print(f"{problem}; it stays"))).get("best")
        remove_leftovers(folder)
        prune(folder, keep, best and best["step"], lambda path: corruption(path) is None)


if __name__ == "__main__":
    sys.exit(main())
