"""Lion (arXiv:2302.06675): the update is the sign of an interpolation between gradient and running mean."""

import torch

from training.config import LionConfig
from training.optim.parameters import ParametersByKind


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay on matrices and routers only."""

    state_names = ("exp_avg",)
    scalar_state_names = ()

    def __init__(self, config: LionConfig, parameters: ParametersByKind, **_: object):
        groups = [
            {"params": parameters["matrix"] + parameters["router"], "weight_decay": config.weight_decay},
            {"params": parameters["embedding"] + parameters["vector"], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate, "beta1": config.beta1, "beta2": config.beta2})

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
