"""Measure what the log of a run costs as it grows: a start, the report of one evaluation, and a row.

    python benchmarks/log.py | tee benchmarks/results/log.txt

Rows of a dense model, or with `--layers` of one with so many layers of 8 experts, without training. Each figure is
processor time, and peak memory above that of a process with its imports. "without curves.jsonl" is the first start on
rows that an older version wrote.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import header, in_a_process, peak_gib, used_gib

from training.logging.jsonl import JSONLSink
from training.logging.phases import PHASES
from training.logging.report import write_report
from training.logging.sinks import RunInfo

CPU = torch.device("cpu")
ROWS = [10_000, 100_000, 1_000_000]
BATCH = 1000  # rows of one `write`


def row_of(step: int, n_layers: int) -> dict:
    """Return a row with the keys and about the length of a real one."""
    noise = math.sin(step**2)
    row = {"step": step, "loss": 3 + 7 / step + noise, "learning_rate": 6e-4, "grad_norm": 1.5 + noise}
    row |= {"skipped_steps": 0, "tokens": 32_768 * step, "tokens_per_s": 98_765.4321 + noise, "mfu": 0.43219876}
    row |= {"memory_gib": 12.3456789, "step_s": 0.33210987, "time_s": 0.33210987 * step}
    row |= {f"time_{phase}": 0.04321 for phase in list(PHASES)[:7]}
    if n_layers:
        share = 0.125 + noise / 100
        row |= {"expert_load": [[share] * 8] * n_layers, "expert_load_max": 1.2, "expert_entropy": 0.98765432}
        row |= {"dead_experts": 0, "router_confidence": 0.4321, "router_z_loss": 0.7654, "router_bias_range": 0.0123}
        layers = dict.fromkeys(("entropy", "confidence", "z_loss", "bias_range", "dropped"), [share] * n_layers)
        row |= {"dropped_share": 0.0, "router_layers": layers}
    if step % 100 == 0:
        row |= {"val_loss": 3 + 7 / step, "val_perplexity": 21.5, "val_bits_per_byte": 1.25}
        row |= {"samples": [{"prompt": "def ", "text": "x" * 200}]}
    return row


def run_of(folder: Path, n_rows: int, n_layers: int) -> RunInfo:
    """Return a run whose checkpoint is at its last row."""
    return RunInfo(folder, "log", {}, "", {}, n_rows, n_rows, 32_768, list(range(n_layers)), {}, {})


def measure(folder: Path, n_rows: int, n_layers: int) -> dict[str, list[float]]:
    """Return (processor seconds, MiB) of a start and of the report after it, in this fresh process."""
    before, run, sinks, figures = used_gib(CPU), run_of(folder, n_rows, n_layers), [], {}
    works = {"start": lambda: sinks.append(JSONLSink(run)), "report": lambda: write_report(run, sinks[0].history)}
    for name, work in works.items():
        begin = time.process_time()
        mib = 1024 * peak_gib(work, CPU, before)
        figures[name] = [time.process_time() - begin, mib]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=0, help="MoE layers (default %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(str(measure(args.measure, args.rows[0], args.layers)).replace("'", '"'))
        return
    print(f"{header(CPU)}; {args.layers} MoE layers")
    for n_rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder, begin = Path(name), time.process_time()
            sink = JSONLSink(run_of(folder, 0, args.layers))
            for first in range(1, n_rows + 1, BATCH):
                sink.write([row_of(step, args.layers) for step in range(first, min(first + BATCH, n_rows + 1))])
            per_row = (time.process_time() - begin) / n_rows
            mib = (folder / "metrics.jsonl").stat().st_size / 2**20
            print(f"{n_rows:>9,} rows, {mib:,.0f} MiB: {1e6 * per_row:.0f} us a row, made and written")
            for label in ("", " without curves.jsonl"):
                figures = in_a_process(__file__, "--layers", args.layers, "--rows", n_rows, "--measure", folder)
                for work, (seconds, mib) in figures.items():
                    print(f"    {work + label:<30} {seconds:6.2f} s  {mib:6.1f} MiB", flush=True)
                (folder / "curves.jsonl").unlink()


if __name__ == "__main__":
    sys.exit(main())
