"""One optimizer step from the global batch.

A step waits for the device once, before the update: a NaN or infinite gradient must not reach the weights. Metrics
stay on the device until they are logged.
"""

import math

import torch
from torch import Tensor

from training import device as devices
from training.batch import Batch
from training.distributed.sharded_model import ShardedModel
from training.engine.build import Setup
from training.engine.inspection import Inspection, residual_rms
from training.engine.loop import Phases
from training.engine.micro_batch import Metrics, forward_backward
from training.optim.schedule import lr_factor
from training.terminal import print_note


def train_step(setup: Setup, phase: Phases) -> tuple[Metrics, int]:
    """Update the weights once; return the global batch's metric sums, on the device, and its n_targets. Collective.

    The gradient is that of the summed loss / number of targets of the global batch, however ranks and micro-batches
    split it. After an out-of-memory error the same batch runs again in smaller micro-batches.
    """
    config, model, loader, state = setup.config, setup.model, setup.loader, setup.state
    world, activity = model.world, f"step {state.step + 1}"
    loss_scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    world.set_activity(activity, "collective")
    with phase("data"):
        batch = loader.at(state.step)
    with phase("communication"):
        batch = batch._replace(n_targets=world.sum_int(batch.n_local_targets))

    is_inspected = (state.step + 1) % config.logging.histogram_every == 0
    model.model.measures_residual = is_inspected
    sums = None
    while sums is None:
        with phase("compute"):
            sums = accumulate_gradients(setup, batch, loss_scale, activity)
        with phase("communication"):
            (out_of_memory,) = world.max_int(sums is None)
        if out_of_memory:
            sums = None
            setup.micro_batch.shrink()
    if state.step + 1 < config.steps:
        with phase("data"):
            loader.prefetch(state.step + 1)  # while a GPU still computes
    with phase("communication"):
        model.sum_gradients(sums.values())

    with phase("optimizer"):
        grad_norm = model.grad_norm() / loss_scale
        inspection = Inspection(model, loss_scale) if is_inspected else None
        updated = should_update(setup, sums["loss_sum"] / batch.n_targets, grad_norm)
        if updated:
            clip_gradients(model, grad_norm, config.optim.grad_clip, loss_scale)
            is_averaged = state.step >= config.schedule.warmup_steps
            setup.optimizer.step(lr_factor(config.schedule, state.step, config.steps), is_averaged=is_averaged)
        model.zero_grad()
        model.model.measures_residual = False  # evaluations do not
        square_L = sums.pop("residual_square", None)
        metrics = model.model.finish_step(sums, updated) | {"grad_norm": grad_norm}
        if inspection is not None:
            metrics |= inspection.figures() | residual_rms(
                square_L, loader.batches.batch_tokens(state.step) * config.model.n_embd
            )
    state.step += 1
    return metrics, batch.n_targets


def accumulate_gradients(setup: Setup, batch: Batch, loss_scale: float, activity: str) -> Metrics | None:
    """Add this rank's part of the gradient to the model and return its summed metrics, None if out of memory.

    `batch` is this rank's part of the global batch. With collectives in the model, an out-of-memory error is raised.
    """
    model, sums = setup.model, {}
    try:
        slices = setup.micro_batch.slices(len(batch.tokens_BT))
        for number, rows in enumerate(slices, start=1):
            model.set_last_micro_batch(number == len(slices))
            model.world.set_activity(activity, "collective")  # heartbeat for the hang monitor
            for name, value in forward_backward(model, batch.rows(rows), loss_scale).items():
                sums[name] = sums[name] + value if name in sums else value
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or model.mesh.has_collectives:
            raise  # other ranks may be inside a collective: `restart_on_out_of_memory` ends the run
        return None
    return sums


def should_update(setup: Setup, loss: Tensor, grad_norm: Tensor) -> bool:
    """Return True if every rank should apply this update; False if loss or gradient norm is not finite or spikes.

    In fp16 an overflow lowers the loss scale and does not count as skipped until the scale is 1. Synchronizes with the
    device. Collective.
    """
    state, world = setup.state, setup.model.world
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if (loss_scale := state.loss_scale) is not None:
        is_overflow = not is_finite and loss_scale.scale > 1
        loss_scale.update(is_finite)
        if is_overflow:
            return False
    reason = state.guard.reason_to_skip(loss, grad_norm, setup.config.skip_spikes)
    if reason and world.is_main:
        print_note(f"step {state.step + 1}: {reason}; update skipped")
    return not any(world.max_int(reason is not None))


@torch.no_grad()
def clip_gradients(model: ShardedModel, grad_norm: Tensor, max_norm: float | None, loss_scale: float) -> None:
    """Divide the gradients by the loss scale, then scale their norm, `grad_norm` at that point, down to `max_norm`."""
    factor = torch.ones_like(grad_norm) / loss_scale
    if max_norm is not None:
        factor = factor * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for _, p in model.local_parameters() if p.grad is not None], factor)
