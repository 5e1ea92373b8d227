"""Compare the memory estimate of `training.plan` with real runs on a CPU.

    python benchmarks/plan_memory.py | tee benchmarks/results/plan_memory.txt

Each run is a process of its own: two steps with a checkpoint after each, an evaluation and the final model. Its memory
is the peak resident size (ru_maxrss). The bar: an estimate within 15 % of it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from training.config import Config
from training.options import cli
from training.planning import memory

BAR = 0.15
SIZES = {"n_layer": 12, "n_head": 8, "n_embd": 512, "n_positions": 512, "vocab_size": 8192}
MOE = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 1024}
# By name: changes of the model, and of the other options.
CASES = {
    "dense": ({}, {"batch_tokens": 2048}),
    "dense, accumulating": ({}, {"batch_tokens": 2048, "micro_batch": 2}),
    "large vocabulary": ({"n_layer": 4, "vocab_size": 65536}, {"micro_batch": 2, "batch_tokens": 2048}),
    "experts": ({"n_layer": 6, "blocks": [{"ffn": MOE}]}, {"batch_tokens": 2048}),
    "Muon": ({"n_layer": 6, "n_embd": 768}, {"batch_tokens": 2048, "optim": {"type": "muon"}}),
    "long context": (
        {"n_layer": 8, "n_embd": 256, "n_head": 4, "n_positions": 4096, "position": "rope"},
        {"micro_batch": 1, "batch_tokens": 4096},
    ),
    "packed documents": (
        {"n_layer": 8, "n_head": 4, "n_embd": 256, "n_positions": 2048, "isolate_documents": True, "norm": "rmsnorm"},
        {"micro_batch": 2, "batch_tokens": 4096},
    ),
    "recompute selective": ({}, {"batch_tokens": 2048, "parallel": {"recompute": "selective"}}),
    "recompute full": ({}, {"micro_batch": 6, "batch_tokens": 3072, "parallel": {"recompute": "full"}}),
}


def config_of(name: str, folder: Path) -> Config:
    """Return the run of a case, which writes only to `folder`."""
    model, others = CASES[name]
    options = {
        "name": "run",
        "out_dir": str(folder / "runs"),
        "steps": 2,
        "micro_batch": 4,
        "precision": "fp32",
        "model": SIZES | model,
        "data": {
            "sources": [{"type": "stdlib"}],
            "tokenizer": {"type": "byte"},
            "cache_dir": str(folder / "cache"),
        },
        "schedule": {"type": "constant", "warmup_steps": 1},
        "eval": {"every": None, "tokens": 4096, "prompts": ["def "], "sample_tokens": 4},
        "checkpoint": {"every": 1, "keep": 1},
    }
    return Config.model_validate(options | others)


def measured(config: Config, folder: Path) -> int:
    """Train in a process; return its peak resident bytes."""
    path = folder / "config.yaml"
    path.write_text(cli.dump_config(config))
    command = [sys.executable, "-m", "training.train", "--config", str(path), "--resume", "never"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((folder / "log.txt").read_text())
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print a line per case, and the largest error beside the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="one case; may be given several times")
    worst = 0.0
    print(f"{'GiB at the peak':<26}{'measured':>9}{'estimate':>9}{'':>8}  of which", flush=True)
    for name in parser.parse_args().only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(name, Path(folder))
            n_bytes, estimate = measured(config, Path(folder)), memory.estimate(config, config.micro_batch)
        error = estimate.total / n_bytes - 1
        worst = max(worst, abs(error))
        largest = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in estimate.parts().items() if size >= 2**24)
        print(f"{name:<26}{n_bytes / 2**30:>9.2f}{estimate.total / 2**30:>9.2f}{error:>+8.1%}  {largest}", flush=True)
    print(f"the largest error is {worst:.1%}; the bar is {BAR:.0%}")


if __name__ == "__main__":
    main()
