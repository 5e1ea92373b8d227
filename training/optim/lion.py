"""Lion (arXiv:2302.06675): the update is the sign of an interpolation between gradient and running mean."""

from typing import Self

import torch

from training.config import LionConfig
from training.optim.parameters import NamedParameter


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay on matrices and routers only."""

    state_names = ("exp_avg",)  # tensors of the parameter's shape
    scalar_state_names = ()

    @classmethod
    def build(cls, config: LionConfig, parameters: list[NamedParameter], **_: object) -> Self:
        """Build the optimizer of `parameters`."""
        matrices = [p for _, p, kind in parameters if kind in ("matrix", "router")]
        others = [p for _, p, kind in parameters if kind not in ("matrix", "router")]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        defaults = {"lr": config.learning_rate, "beta1": config.beta1, "beta2": config.beta2}
        return cls([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in parameters]
            updates = torch._foreach_lerp(averages, gradients, 1 - group["beta1"])
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - group["beta2"])
