"""How long training stands still for a save: in the background against in the foreground, GPT-2 124M with AdamW.

python benchmarks/save.py | tee benchmarks/results/save.txt
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from training import device as devices
from training.checkpoint import Part, Saver, alone
from training.config import CheckpointConfig, ModelConfig
from training.model import GPT

SAVES = 6


def parts(model: GPT) -> dict[str, dict[str, Part]]:
    """The weights, and AdamW's two averages of each."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {f"{name}/{what}": p.clone() for name, p in weights.items() for what in ("exp_avg", "exp_avg_sq")}
    whole = {"model": weights, "optimizer": state}
    return {kind: {name: Part(t, 0, t.shape, mine=True) for name, t in some.items()} for kind, some in whole.items()}


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = devices.describe(torch.device("cpu"))
    print(f"{device}; Python {platform.python_version()}, torch {torch.__version__}; commit {commit}")
    some = parts(GPT(ModelConfig(vocab_size=50304)).init_weights(0))
    n_bytes = sum(part.n_bytes for named in some.values() for part in named.values())
    print(f"GPT-2 124M with AdamW's state: {n_bytes / 2**30:.2f} GiB, {SAVES} saves of each kind, in turn")
    folder = Path(tempfile.mkdtemp(dir="."))
    savers = {
        kind: Saver(folder / kind, alone, CheckpointConfig(background=kind == "background"))
        for kind in ("foreground", "background")
    }
    stalls: dict[str, list[float]] = {kind: [] for kind in savers}
    try:
        for step in range(SAVES):
            for kind, saver in savers.items():
                start = time.perf_counter()
                saver.save(some, {"step": step}, None)
                stalls[kind].append(time.perf_counter() - start)
                saver.wait()
    finally:
        shutil.rmtree(folder)
    for kind, seconds in stalls.items():
        later = statistics.median(seconds[1:])
        print(f"{kind:<12} stands still for {seconds[0]:6.2f} s the first time, then {later:6.3f} s (median)")
    share = [
        statistics.median(stalls["background"][n]) / statistics.median(stalls["foreground"][n])
        for n in (slice(0, 1), slice(1, None))
    ]
    print(f"background / foreground: {share[0]:.1%} the first time, then {share[1]:.1%} (bar: below 10 %)")


if __name__ == "__main__":
    main()
