"""Lion (arXiv:2302.06675): the sign of an interpolation between the gradient and its running mean."""

from __future__ import annotations

import torch

from training.config import LionConfig
from training.optim.parameters import NamedParameter


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay on matrices only."""

    state_names = ("exp_avg",)  # tensors of the parameter's shape
    scalar_state_names = ()

    @classmethod
    def build(cls, config: LionConfig, parameters: list[NamedParameter], **_: object) -> Lion:
        """Build the optimizer of some parameters from its options."""
        decayed = [p for _, p, kind in parameters if kind in ("matrix", "router")]
        others = [p for _, p, kind in parameters if kind not in ("matrix", "router")]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        defaults = {"lr": config.learning_rate, "beta1": config.beta1, "beta2": config.beta2}
        return cls([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            gradients = [p.grad for p in trained]
            for p in trained:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in trained]
            updates = torch._foreach_lerp(averages, gradients, 1 - group["beta1"])
            torch._foreach_sign_(updates)
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(trained, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - group["beta2"])
