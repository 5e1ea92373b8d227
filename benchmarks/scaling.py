"""Compare two processes of one thread with one process of two threads: real runs of the same batch, by torchrun.

    python benchmarks/scaling.py | tee benchmarks/results/scaling.txt

The sides take turns. A run's figure is the median of its seconds per step; a side's figure is the median over its runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import step
import torch
from common import Times, against, header, line, ratio

from training import device as devices
from training.data import prepare
from training.options import cli

HERE = Path(__file__).parent.parent
BAR = 0.9
PRECISION = devices.resolve_precision("auto", torch.device("cpu"))
SIZES = {
    "quickstart's sizes": {"n_layer": 4, "n_head": 2, "n_embd": 128, "n_positions": 128, "vocab_size": 4096},
    "6 layers of 384": {"vocab_size": 50304},
}
EXPERTS = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 256, "activation": "relu2"}
KINDS = {"dense": {}, "experts": {"blocks": [{"ffn": EXPERTS}]}}
PROCESSES = {"one of two threads": (1, 2), "two of one thread": (2, 1)}


def steps_of(config: Path, folder: Path, n_processes: int, n_threads: int) -> list[float]:
    """Return the seconds of a run's steps, without the first two, which touch new memory."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    command = [sys.executable, *(launcher if n_processes > 1 else []), "-m", "training.train", "--config", str(config)]
    done = subprocess.run(
        [*command, "--resume", "never"],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": str(n_threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["step_s"] for row in rows[2:]]


def compare(sizes: dict, model: dict, args: argparse.Namespace, folder: Path) -> Times:
    """Return the seconds per step of each side in each round."""
    options = argparse.Namespace(
        **dict.fromkeys(step.SIZES) | sizes,
        samples=args.samples,
        micro_batch="auto",
        precision=PRECISION,
        device="cpu",
    )
    config = step.options(step.LLAMA | model, options, folder)
    config = config.model_copy(
        update={"steps": args.steps, "schedule": config.schedule.model_copy(update={"warmup_steps": 1})}
    )
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"every": 1})})
    prepare(config.data, quiet=True)
    (folder / "config.yaml").write_text(cli.dump_config(config))
    times: Times = {name: [] for name in PROCESSES}
    for _ in range(args.rounds):
        for name, (n_processes, n_threads) in PROCESSES.items():
            times[name].append(statistics.median(steps_of(folder / "config.yaml", folder, n_processes, n_threads)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default %(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="samples per step (default %(default)s)")
    parser.add_argument("--only", choices=SIZES, help="one of the sizes")
    parser.add_argument("--kinds", choices=KINDS, nargs="*", default=list(KINDS), help="default: both")
    args = parser.parse_args()
    print(f"{header(torch.device('cpu'))}; {PRECISION}")
    for title, sizes in SIZES.items():
        for kind in args.kinds:
            if args.only in (None, title):
                with tempfile.TemporaryDirectory() as folder:
                    times = compare(sizes, KINDS[kind], args, Path(folder))
                print(f"{title}, {kind}, {args.rounds} rounds")
                for name, seconds in times.items():
                    n_tokens = args.samples * sizes.get("n_positions", step.SIZES["n_positions"])
                    print(line(name, seconds, n_tokens))
                speed = ratio(times, *PROCESSES)
                print(f"    tokens/s of two processes over one's: {against(speed, BAR, least=True)}", flush=True)


if __name__ == "__main__":
    main()
