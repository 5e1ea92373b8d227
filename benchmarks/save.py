"""Measure how long training waits for a save, in the background and in the foreground: GPT-2 124M with AdamW.

    python benchmarks/save.py | tee benchmarks/results/save.txt

Both kinds take turns, each with preallocated buffers, which a run allocates in the background during its first steps;
the time of that allocation is printed too.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import header

from training.checkpoint import SINGLE, CheckpointWriter, TensorShard
from training.config import CheckpointConfig, ModelConfig
from training.model import GPT, init_weights

SAVES = 8
BAR = 0.1


def shards_of(model: GPT) -> dict[str, dict[str, TensorShard]]:
    """Return the weights, and AdamW's two averages of each."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {f"{name}/{key}": p.clone() for name, p in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors = {"model": weights, "optimizer": state}
    return {
        kind: {name: TensorShard(t, 0, t.shape, is_owner=True) for name, t in by_name.items()}
        for kind, by_name in tensors.items()
    }


def main() -> None:
    print(header(torch.device("cpu")))
    shards = shards_of(init_weights(GPT(ModelConfig(vocab_size=50304)), 0))
    n_bytes = sum(shard.tensor.nbytes for by_name in shards.values() for shard in by_name.values())
    print(f"GPT-2 124M with AdamW's state: {n_bytes / 2**30:.2f} GiB, {SAVES} saves of each kind, in turn")
    folder = Path(tempfile.mkdtemp(dir="."))
    writers = {
        kind: CheckpointWriter(folder / kind, SINGLE, CheckpointConfig(background=kind == "background"))
        for kind in ("foreground", "background")
    }
    stalls: dict[str, list[float]] = {kind: [] for kind in writers}
    try:
        for writer in writers.values():
            start = time.perf_counter()
            writer.preallocate(shards)
            writer.wait()
            allocation = time.perf_counter() - start
        for step in range(SAVES):
            for kind, writer in writers.items():
                start = time.perf_counter()
                writer.save(shards, {"step": step}, None)
                stalls[kind].append(time.perf_counter() - start)
                writer.wait()
    finally:
        shutil.rmtree(folder)
    print(f"allocation of the copy's buffers: {allocation:.2f} s, in the background")
    for kind, (first, *later) in stalls.items():
        median, spread = statistics.median(later), f"{min(later):.2f} to {max(later):.2f}"
        print(f"{kind:<11} waits {first:5.2f} s the first time, then {median:5.2f} s ({spread})")
    shares = [ours / blocking for ours, blocking in zip(stalls["background"], stalls["foreground"], strict=True)]
    first, later = shares[0], statistics.median(shares[1:])
    met = "met" if max(first, later) < BAR else "MISSED"
    print(f"background / foreground: {first:.1%} the first time, then {later:.1%} (median); bar {BAR:.0%} {met}")


if __name__ == "__main__":
    main()
