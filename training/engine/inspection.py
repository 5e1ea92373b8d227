"""Figures by layer of one update: norms of gradients and weights, size of the update, size of the residual stream.

They are on the device, as all metrics of a step, and take less than 1 % of the time of `logging.histogram_every` steps.
"""

import torch
from torch import Tensor

from training import device as devices
from training.distributed.sharded_model import ShardedModel


class Inspection:
    """The figures of an update, by block. Build it after the gradients are summed, before they are clipped."""

    @torch.no_grad()
    def __init__(self, model: ShardedModel, loss_scale: float) -> None:
        """Measure gradients and weights, and copy the weights if there is memory for it. Collective."""
        self.model = model
        parameters = {name: p for name, p in model.local_parameters() if name.startswith("blocks.")}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.weights = {name: p.detach() for name, p in parameters.items()}
        self.grad_norm_L = model.norms_by_block(gradients) / loss_scale
        self.weight_norm_L = model.norms_by_block(self.weights)
        n_bytes = sum(weight.nbytes for weight in self.weights.values())
        (lacks_memory,) = model.world.max_int(2 * n_bytes > devices.free_memory_bytes(model.world.device))
        self.copies = None if lacks_memory else {name: weight.clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """Return the figures after the update, each (n_layer,). Collective.

        "update_ratio" is missing if memory is short.
        """
        figures = {"layers.grad_norm": self.grad_norm_L, "layers.weight_norm": self.weight_norm_L}
        if self.copies is not None:
            copies = [self.copies[name] for name in self.weights]
            torch._foreach_sub_(copies, list(self.weights.values()))
            figures["layers.update_ratio"] = self.model.norms_by_block(self.copies) / self.weight_norm_L
        return figures


def residual_rms(square_L: Tensor, n_values: int) -> dict[str, Tensor]:
    """Return the RMS of the residual stream after each block, from the sums of squares over `n_values` numbers."""
    return {"layers.residual_rms": (square_L / n_values).sqrt()}
