"""Print the memory, time, data and disk that a run will need. Allocates and prepares nothing.

    python -m training.plan --config configs/gpt2_moe_8x124m.yaml --world 8 --device h200

docs/planning.md explains the figures.
"""

import json
import re
import statistics
import sys

from training.config import Config
from training.errors import UserError, command
from training.files import read_bytes
from training.options import cli
from training.terminal import print_note, print_result

FLAGS = {
    "--world": "number of ranks, one device each (default 1)",
    "--device": "type of the devices, such as h200, a100, 'rtx 4090' or cpu (default: the device of this machine)",
    "--mfu": "model FLOPs utilization, 0 to 1 (default: the speed that this run measured here, else 0.4)",
}

# Errors of a run that was never started, or not by this version.
NO_SPEED = (OSError, ValueError, KeyError, TypeError, RecursionError, UserError)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 wrong input, 130 interrupted."""
    args = sys.argv[1:] if argv is None else argv
    config, flags = cli.parse_command_line(args, prog="python -m training.plan", doc=__doc__, flags=FLAGS)
    world_size = int(_number("--world", flags["--world"] or "1", "a number of ranks, 1 or more", "[1-9][0-9]{0,6}"))
    if (mfu := flags["--mfu"]) is not None:
        mfu = _number("--mfu", mfu, "above 0 and at most 1", r"0?\.[0-9]*[1-9][0-9]*|1(\.0*)?")

    from training.planning.report import build_plan, find_device, report_lines
    from training.weights.init_from import resolve_init_from

    device = find_device(flags["--device"], config)
    plan = build_plan(resolve_init_from(config), device, world_size)
    speed = measured_tokens_per_s(plan.config, device.name, world_size) if flags["--device"] is None else None
    for line in plan.notes:
        print_note(line)
    for line in report_lines(plan, mfu, speed):
        print_result(line)
    return 0


def _number(flag: str, text: str, allowed: str, pattern: str) -> float:
    if not re.fullmatch(pattern, text):
        raise UserError(f"{flag}: {text!r} is not {allowed}")
    return float(text)


def measured_tokens_per_s(config: Config, device: str, world_size: int) -> float | None:
    """Return the median tokens per second of the last 200 rows in the run's folder.

    None if there are no rows, or if they have another model, batch, precision, device or number of ranks.
    """
    from training.logging.jsonl import read_tail

    folder = config.run_dir
    try:
        facts = json.loads(read_bytes(folder / "run.json"))["facts"]
        is_same_machine = (facts["device"], facts["world_size"]) == (device, world_size)
        measured = cli.load_config(folder / "config.yaml")
    except NO_SPEED:
        return None
    options = ("model", "batch_tokens", "batch_schedule", "precision")
    if not is_same_machine or any(getattr(measured, option) != getattr(config, option) for option in options):
        return None
    rows = (row for row in read_tail(folder / "metrics.jsonl") if row["step"] > 1 and row.get("tokens_per_s"))
    speeds = [row["tokens_per_s"] for row in rows][-200:]
    return statistics.median(speeds) if speeds else None


if __name__ == "__main__":
    sys.exit(main())
