"""How many samples fit into memory at a time, tried; and what to do when they no longer do.

Nothing of this changes what is computed, beyond the order of sums. All ranks have the same answer.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from training import device as devices
from training.errors import RestartNeeded, UserError
from training.files import write_atomically
from training.planning.batch_split import HEADROOM, equal_parts, max_samples_per_rank

if TYPE_CHECKING:
    from training.engine.build import Run

KEPT = "micro_batch.json"  # in the run's folder


def place(run: Run) -> str:
    """The devices and options that a micro-batch was found for, as it is remembered. Collective."""
    grid, config = run.layout.mesh, run.config
    names = {name.decode() for name in run.world.gather_bytes(devices.device_name(run.world.device).encode())}
    ranks = f"{grid.replicate} x {grid.shard} x {grid.expert}"
    asked = f"micro_batch {config.micro_batch}, recompute {config.parallel.recompute}"
    return f"{' and '.join(sorted(names))}, {ranks}, {asked}"


def choose(run: Run, remembered: dict[str, dict]) -> None:
    """Set the run's micro-batch: the one asked for, that remembered for this place, or what fits. Collective.

    What was remembered is also whether blocks are computed again. Raises UserError where not one sample fits.
    """
    most = max_samples_per_rank(run.config, run.world.size)
    run.place = place(run)
    run.fits = run.world.broadcast(run.world.is_main and remembered | _kept(run))
    if known := run.fits.get(run.place):
        run.micro_batch = known["micro_batch"]
        if known["recompute"] != run.layout.activation_checkpointing:
            run.layout.set_activation_checkpointing(known["recompute"])
    elif run.config.micro_batch == "auto":
        run.micro_batch = _fitting(run, most)
        _remember(run)
    else:
        run.micro_batch = min(run.config.micro_batch, most)
    devices.reset_peak_memory(run.world.device)  # that of the trials is not the run's


def _remember(run: Run) -> None:
    run.fits[run.place] = {"micro_batch": run.micro_batch, "recompute": run.layout.activation_checkpointing}


def _kept(run: Run) -> dict[str, dict]:
    """What was remembered by a rank that ended."""
    try:
        kept = json.loads((run.folder / KEPT).read_bytes())
        return {place: {name: known[name] for name in ("micro_batch", "recompute")} for place, known in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or torn: found anew
        return {}


def _fitting(run: Run, most: int) -> int:
    """The largest number of samples that fits, in as many equal parts of the largest share as that takes."""
    limit = -run.world.max_int(-int(HEADROOM * devices.available_memory_bytes(run.world.device)))[0]
    fits = most
    with _worst(run):
        one, grown = _peak(run, 1)
        if one > limit:
            raise UserError(_nothing_fits(run, one))
        if most > 1 and run.layout.mesh.has_collectives and one + grown > limit:
            return 1  # a second sample takes no more than the first; but where it fails, the run ends
        if most > 1 and (more := _peak(run, 2)[0] - one) > 0:
            fits = min(most, 1 + (limit - one) // more)
    fits = equal_parts(most, fits, run.config, run.world.device.type)
    while fits > 2 and run.world.device.type != "cpu":  # what was foretold is seen
        with _worst(run):
            if _peak(run, fits)[0] <= limit:
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
    reserved = run.optimizer.allocate_missing_state()
    try:
        yield
    finally:
        del reserved
        for bias, old in zip(biases, before, strict=True):
            bias.copy_(old)


def _peak(run: Run, n_samples: int) -> tuple[int, int]:
    """Bytes at the peak of a forward and backward of so many samples, and how many of them that took; the most that a
    rank has. More than there is where they do not fit. Collective."""
    from training.engine.step import Sums, forward_backward

    _forget(run)

    rng = np.random.default_rng(0)
    shape = (n_samples, run.config.model.n_positions)
    tokens, targets = (rng.integers(run.dataset.tokenizer.vocab_size, size=shape) for _ in range(2))
    devices.reset_peak_memory(run.world.device)
    before = devices.peak_memory_bytes(run.world.device)
    try:
        forward_backward(run, tokens, targets, np.arange(n_samples), targets.size, Sums())
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        if run.layout.mesh.has_collectives:
            run.micro_batch = n_samples
            end(run)
        peak = sys.maxsize
    else:
        peak = devices.peak_memory_bytes(run.world.device)
    _forget(run)
    return tuple(run.world.max_int(peak, peak - before))


def back_off(run: Run) -> None:
    """Memory is out, on this rank or another: half as many samples at a time, then blocks computed again.

    Raises UserError where both have been tried.
    """
    _forget(run)
    devices.release_freed_memory(run.world.device)
    run.back_offs += 1
    now = _lower(run)
    if run.world.is_main:
        print(f"step {run.step + 1}: out of memory; the same batch again, {now} from here", file=sys.stderr)


def end(run: Run) -> NoReturn:
    """Memory is out on this rank, and others may be in the middle of what needs it. Raises RestartNeeded.

    The next start knows: what it is to do is kept beside the checkpoints. Raises UserError where there is nothing.
    """
    now = _lower(run)
    write_atomically(run.folder / KEPT, json.dumps(_kept(run) | {run.place: run.fits[run.place]}) + "\n")
    raise RestartNeeded(
        f"step {run.step + 1}: out of memory; the same command goes on from the newest checkpoint, {now}"
    )


@contextmanager
def told_in_a_line(run: Run) -> Iterator[None]:
    """Where memory is out in something that cannot be begun again, `end` the run."""
    try:
        yield
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        end(run)


def _lower(run: Run) -> str:
    """Take less memory from here on; in words, how. Raises UserError where there is no way left."""
    if run.micro_batch > 1:
        run.micro_batch = -(-run.micro_batch // 2)
        now = f"{run.micro_batch} sample{'s' * (run.micro_batch > 1)} at a time"
    elif run.layout.activation_checkpointing != "full":
        run.layout.set_activation_checkpointing("full")
        now = "with parallel.recompute: full"
    else:
        raise UserError(f"step {run.step + 1}: {_nothing_fits(run, None)}")
    _remember(run)
    return now


def _forget(run: Run) -> None:
    """Free what a step left behind."""
    run.layout.zero_grad()
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()


def _nothing_fits(run: Run, needed: int | None) -> str:
    gib = devices.available_memory_bytes(run.world.device) / 2**30
    needs = "" if needed in (None, sys.maxsize) else f", needs {needed / 2**30:.1f} GiB"
    others = "parallel.recompute: full, " if run.layout.activation_checkpointing != "full" else ""
    return (
        f"not one sample of {run.config.model.n_positions} tokens fits into {gib:.1f} GiB{needs}; use {others}"
        "a smaller model.n_positions, parallel.mesh.shard over more processes, or a smaller model"
    )
