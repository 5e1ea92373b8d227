"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

# Coefficients of the quintic iteration, chosen for the largest slope at zero (same source).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_XMN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix of every M x N matrix, roughly: singular values in about (0.7, 1.2).

    Newton-Schulz iteration in `dtype`; a zero matrix stays zero.
    """
    a, b, c = QUINTIC
    norm = g_XMN.norm(dim=(-2, -1), keepdim=True)
    x = (g_XMN / norm.clamp(min=1e-30)).to(dtype)  # divided first: fp16 holds no gradient's own scale
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, (M, N), or stacks of them, (E, M, N): each matrix by itself.

    The update is scaled by sqrt(max(1, M / N)); weight decay is decoupled. Matrices of equal shape are
    orthogonalised in one batched product.
    """

    def __init__(self, params, *, lr: float, momentum: float, weight_decay: float, ns_steps: int, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2:]].append(p)
            for same in by_shape.values():
                self._step(same, group)

    def _step(self, parameters: list[Tensor], group: dict) -> None:
        """One update of parameters whose matrices have equal shape."""
        rows, columns = parameters[0].shape[-2:]
        directions = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"]
            average.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(average, group["momentum"]).view(-1, rows, columns))  # Nesterov
        updates = orthogonalize(torch.cat(directions), group["ns_steps"], self.dtype)
        scale = -group["lr"] * max(1, rows / columns) ** 0.5
        for p, update in zip(parameters, updates.split([len(d) for d in directions]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=scale)
