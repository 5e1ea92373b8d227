"""Verify, list and prune a run's checkpoints.

    python -m training.checkpoints verify runs/NAME                reads every byte of every file
    python -m training.checkpoints list runs/NAME                  or s3://bucket/run, a copy (checkpoint.copy_to)
    python -m training.checkpoints prune runs/NAME [--keep 2]

prune also keeps the best checkpoint, damaged ones, and those of checkpoint.keep_every.

Exit status: 0 all intact, 1 a checkpoint is damaged, 2 wrong input, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError, command
from training.files import run_lock
from training.options.cli import Parser
from training.remote import is_url
from training.terminal import print_result

if TYPE_CHECKING:
    from training.checkpoint import RemoteRun


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m training.checkpoints", description=__doc__)
    parser.add_argument("action", choices=["verify", "list", "prune"])
    parser.add_path("run", help="folder of a run; for verify and list also the URL of its copy")
    parser.add_argument("--keep", type=int, default=2, help="number of newest checkpoints that prune keeps (default 2)")
    args = parser.parse_args(argv)
    from training import checkpoint

    if is_url(args.run):
        return report_copy(checkpoint.RemoteRun(args.run), args.action)
    folder = Path(args.run, "checkpoints")
    if not checkpoint.list_checkpoints(folder):
        raise UserError(f"{args.run}: no run with a checkpoint is here; give a run's folder, such as runs/quickstart")
    if args.action == "prune":
        if args.keep < 1:
            raise UserError(f"--keep: {args.keep} would leave no checkpoint; give 1 or more")
        with run_lock(Path(args.run)):
            newest = checkpoint.latest(folder, lambda problem: print_result(f"{problem}; the damaged one is kept"))
            state = checkpoint.read_state(newest)
            best = state.get("best")
            if best is not None and not (isinstance(best, dict) and type(best.get("step")) is int):
                raise UserError(f"{newest / 'state.json'}: best: {best!r} has no step, so nothing is pruned")
            checkpoint.remove_leftovers(folder)
            kept = args.keep, best and best["step"], keep_every_of(state)
            checkpoint.prune(folder, *kept, is_intact=lambda path: not checkpoint.corruption(path))
    n_damaged = 0
    for step, path in checkpoint.list_checkpoints(folder):
        try:
            mib = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        except FileNotFoundError:  # the training process has just pruned it, or it is a dangling link
            continue
        if args.action == "verify":
            problem, note = checkpoint.corruption(path), "intact"
        else:  # only sizes are checked
            problem, note = None if checkpoint.is_complete(path) else f"{path}: damaged", path
        n_damaged += problem is not None
        print_result(f"step {step:>10,}  {mib:>10,.1f} MiB  {problem or note}")
    return 1 if n_damaged else 0


def report_copy(remote: "RemoteRun", action: str) -> int:
    """Print each checkpoint of a copy, for `verify` after reading all its bytes; return the exit status."""
    if action == "prune":
        raise UserError(f"{remote.url}: the run itself prunes its copy; give its folder")
    if not remote.steps:
        raise UserError(f"{remote.url}: no copy of a run with a checkpoint is here")
    n_damaged = 0
    for step in sorted(remote.steps):
        url, manifest = remote.folder.url_of(remote.name_of(step)), remote.read_manifest(step)
        if manifest is None:
            print_result(f"step {step:>10,}  incomplete, and not used: {url}")
            continue
        problem = remote.corruption(step) if action == "verify" else None
        n_damaged += problem is not None
        mib = sum(entry["bytes"] for entry in manifest.values()) / 2**20
        print_result(f"step {step:>10,}  {mib:>10,.1f} MiB  {problem or ('intact' if action == 'verify' else url)}")
    return 1 if n_damaged else 0


def keep_every_of(state: dict) -> int | None:
    """Return `checkpoint.keep_every` of a run's state; None if it is off, and in states of older versions."""
    try:
        value = state["config"]["checkpoint"]["keep_every"]
    except (KeyError, TypeError):
        return None
    return value if type(value) is int and value > 0 else None


if __name__ == "__main__":
    sys.exit(main())
