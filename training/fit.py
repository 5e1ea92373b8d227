"""How many samples fit into memory at a time, tried; and what to do when they no longer do.

Nothing of this changes what is computed, beyond the order of sums. All ranks have the same answer.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from training import device as devices
from training.errors import UserError

if TYPE_CHECKING:
    from training.run import Run

HEADROOM = 0.9  # of the memory: the rest is for fragments and for what else is on the device
# On a CPU more tokens at a time are slower (docs/log.md), and their memory is everybody's.
CPU_TOKENS = 8192


def place(run: Run) -> str:
    """The device and the layout that a micro-batch was found for, as a checkpoint remembers it."""
    grid, parallel = run.layout.grid, run.config.parallel
    ranks = f"{grid.replicate} x {grid.shard} x {grid.expert}"
    return f"{devices.describe(run.world.device)}, {ranks}, recompute {parallel.recompute}"


def choose(run: Run, remembered: dict[str, int]) -> None:
    """Set the run's micro-batch: the one asked for, that of the checkpoint for this place, or what fits. Collective.

    Raises UserError where not one sample fits.
    """
    n_samples = run.config.batch_tokens // run.config.model.n_positions
    most = -(-n_samples // run.world.size)
    run.micro_batches = dict(remembered)
    if run.config.micro_batch != "auto":
        run.micro_batch = min(run.config.micro_batch, most)
        return
    if place(run) not in remembered:
        run.micro_batches[place(run)] = min(most, _fitting(run, most))
    run.micro_batch = run.micro_batches[place(run)]


def _fitting(run: Run, most: int) -> int:
    """The largest number of samples that fits, in as many equal parts of this rank's share as that takes."""
    limit = HEADROOM * devices.memory_bytes(run.world.device)
    with _worst(run):
        peaks = [_peak(run, n) for n in (1, 2)[:most]]
    peaks = run.world.max_int(*peaks)
    if peaks[0] > limit:
        raise UserError(_nothing_fits(run, peaks[0]))
    fits = most
    if len(peaks) > 1 and peaks[1] > peaks[0]:
        fits = min(most, 1 + int((limit - peaks[0]) // (peaks[1] - peaks[0])))
    if run.world.device.type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // run.config.model.n_positions))
    fits = -(-most // -(-most // fits))
    while fits > 2 and run.world.device.type != "cpu":  # what was foretold is seen
        with _worst(run):
            (peak,) = run.world.max_int(_peak(run, fits))
        if peak <= limit:
            break
        fits //= 2
    return fits


@contextmanager
def _worst(run: Run) -> Iterator[None]:
    """The worst that a step can ask for: all tokens go to the same experts, and the optimizer has its state."""
    biases = [buffer for name, buffer in run.model.named_buffers() if name.endswith("selection_bias")]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias.copy_(torch.arange(len(bias), 0, -1) * 1e6)
    reserved = run.optimizer.missing_state()
    yield
    del reserved
    for bias, old in zip(biases, before, strict=True):
        bias.copy_(old)


def _peak(run: Run, n_samples: int) -> int:
    """Bytes at the peak of a forward and backward of so many samples; more than there is where they do not fit."""
    from training.loop import Sums, forward_backward

    rng = np.random.default_rng(0)
    shape = (n_samples, run.config.model.n_positions)
    tokens, targets = (rng.integers(run.dataset.tokenizer.vocab_size, size=shape) for _ in range(2))
    devices.forget_peak(run.world.device)
    try:
        forward_backward(run, tokens, targets, np.arange(n_samples), targets.size, Sums())
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or run.layout.grid.collective:
            raise
        peak = sys.maxsize
    else:
        peak = devices.peak_bytes(run.world.device)
    _forget(run)
    return peak


def back_off(run: Run) -> None:
    """Memory is out, on this rank or another: half as many samples at a time, then blocks computed again.

    Raises UserError where both have been tried.
    """
    _forget(run)
    run.back_offs += 1
    if run.micro_batch > 1:
        run.micro_batch = -(-run.micro_batch // 2)
        now = f"{run.micro_batch} sample{'s' * (run.micro_batch > 1)} at a time from here"
    elif run.layout.recomputes != "full":
        run.layout.recompute("full")
        now = "activations are computed again from here (parallel.recompute: full)"
    else:
        raise UserError(f"step {run.step + 1}: {_nothing_fits(run, None)}")
    if run.config.micro_batch == "auto":
        run.micro_batches[place(run)] = run.micro_batch
    if run.world.main:
        print(f"step {run.step + 1}: out of memory; the same batch again, {now}", file=sys.stderr)


def _forget(run: Run) -> None:
    """Free what a step left behind."""
    run.layout.forget_gradients()
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()


def _nothing_fits(run: Run, needed: int | None) -> str:
    gib = devices.memory_bytes(run.world.device) / 2**30
    needs = "" if needed in (None, sys.maxsize) else f", needs {needed / 2**30:.1f} GiB"
    others = "parallel.recompute: full, " if run.layout.recomputes != "full" else ""
    return (
        f"not one sample of {run.config.model.n_positions} tokens fits into {gib:.1f} GiB{needs}; use {others}"
        "a smaller model.n_positions, parallel.mesh.shard over more processes, or a smaller model"
    )
