"""Muon: orthogonalized momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Shapes: X matrices of M rows and N columns.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

from training.config import MuonConfig
from training.optim.parameters import ApplyToMatrices, FullShapes, NamedParameter

# Coefficients of the quintic iteration, chosen for the largest slope at zero (same source).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_XMN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Orthogonalize each matrix approximately: singular values become about 0.7 to 1.2, or stay zero.

    Runs `steps` Newton-Schulz iterations in `dtype`.
    """
    a, b, c = QUINTIC
    norm = g_XMN.norm(dim=(-2, -1), keepdim=True)
    x = (g_XMN / norm.clamp(min=1e-30)).to(dtype)  # divide before the cast: small gradients underflow in fp16
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def apply_locally(
    _parameters: list[Tensor], tensors: list[Tensor], function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply a function to all matrices in one batch; the tensors are unsharded."""
    stacks = [tensor.view(-1, *tensor.shape[-2:]) for tensor in tensors]
    results = function(torch.cat(stacks)).split([len(stack) for stack in stacks])
    return [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon for matrices (M, N) and stacks of separate matrices (E, M, N).

    The update is scaled by sqrt(max(1, M / N)); weight decay is decoupled. Matrices of equal shape are orthogonalized
    in one batch. If parameters are row-sharded, `shapes` holds the full shapes and `apply_to_matrices` gathers the
    rows.
    """

    state_names = ("momentum",)  # tensors of the parameter's shape
    scalar_state_names = ()

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
        apply_to_matrices: ApplyToMatrices = apply_locally,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps})
        self.dtype, self.apply_to_matrices = dtype, apply_to_matrices
        self.shapes = {p: p.shape for group in self.param_groups for p in group["params"]} | (shapes or {})

    @classmethod
    def build(
        cls, config: MuonConfig, parameters: list[NamedParameter], dtype: torch.dtype, full_shapes: FullShapes | None
    ) -> Self:
        """Build the optimizer of `parameters`; matmuls run in `dtype`."""
        return cls(
            [parameter for _, parameter, _ in parameters],
            lr=config.muon_learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            ns_steps=config.ns_steps,
            dtype=dtype,
            **({} if full_shapes is None else full_shapes._asdict()),
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[self.shapes[p][-2:]].append(p)
            for shape, parameters in by_shape.items():
                self._step(parameters, shape, group)

    def _step(self, parameters: list[Tensor], shape: torch.Size, group: dict) -> None:
        """Update parameters whose matrices all have this shape."""
        directions = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"]
            average.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(average, group["momentum"]))  # Nesterov
        function = partial(orthogonalize, steps=group["ns_steps"], dtype=self.dtype)
        updates = self.apply_to_matrices(parameters, directions, function)
        scale = -group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
        for p, update in zip(parameters, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=scale)
