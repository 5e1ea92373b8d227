"""Muon: orthogonalized momentum (Jordan 2024, kellerjordan.github.io/posts/muon). Shapes: X matrices (M, N)."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from training.config import MuonConfig
from training.optim.parameters import FullShapes, ParametersByKind

# Coefficients of the quintic iteration, chosen for the largest slope at zero (same source).
QUINTIC = (3.4445, -4.7750, 2.0315)
# A matrix whose true gradient is zero has a gradient of rounding errors. Below this norm its update fades to zero;
# otherwise it would be a full step in a direction that depends on the order of sums.
NOISE_NORM = 1e-7


def orthogonalize(g_XMN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Bring nonzero singular values to about 0.7 to 1.2 by `steps` Newton-Schulz iterations in `dtype`.

    The result of a matrix whose norm is below NOISE_NORM is as much smaller.
    """
    a, b, c = QUINTIC
    norm = g_XMN.norm(dim=(-2, -1), keepdim=True)
    x = (g_XMN / norm.clamp(min=1e-30)).to(dtype)  # divide before the cast: small gradients underflow in fp16
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x * (norm / NOISE_NORM).clamp(max=1).to(dtype)


def apply_locally(_: list[Tensor], tensors: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a function to all matrices in one batch; the tensors are unsharded."""
    stacks = [tensor.view(-1, *tensor.shape[-2:]) for tensor in tensors]
    results = function(torch.cat(stacks)).split([len(stack) for stack in stacks])
    return [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon for matrices (M, N) and stacks of separate matrices (E, M, N), orthogonalized in `dtype`.

    The update is scaled by sqrt(max(1, M / N)); weight decay is decoupled. Matrices of equal shape are orthogonalized
    in one batch.
    """

    state_names = ("momentum",)
    scalar_state_names = ()

    def __init__(
        self, config: MuonConfig, parameters: ParametersByKind, dtype: torch.dtype, full_shapes: FullShapes | None
    ):
        matrices = parameters["matrix"]
        super().__init__(matrices, {"lr": config.muon_learning_rate, "weight_decay": config.weight_decay})
        self.config, self.dtype = config, dtype
        self.full_shapes = full_shapes or FullShapes({p: p.shape for p in matrices}, apply_locally)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self._step(**group)

    def _step(self, params: list[nn.Parameter], lr: float, weight_decay: float, **_: object) -> None:
        momentum = self.config.momentum
        function = partial(orthogonalize, steps=self.config.ns_steps, dtype=self.dtype)
        by_shape = defaultdict(list)
        for p in params:
            if p.grad is not None:
                by_shape[self.full_shapes.shapes[p][-2:]].append(p)
        for (n_rows, n_columns), parameters in by_shape.items():
            directions = []
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                average = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
                directions.append(p.grad.lerp(average, momentum))  # Nesterov
            updates = self.full_shapes.apply_to_matrices(parameters, directions, function)
            scale = max(1, n_rows / n_columns) ** 0.5
            for p, update in zip(parameters, updates, strict=True):
                p.mul_(1 - lr * weight_decay)
                p.add_(update, alpha=-lr * scale)
