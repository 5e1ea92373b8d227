"""Forward and backward of one micro-batch."""

import torch
from torch import Tensor

from training.batch import Batch
from training.distributed.sharded_model import ShardedModel

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


def add_metrics(sums: Metrics, metrics: Metrics) -> None:
    """Add a micro-batch's metrics to the sums, in place."""
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value
