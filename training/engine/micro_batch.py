"""Forward and backward of a micro-batch; its size: the largest that fits in memory, and less after an error.

The micro-batch changes results only by the order of sums. It is the same on all ranks.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from training import device as devices
from training.batch import Batch
from training.config import Config
from training.data import Tokenizer
from training.distributed.sharded_model import ShardedModel
from training.engine.state import KnownMicroBatch, TrainState
from training.errors import RestartNeeded, UserError
from training.files import read_bytes, write_atomically
from training.model.moe import MoE
from training.optim.batch_schedule import BatchSchedule
from training.optim.optimizer import Optimizer
from training.planning.memory import HEADROOM, equal_parts, max_samples_per_rank, samples_per_rank
from training.terminal import print_note

FILE = "micro_batch.json"  # in the run's folder, read at the restart after an out-of-memory error
Metrics = dict[str, Tensor]


def forward_backward(model: ShardedModel, batch: Batch, loss_scale: float) -> Metrics:
    """Add a micro-batch's gradient to the model and return its metrics.

    A rank that has run out of samples runs a dummy micro-batch with zero loss: FSDP needs every rank in every forward.
    """
    is_empty = len(batch.tokens_BT) == 0
    if is_empty:
        batch = batch.dummy()
    loss, metrics = model.model(batch.to(model.world.device))
    (loss * (0.0 if is_empty else loss_scale)).backward()
    return {name: torch.zeros_like(value) for name, value in metrics.items()} if is_empty else metrics


class MicroBatch:
    """The number of samples in one forward and backward, which `shrink` lowers.

    `known` maps a hardware key (devices, mesh, options) to the {"micro_batch", "recompute"} that fits there. It is part
    of the run's state, so that a restart does not search again. Making a MicroBatch is collective.
    """

    def __init__(self, config: Config, model: ShardedModel, state: TrainState, tokenizer: Tokenizer):
        self.config, self.model, self.state, self.tokenizer = config, model, state, tokenizer
        self.batches = BatchSchedule.of(config)
        self.max_size = max_samples_per_rank(config, model.world.size)
        self.size = 1 if config.micro_batch == "auto" else min(config.micro_batch, self.max_size)
        self.n_out_of_memory = 0  # number of errors since the start
        self.known, world, mesh = state.micro_batches, model.world, model.mesh
        names = set(world.gather(devices.device_name(world.device)))
        self.key = (
            f"{' and '.join(sorted(names))}, {mesh.replicate} x {mesh.shard} x {mesh.expert}, "
            f"micro_batch {config.micro_batch}, recompute {config.parallel.recompute}"
        )

    def choose(self, optimizer: Optimizer) -> None:
        """Set the size: this hardware's known one, the configured one, or the largest. Raises UserError. Collective."""
        world = self.model.world
        self.known |= world.broadcast(self._read_file() if world.is_main else None)
        if (known := self.known.get(self.key)) is not None:
            self.size = min(known["micro_batch"], self.max_size)
            if known["recompute"] != self.model.activation_checkpointing:
                self.model.set_activation_checkpointing(known["recompute"])
        elif self.config.micro_batch == "auto":
            self.size = self._largest_that_fits(optimizer)
            self._remember()
        devices.reset_peak_memory(world.device)  # the run's peak shall not include the trials'

    def slices(self, n_samples: int) -> list[slice]:
        """Return this rank's micro-batches of the next step.

        Collectives need equally many on every rank: the last may be empty.
        """
        n_covered = n_samples
        if self.model.mesh.has_collectives:
            n_covered = samples_per_rank(self.config, self.model.world.size, self.batches.batch_tokens(self.state.step))
        starts = range(0, n_covered, self.size)
        return [slice(min(start, n_samples), min(start + self.size, n_samples)) for start in starts]

    def shrink(self) -> None:
        """Use less memory from now on, as `_shrink` does. Raises UserError if there is nothing left to shrink."""
        self._free_memory()
        devices.release_freed_memory(self.model.world.device)
        self.n_out_of_memory += 1
        change = self._shrink()
        if self.model.world.is_main:
            print_note(f"step {self.state.step + 1}: out of memory; repeating the batch {change}")

    def shrink_and_restart(self) -> NoReturn:
        """Store a smaller micro-batch for the next start and raise RestartNeeded: other ranks may be in a collective.

        Raises UserError if there is nothing left to shrink.
        """
        change = self._shrink()
        known = self._read_file() | {self.key: self.known[self.key]}
        write_atomically(self.config.run_dir / FILE, json.dumps(known) + "\n")
        raise RestartNeeded(
            f"step {self.state.step + 1}: out of memory; the same command resumes from the latest checkpoint {change}"
        )

    @contextmanager
    def restart_on_out_of_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error that cannot be retried into `shrink_and_restart`."""
        try:
            yield
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            self.shrink_and_restart()

    def _remember(self) -> None:
        self.known[self.key] = {"micro_batch": self.size, "recompute": self.model.activation_checkpointing}

    def _read_file(self) -> dict[str, KnownMicroBatch]:
        """Return what `shrink_and_restart` of an earlier process stored; {} if the file is missing or malformed."""
        try:
            return TypeAdapter(dict[str, KnownMicroBatch]).validate_json(read_bytes(self.config.run_dir / FILE))
        except (OSError, ValidationError):
            return {}

    def _shrink(self) -> str:
        """Halve the micro-batch or, at 1, turn on activation checkpointing; return the change as text."""
        if self.size > 1:
            self.size = -(-self.size // 2)
            change = f"with micro_batch {self.size}"
        elif self.model.activation_checkpointing != "full":
            self.model.set_activation_checkpointing("full")
            change = "with parallel.recompute: full"
        else:
            raise UserError(f"step {self.state.step + 1}: {self._nothing_fits(None)}")
        self._remember()
        return change

    def _largest_that_fits(self, optimizer: Optimizer) -> int:
        """Return the micro-batch that splits a rank's samples into the fewest equal parts that fit."""
        world, max_size, device_type = self.model.world, self.max_size, self.model.world.device.type
        limit = -world.max_int(-int(HEADROOM * devices.available_memory_bytes(world.device)))[0]
        fits = max_size
        with self._worst_case(optimizer):
            peak, growth = self._peak(1)
            if peak > limit:
                raise UserError(self._nothing_fits(peak))
            if max_size > 1 and self.model.mesh.has_collectives and peak + growth > limit:
                return 1  # a second sample adds at most `growth`; out of memory in a trial would end the run
            if max_size > 1 and (slope := self._peak(2)[0] - peak) > 0:
                fits = min(max_size, 1 + (limit - peak) // slope)
        fits = equal_parts(max_size, fits, self.config, device_type)
        while fits > 2 and device_type != "cpu":  # verify the linear extrapolation by running it
            with self._worst_case(optimizer):
                if self._peak(fits)[0] <= limit:
                    break
            fits //= 2
        return fits

    @contextmanager
    def _worst_case(self, optimizer: Optimizer) -> Iterator[None]:
        """Route all tokens to the same experts and hold the memory of the future optimizer state."""
        biases = [module.selection_bias for module in self.model.model.modules() if isinstance(module, MoE)]
        saved = [bias.clone() for bias in biases]
        for bias in biases:
            bias.copy_(torch.arange(len(bias), 0, -1) * 1e6)
        reserved = optimizer.allocate_missing_state()
        try:
            yield
        finally:
            del reserved
            for bias, value in zip(biases, saved, strict=True):
                bias.copy_(value)

    def _peak(self, n_samples: int) -> tuple[int, int]:
        """Return (peak bytes, peak minus bytes at the start) of a forward and backward of random tokens.

        Both are the maximum over ranks; sys.maxsize stands for out of memory. Collective.
        """
        world = self.model.world
        self._free_memory()
        generator, shape = torch.Generator().manual_seed(0), (n_samples, self.config.model.n_positions)
        tokens_BT, targets_BT = (torch.randint(self.tokenizer.vocab_size, shape, generator=generator) for _ in range(2))
        end_of_text = self.tokenizer.end_of_text if self.config.model.isolate_documents else None
        batch = Batch(tokens_BT, targets_BT, torch.arange(n_samples), targets_BT.numel(), end_of_text)
        devices.reset_peak_memory(world.device)
        before = devices.peak_memory_bytes(world.device)
        try:
            world.set_activity("the search for a micro-batch", "collective")
            forward_backward(self.model, batch, loss_scale=1.0)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            if self.model.mesh.has_collectives:
                self.size = n_samples
                self.shrink_and_restart()
            peak = sys.maxsize
        else:
            peak = devices.peak_memory_bytes(world.device)
        world.set_activity("the start of the run", "untimed")
        self._free_memory()
        return tuple(world.max_int(peak, peak - before))

    def _free_memory(self) -> None:
        self.model.zero_grad()
        gc.collect()
        if self.model.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _nothing_fits(self, needed: int | None) -> str:
        gib = devices.available_memory_bytes(self.model.world.device) / 2**30
        needs = "" if needed in (None, sys.maxsize) else f", needs {needed / 2**30:.1f} GiB"
        recompute = "parallel.recompute: full, " if self.model.activation_checkpointing != "full" else ""
        return (
            f"not one sample of {self.config.model.n_positions} tokens fits into {gib:.1f} GiB{needs}; use {recompute}"
            "a smaller model.n_positions, parallel.mesh.shard over more processes, or a smaller model"
        )
