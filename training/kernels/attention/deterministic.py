"""Gradients that two runs get to the same bits, of PyTorch's own attention kernels on CUDA.

Their backward adds in the order in which blocks happen to finish, unless PyTorch's deterministic mode is on when it
runs (`_flash_attention_backward`, `_efficient_attention_backward` in ATen's attention_backward.cu). That mode is for
the whole process, and refuses operations that have nothing to do with attention: it is on here for this backward only.

The flash kernel is two operators here, so that a compiled block is one program; the others stand outside of programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def with_deterministic_backward(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend`, with a backward that is deterministic on CUDA as well."""

    @wraps(attend)
    def attend_anywhere(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        if not q.is_cuda:
            return attend(q, k, v, mask, **options)
        return attend_deterministically(attend, mask, options, q, k, v)

    return attend_anywhere


@torch.compiler.disable  # the mode has to be on when the backward runs, not when it is traced
def attend_deterministically(
    attend: Callable[..., Tensor], mask: Any, options: dict[str, Any], *inputs: Tensor
) -> Tensor:
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
        with deterministic_mode():
            found = iter(torch.autograd.grad(y, [x for x in inner if x.requires_grad], grad_y))
        return None, *(next(found) if x.requires_grad else None for x in inner)


def deterministic_flash(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float | None) -> Tensor:
    """The flash kernel on CUDA, causal where there is more than one query."""
    width = q_BHTD.shape[-1]
    scale = width**-0.5 if scale is None else scale
    q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q_BHTD, k_BGSD, v_BGSD))
    y_BHTD, _ = _flash(q, k, v, q.shape[2] > 1, scale)
    return y_BHTD[..., :width]


_OPS = __name__.replace(".", "_")
aten = torch.ops.aten


@torch.library.custom_op(f"{_OPS}::flash", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the log of the sum of each query's exponentials (B, H, T)."""
    y, log_sum_BHT, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, scale=scale)
    return _projected(y), log_sum_BHT


@torch.library.custom_op(f"{_OPS}::flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sum_BHT: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))  # of dropout
    kept, lengths = (q, k, v, y, log_sum_BHT, None, None), (q.shape[2], k.shape[2])
    with deterministic_mode():
        found = aten._scaled_dot_product_flash_attention_backward.default(
            grad, *kept, *lengths, 0.0, causal, *unused, scale=scale
        )
    return tuple(_projected(x) for x in found)


def _projected(x_BHTD: Tensor) -> Tensor:
    """In the order that projections have, (B, T, H, D), in which it mostly is already."""
    return x_BHTD.transpose(1, 2).contiguous().transpose(1, 2)


def _like(x_BHTD: Tensor) -> Tensor:
    n_samples, n_heads, n_tokens, width = x_BHTD.shape
    return x_BHTD.new_empty(n_samples, n_tokens, n_heads, width).transpose(1, 2)


@_flash.register_fake
def _flash_shapes(q, k, v, causal, scale):  # noqa: ARG001 (one signature)
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_flash_backward.register_fake
def _flash_backward_shapes(grad, q, k, v, y, log_sum_BHT, causal, scale):  # noqa: ARG001
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *qkv, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)


def _back(ctx: Any, grad: Tensor, _: Tensor | None):
    return *_flash_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_flash.register_autograd(_back, setup_context=_keep)


@contextmanager
def deterministic_mode() -> Iterator[None]:
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
