"""Gradients that two runs get to the same bits, of PyTorch's own attention kernels on CUDA.

Their backward adds in the order in which blocks happen to finish, unless PyTorch's deterministic mode is on when it
runs (`_flash_attention_backward`, `_efficient_attention_backward` in ATen's attention_backward.cu). That mode is for
the whole process, and refuses operations that have nothing to do with attention: it is on here for this backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def repeatable(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend`, with a backward that is deterministic on CUDA as well."""

    @wraps(attend)
    def attend_anywhere(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        if not q.is_cuda:
            return attend(q, k, v, mask, **options)
        return attend_repeatably(attend, mask, options, q, k, v)

    return attend_anywhere


@torch.compiler.disable  # the mode has to be on when the backward runs, not when it is traced
def attend_repeatably(attend: Callable[..., Tensor], mask: Any, options: dict[str, Any], *inputs: Tensor) -> Tensor:
    """`attend`, with the deterministic backward."""
    if not torch.is_grad_enabled():
        return attend(*inputs, mask, **options)
    return DeterministicBackward.apply(lambda *inputs: attend(*inputs, mask, **options), *inputs)


class DeterministicBackward(torch.autograd.Function):
    """A function whose own graph is kept, and walked back in PyTorch's deterministic mode."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            y = function(*inner)
        ctx.kept = inner, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        inner, y = ctx.kept
        ctx.kept = None  # else it would live as long as the graph of the whole step
        with deterministic():
            found = iter(torch.autograd.grad(y, [x for x in inner if x.requires_grad], grad_y))
        return None, *(next(found) if x.requires_grad else None for x in inner)


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic mode, without the filling of new memory that comes with it."""
    memory = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]
