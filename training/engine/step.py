"""What the loop does with a run: a step, an evaluation, samples.

A step waits for the device once, before it learns from what may not be finite; metrics stay there until a row is due.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from training import device as devices
from training.config import EvalConfig
from training.data import Tokenizer
from training.data.loader import Samples
from training.distributed.world import World
from training.engine import micro_batch as fit
from training.engine.build import Run, save
from training.engine.guard import MOST
from training.errors import UserError
from training.kernels.attention.table import find_documents
from training.logging.jsonl import nan_to_null
from training.logging.report import update_report
from training.model import GPT
from training.model.continuation import continue_texts, encode_prompt
from training.model.sampling import SamplingParams
from training.optim.optimizer import lr_factor
from training.planning.batch_split import max_samples_per_rank

# SIGUSR1 is what schedulers send before a job's time is over.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
AGAIN_S = 1.0  # a terminal and a launcher both pass a signal on; one that comes later ends the process at once


@dataclass(frozen=True)
class Due:
    """What follows a step. The same on all ranks."""

    log: bool
    evaluate: bool
    save: bool
    signal: int  # the number of the signal that ends the run, or 0


class Watch:
    """Signals and the clock: what can interrupt the loop, asked once a step."""

    def __init__(self, run: Run):
        self.run, self.signal, self.since, self.saved_at = run, 0, 0.0, time.monotonic()
        ours = threading.current_thread() is threading.main_thread()  # Ray Train's is another: it stops a run itself
        self.before = {number: signal.signal(number, self._receive) for number in (STOPS if ours else ())}

    def close(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def due(self) -> Due:
        """What is due after the step just done. Raises UserError where a save has failed meanwhile. Collective."""
        config, step, world = self.run.config, self.run.step, self.run.world
        minutes, last = config.checkpoint.every_minutes, step == config.steps
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        self.run.timer.enter("communication")
        received, late, lost = world.max_int(self.signal, late, self.run.saver.failure is not None)
        self.run.timer.enter("idle")
        if lost:
            self.run.saver.wait()  # raises it, on all ranks
        # Of steps that are not finite nothing is saved: what they follow may be why, and would push out what is good.
        well = self.run.skips.in_a_row == 0
        save = last or received > 0 or (well and (late > 0 or _every(config.checkpoint.every, step)))
        if save:
            self.saved_at = time.monotonic()
        evaluate = last or _every(config.eval.every, step)
        log = save or evaluate or self.run.skips.in_a_row >= MOST or _every(config.logging.every, step)
        return Due(log, evaluate, save, received)


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.numpy()[...] = array  # `copy_` would wake all threads, which takes milliseconds
    return pinned.to(device, non_blocking=True)


def model_inputs(model: GPT, tokens_BT: np.ndarray, targets_BT: np.ndarray, end_of_text: int) -> dict[str, object]:
    """What `model` is called with, on its device."""
    device = model.wte.weight.device
    inputs: dict[str, object] = {
        "tokens_BT": to_device(tokens_BT, device),
        "targets_BT": to_device(targets_BT, device),
    }
    if model.config.isolate_documents:  # found here: on the device, counting them would be waited for
        inputs["documents"] = find_documents(torch.from_numpy(tokens_BT), end_of_text).to(device)
    return inputs


class Sums(dict):
    """Summed metrics of micro-batches."""

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self[name] = self[name] + value if name in self else value


def train_step(run: Run) -> None:
    """One update from the global batch; its metrics go to `run.metrics`.

    The gradient is that of the sum of losses over all targets of the global batch divided by their
    number, however the batch is cut into ranks and micro-batches. Where memory does not suffice, the same batch is
    begun again in smaller ones. Collective.
    """
    world = run.world
    world.set_activity(f"step {run.step + 1}", "collective")
    tokens_BT, targets_BT, key_B = run.ahead.pop(run.step, None) or batch(run, run.step)
    run.timer.enter("communication")
    n_targets = world.sum_int(int((targets_BT >= 0).sum()))
    while (totals := gradients(run, tokens_BT, targets_BT, key_B, n_targets)) is None:
        fit.back_off(run)
    if run.step + 1 < run.config.steps:
        with suppress(UserError, OSError):  # which the next step is told of
            run.ahead[run.step + 1] = batch(run, run.step + 1)  # while a GPU still computes
        run.timer.enter("communication")
    run.layout.sum_gradients(totals.values())
    run.timer.enter("optimizer")
    grad_norm = run.layout.grad_norm() / (1.0 if run.loss_scale is None else run.loss_scale.scale)
    taken = takes(run, totals["loss_sum"] / n_targets, grad_norm)
    if taken:
        update(run, grad_norm)
    run.layout.zero_grad()
    totals = run.model.finish_step(totals, taken)
    run.metrics.add(run.step + 1, totals | {"grad_norm": grad_norm}, n_targets, run.skips.total)
    run.step += 1
    run.timer.finish_startup()
    run.timer.enter("idle")


def batch(run: Run, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This rank's part of a step's global batch: tokens and targets (B, T), and the samples' keys (B,)."""
    run.timer.enter("data")
    n_samples = run.config.batch_tokens // run.config.model.n_positions
    mine = run.world.local_range(n_samples)
    indices = step * n_samples + np.arange(mine.start, mine.stop)
    return *run.batches.at(indices), run.batches.random_keys(indices)


def gradients(
    run: Run, tokens_BT: np.ndarray, targets_BT: np.ndarray, key_B: np.ndarray, n_targets: int
) -> Sums | None:
    """Leave this rank's part of the gradient in the model; its summed metrics, or None where memory is out on a rank.

    Raises RestartNeeded for that where other ranks are in the middle of a forward that needs this one. Collective.
    """
    sums, out_of_memory = Sums(), False
    run.timer.enter("compute")
    try:
        cut = pieces(run, len(tokens_BT))
        for number, rows in enumerate(cut, start=1):
            run.layout.set_last_micro_batch(number == len(cut))
            forward_backward(run, tokens_BT[rows], targets_BT[rows], key_B[rows], n_targets, sums)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        if run.layout.mesh.has_collectives:
            fit.end(run)
        out_of_memory = True
    run.timer.enter("communication")
    return None if any(run.world.max_int(out_of_memory)) else sums


def pieces(run: Run, n_mine: int) -> list[slice]:
    """This rank's samples cut into micro-batches; where all ranks must make equally many, maybe an empty one more."""
    n_most = max_samples_per_rank(run.config, run.world.size) if run.layout.mesh.has_collectives else n_mine
    cuts = range(0, n_most, run.micro_batch)
    return [slice(min(first, n_mine), min(first + run.micro_batch, n_mine)) for first in cuts]


def forward_backward(
    run: Run, tokens_BT: np.ndarray, targets_BT: np.ndarray, key_B: np.ndarray, n_targets: int, sums: Sums
) -> None:
    """Add a micro-batch's gradient to the model's, and its metrics to the sums.

    One without samples computes something, as other ranks wait for this one, and adds nothing.
    """
    run.world.set_activity(f"step {run.step + 1}", "collective")  # a micro-batch is a sign of life
    empty = len(tokens_BT) == 0
    if empty:
        tokens_BT, targets_BT = np.zeros((2, 1, run.config.model.n_positions), np.int64)
        key_B = np.zeros(1, np.int64)
    inputs = model_inputs(run.model, tokens_BT, targets_BT, run.dataset.tokenizer.end_of_text)
    loss, metrics = run.model(**inputs, n_targets=n_targets, key_B=to_device(key_B, run.world.device))
    scale = 1.0 if run.loss_scale is None else run.loss_scale.scale
    (loss * (0.0 if empty else scale)).backward()
    sums.add({name: torch.zeros_like(value) for name, value in metrics.items()} if empty else metrics)


def takes(run: Run, loss: Tensor, grad_norm: Tensor) -> bool:
    """Whether the step is taken: never where its loss or gradient is not finite. Waits for the device. Collective.

    In fp16 an overflow at first only lowers the loss scale.
    """
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if (scale := run.loss_scale) is not None:
        lowered = not finite and scale.scale > 1
        scale.update(finite)
        if lowered:
            return False
    why = run.skips.why(loss, grad_norm)
    if why and run.world.is_main:
        print(f"step {run.step + 1}: {why}; skipped, nothing is learned from it", file=sys.stderr)
    return not any(run.world.max_int(why is not None))


@torch.no_grad()
def update(run: Run, grad_norm: Tensor) -> None:
    """Clip the summed gradient, whose norm that is, and update the weights."""
    factor = torch.ones_like(grad_norm)
    if run.loss_scale is not None:
        factor = factor / run.loss_scale.scale
    if run.config.optim.grad_clip is not None:
        factor = factor * (run.config.optim.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for _, p in run.layout.local_parameters() if p.grad is not None], factor)
    run.optimizer.step(lr_factor(run.config.schedule, run.step, run.config.steps))


def record(run: Run, due: Due) -> None:
    """Write the rows of the steps since the last time; evaluate and save if that is due. Collective.

    Raises UserError where too many steps in a row were not finite, or the validation loss is not: nothing is saved.
    """
    run.metrics.fetch()
    rows = run.metrics.rows
    if run.skips.in_a_row >= MOST:
        refuse(run, f"the last {MOST} steps' losses or gradients were not finite")
    improved = False
    if due.evaluate:
        run.timer.enter("evaluation")
        val_tokens, tokenizer = run.config.eval.tokens, run.dataset.tokenizer
        found = evaluate(run.model, run.val_batches, tokenizer, val_tokens, run.micro_batch, run.world)
        run.layout.reshard()
        rows[-1] |= found
        if not math.isfinite(found["val_loss"]):
            refuse(run, f"val_loss is {found['val_loss']}")
        best = run.best is None or found["val_loss"] < run.best["val_loss"]
        improved = best and (due.save or run.skips.in_a_row == 0)  # else it is not saved
        if improved:
            run.best = {"step": run.step, "val_loss": found["val_loss"]}
    run.last_row = nan_to_null(rows[-1])
    if due.evaluate and run.config.eval.prompts and (run.world.is_main or run.layout.mesh.has_collectives):
        made = (run.model, run.dataset.tokenizer, run.config.eval)
        sync_tokens = run.world.broadcast_tensor if run.layout.mesh.has_collectives else None
        texts = samples(*made, seed=(run.config.seed, run.step), sync_tokens=sync_tokens)
        run.layout.reshard()
        rows[-1] = rows[-1] | {"samples": texts}
    run.timer.enter("idle")
    run.metrics.write()
    if due.evaluate and run.world.is_main:
        update_report(run.folder)
    if due.save or (improved and run.config.checkpoint.keep_best):
        run.timer.enter("checkpoint")
        save(run)
        run.timer.enter("idle")
    run.metrics.start_clock()


def refuse(run: Run, why: str) -> NoReturn:
    """Raise UserError, with the rows that led there written."""
    run.metrics.write()
    raise UserError(
        f"step {run.step}: {why}, and nothing more is saved; lower the learning rate and start over with --resume "
        f"never, or with another --name that begins with --resume {run.folder / 'checkpoints'}/step-N"
    )


@torch.no_grad()
def evaluate(
    model: GPT, batches: Samples, tokenizer: Tokenizer, n_tokens: int | None, micro_batch: int, world: World
) -> dict[str, float]:
    """Cross-entropy alone over a fixed set: the same windows, spread evenly, whatever ranks and micro-batches.

    "val_loss" in nats a token, "val_perplexity", "val_bits_per_byte" of the text that the targets spell.
    """
    config = model.config
    n_windows = batches.n_samples
    if n_tokens is not None:
        n_windows = min(n_windows, max(1, n_tokens // config.n_positions))
    windows = np.arange(n_windows) * batches.n_samples // n_windows
    loss_sums, n_targets, n_bytes = [], 0, 0
    mine = world.local_range(n_windows)
    n_most = -(-n_windows // world.size)  # all ranks make equally many forwards: a model may lie on all of them
    for first in range(0, n_most, micro_batch):
        windows_here = windows[mine.start + first : min(mine.start + first + micro_batch, mine.stop)]
        tokens_BT, targets_BT = batches.at(windows_here if len(windows_here) else windows[:1])
        if len(windows_here) == 0:
            targets_BT[:] = -1
        _, metrics = model(**model_inputs(model, tokens_BT, targets_BT, tokenizer.end_of_text), n_targets=1)
        loss_sums.append(metrics["loss_sum"])
        n_targets += int((targets_BT >= 0).sum())
        n_bytes += int(tokenizer.token_bytes[targets_BT[targets_BT >= 0]].sum())
    loss_sum = torch.stack(loss_sums).cpu().double().sum() if loss_sums else 0.0
    sums = torch.tensor([loss_sum, n_targets, n_bytes], dtype=torch.float64)
    world.all_reduce_([sums])
    nats, n_targets, n_bytes = sums.tolist()
    loss = nats / n_targets
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": nats / math.log(2) / n_bytes,
    }


def samples(
    model: GPT,
    tokenizer: Tokenizer,
    config: EvalConfig,
    seed: tuple[int, int],
    sync_tokens: Callable[[Tensor], Tensor] | None = None,
) -> list[dict[str, str]]:
    """A continuation of every prompt; each the same for the same weights and seed, whatever the other prompts are.

    `sync_tokens` as in `model/sampling.py`.
    """
    texts = continue_texts(
        model,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in config.prompts],
        config.sample_tokens,
        seeds=[seed] * len(config.prompts),
        params=SamplingParams(config.temperature, config.top_k),
        sync_tokens=sync_tokens,
    )
    return [{"prompt": prompt, "text": text.text} for prompt, text in zip(config.prompts, texts, strict=True)]
