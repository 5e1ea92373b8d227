"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

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


MatrixMap = Callable[[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]], list[Tensor]]


def map_locally(_parameters: list[Tensor], tensors: list[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`work` on the matrices of tensors, all of them whole and here, in one batch."""
    stacks = [tensor.view(-1, *tensor.shape[-2:]) for tensor in tensors]
    done = work(torch.cat(stacks)).split([len(stack) for stack in stacks])
    return [part.view_as(tensor) for part, tensor in zip(done, tensors, strict=True)]


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, (M, N), or stacks of them, (E, M, N): each matrix by itself.

    The update is scaled by sqrt(max(1, M / N)); weight decay is decoupled. Matrices of equal shape are
    orthogonalised in one batched product. Where a parameter holds some rows of a whole one, `shapes` says
    which shape that has, and `map_matrices`, of `map_locally`'s signature, brings rows together.
    """

    def __init__(
        self,
        params,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        ns_steps: int,
        dtype: torch.dtype,
        shapes: dict[Tensor, torch.Size] | None = None,
        map_matrices: MatrixMap = map_locally,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps})
        self.dtype, self.map_matrices = dtype, map_matrices
        self.shapes = {p: p.shape for group in self.param_groups for p in group["params"]} | (shapes or {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[self.shapes[p][-2:]].append(p)
            for shape, same in by_shape.items():
                self._step(same, shape, group)

    def _step(self, parameters: list[Tensor], shape: torch.Size, group: dict) -> None:
        """One update of parameters whose matrices have equal shape."""
        directions = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"]
            average.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(average, group["momentum"]))  # Nesterov
        work = partial(orthogonalize, steps=group["ns_steps"], dtype=self.dtype)
        updates = self.map_matrices(parameters, directions, work)
        scale = -group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
        for p, update in zip(parameters, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=scale)
