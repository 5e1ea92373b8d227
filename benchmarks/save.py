"""How long training stands still for a save: in the background against in the foreground, GPT-2 124M with AdamW.

    python benchmarks/save.py | tee benchmarks/results/save.txt

Large pages as training.train asks for. Both kinds take turns, each with its memory prepared, which a run does beside
its first steps; how long that would keep the first save is told too.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import header

from training.checkpoint import SINGLE, CheckpointWriter, TensorShard
from training.config import CheckpointConfig, ModelConfig
from training.model import GPT

SAVES = 8
BAR = 0.1


def parts(model: GPT) -> dict[str, dict[str, TensorShard]]:
    """The weights, and AdamW's two averages of each."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {f"{name}/{what}": p.clone() for name, p in weights.items() for what in ("exp_avg", "exp_avg_sq")}
    whole = {"model": weights, "optimizer": state}
    return {
        kind: {name: TensorShard(t, 0, t.shape, is_owner=True) for name, t in some.items()}
        for kind, some in whole.items()
    }


def main() -> None:
    print(header(torch.device("cpu")))
    some = parts(GPT(ModelConfig(vocab_size=50304)).init_weights(0))
    n_bytes = sum(part.n_bytes for named in some.values() for part in named.values())
    print(f"GPT-2 124M with AdamW's state: {n_bytes / 2**30:.2f} GiB, {SAVES} saves of each kind, in turn")
    folder = Path(tempfile.mkdtemp(dir="."))
    savers = {
        kind: CheckpointWriter(folder / kind, SINGLE, CheckpointConfig(background=kind == "background"))
        for kind in ("foreground", "background")
    }
    stalls: dict[str, list[float]] = {kind: [] for kind in savers}
    try:
        for saver in savers.values():
            start = time.perf_counter()
            saver.preallocate(some)
            saver.close()
            prepared = time.perf_counter() - start
        for step in range(SAVES):
            for kind, saver in savers.items():
                start = time.perf_counter()
                saver.save(some, {"step": step}, None)
                stalls[kind].append(time.perf_counter() - start)
                saver.wait()
    finally:
        shutil.rmtree(folder)
    print(f"memory for the copy: {prepared:.2f} s, beside the loop")
    for kind, (first, *later) in stalls.items():
        median, spread = statistics.median(later), f"{min(later):.2f} to {max(later):.2f}"
        print(f"{kind:<11} stands still for {first:5.2f} s the first time, then {median:5.2f} s ({spread})")
    shares = [ours / blocking for ours, blocking in zip(stalls["background"], stalls["foreground"], strict=True)]
    first, later = shares[0], statistics.median(shares[1:])
    met = "met" if max(first, later) < BAR else "MISSED"
    print(f"background / foreground: {first:.1%} the first time, then {later:.1%} (median); bar {BAR:.0%} {met}")


if __name__ == "__main__":
    main()
