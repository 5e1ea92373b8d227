"""Compare the memory estimate of `training.plan` with real runs on a CPU, on one and on two threads.

    make bench-plan_memory

Each run is a process of its own: three steps with a checkpoint after each, an evaluation and the final model. Its
memory is the peak resident size (ru_maxrss). The exit status is 1 if an estimate misses the bar.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import header

from training.config import Config
from training.options import cli
from training.planning.memory import MemoryEstimator

BAR, MAX_SHORT = 0.10, 0.05  # an estimate may be this much above the measurement, and this much below
SIZES = {"n_layer": 12, "n_head": 6, "n_embd": 384, "n_positions": 512, "vocab_size": 8192}
MOE = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 768}
GATED_MOE = MOE | {"hidden": 512, "activation": "silu", "gated": True, "n_shared": 1}
# By name: changes of the model, and of the other options.
CASES = {
    "dense": ({}, {"batch_tokens": 2048}),
    "accumulating, bf16": (
        {"n_embd": 256, "n_head": 4, "vocab_size": 32768},
        {"batch_tokens": 1024, "micro_batch": 1, "precision": "bf16"},
    ),
    "large vocabulary, Lion": (
        {"n_layer": 2, "vocab_size": 65536},
        {"micro_batch": 1, "batch_tokens": 1024, "optim": {"type": "lion"}},
    ),
    "experts": ({"n_layer": 6, "blocks": [{"ffn": MOE}]}, {"batch_tokens": 2048}),
    "Muon": ({"n_layer": 5, "n_embd": 640, "n_head": 10}, {"batch_tokens": 2048, "optim": {"type": "muon"}}),
    "latent attention": (
        {"n_layer": 6, "n_positions": 2048, "position": "rope", "blocks": [{"mixer": {"type": "latent"}}]},
        {"micro_batch": 1, "batch_tokens": 2048},
    ),
    "packed documents": (
        {"n_embd": 256, "n_head": 4, "n_layer": 8, "n_positions": 2048, "isolate_documents": True, "norm": "rmsnorm"}
        | {"position": "rope", "blocks": [{"mixer": {"window": 256, "n_kv_head": 2}}, {}]},
        {"micro_batch": 2, "batch_tokens": 4096},
    ),
    "selective recompute": (
        {"n_layer": 8, "blocks": [{"ffn": {"type": "mlp"}}, {"ffn": GATED_MOE}]},
        {"batch_tokens": 2048, "parallel": {"recompute": "selective"}},
    ),
    "full recompute, Muon": (
        {},
        {"micro_batch": 6, "batch_tokens": 3072, "optim": {"type": "muon"}, "parallel": {"recompute": "full"}},
    ),
}


def config_of(name: str, folder: Path) -> Config:
    """Return the run of a case, which writes only to `folder`."""
    model, others = CASES[name]
    options = {
        "name": "run",
        "out_dir": str(folder / "runs"),
        "steps": 3,
        "micro_batch": 4,
        "precision": "fp32",
        "model": SIZES | model,
        "data": {
            "sources": [{"type": "stdlib"}],
            "tokenizer": {"type": "byte"},
            "cache_dir": str(folder / "cache"),
        },
        "schedule": {"type": "constant", "warmup_steps": 1},
        "eval": {"every": None, "tokens": 1024, "prompts": ["def "], "sample_tokens": 4},
        "checkpoint": {"every": 1, "keep": 1},
    }
    return Config.model_validate(options | others).resolved()


def measured(config: Config, folder: Path, n_threads: int) -> int:
    """Train in a process; return its peak resident bytes."""
    path = folder / "config.yaml"
    path.write_text(cli.dump_config(config))
    command = [sys.executable, "-m", "training.train", "--config", str(path), "--resume", "never"]
    with (folder / "log.txt").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(n_threads)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((folder / "log.txt").read_text())
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    """Print a line per case and the range of errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="one case; may be given several times")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    args = parser.parse_args()
    print(header(torch.device("cpu")))
    print(f"{'GiB at the peak':<26}{'threads':>8}{'measured':>10}{'estimate':>10}{'error':>8}", flush=True)
    errors = []
    for name in args.only or CASES:
        for n_threads in args.threads:
            with tempfile.TemporaryDirectory() as folder:
                config = config_of(name, Path(folder))
                n_bytes = measured(config, Path(folder), n_threads)
            estimate = MemoryEstimator(config).estimate(config.micro_batch).total
            errors.append(estimate / n_bytes - 1)
            figures = f"{n_bytes / 2**30:>10.2f}{estimate / 2**30:>10.2f}{errors[-1]:>+8.1%}"
            print(f"{name:<26}{n_threads:>8}{figures}", flush=True)
    print(f"errors: {min(errors):+.1%} to {max(errors):+.1%}; the bar is -{MAX_SHORT:.0%} to +{BAR:.0%}")
    return 0 if min(errors) >= -MAX_SHORT and max(errors) <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
