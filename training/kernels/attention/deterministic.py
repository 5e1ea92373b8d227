"""Bit-identical gradients from PyTorch's own attention kernels on CUDA.

Their backward sums blocks in the order in which they finish, unless PyTorch's deterministic mode is on while it runs
(`_flash_attention_backward`, `_efficient_attention_backward` in ATen's attention_backward.cu). That mode is global and
rejects operations unrelated to attention, so only this backward runs in it. The flash kernel is two custom operators,
so a compiled block stays one graph; other kernels break the graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo


def with_deterministic_backward(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap an attention kernel so that its backward runs in the deterministic mode."""

    # Untraced, because the mode must be on when the backward runs. `torch.compiler.disable` would import the compiler.
    @_disable_dynamo
    def attend_deterministically(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return attend(q, k, v, mask, **options)
        return DeterministicBackward.apply(lambda *qkv: attend(*qkv, mask, **options), q, k, v)

    return attend_deterministically


class DeterministicBackward(torch.autograd.Function):
    """A function with its own autograd graph, whose backward runs in PyTorch's deterministic mode."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            y = function(*leaves)
        ctx.graph = leaves, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (leaves, y), ctx.graph = ctx.graph, None  # free it now, not at the end of the step's backward
        with deterministic_mode():
            grads = iter(torch.autograd.grad(y, [x for x in leaves if x.requires_grad], grad_y))
        return None, *(next(grads) if x.requires_grad else None for x in leaves)


def deterministic_flash(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float | None) -> Tensor:
    """Run the flash kernel on CUDA, with a causal mask if there is more than one query."""
    width = q_BHTD.shape[-1]
    scale = width**-0.5 if scale is None else scale
    q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q_BHTD, k_BGSD, v_BGSD))
    y_BHTD, _ = _flash(q, k, v, q.shape[2] > 1, scale)
    return y_BHTD[..., :width]


_OPS = __name__.replace(".", "_")
aten = torch.ops.aten


@torch.library.custom_op(f"{_OPS}::flash", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return y and the log-sum-exp of each query's scores (B, H, T)."""
    y, log_sum_BHT, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, scale=scale)
    return _projection_order(y), log_sum_BHT


@torch.library.custom_op(f"{_OPS}::flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sum_BHT: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dropout_state = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))  # unused
    with deterministic_mode():
        grads = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, y, log_sum_BHT, None, None, q.shape[2], k.shape[2], 0.0, causal, *dropout_state, scale=scale
        )
    return tuple(_projection_order(x) for x in grads)


def _projection_order(x_BHTD: Tensor) -> Tensor:
    """Change the memory layout to that of the projections, (B, T, H, D); usually a no-op."""
    return x_BHTD.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(x_BHTD: Tensor) -> Tensor:
    return _projection_order(torch.empty_like(x_BHTD))


_flash.register_fake(lambda q, *_: (_empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
_flash_backward.register_fake(lambda _, q, k, v, *__: (_empty_like(q), _empty_like(k), _empty_like(v)))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *qkv, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)


_flash.register_autograd(
    lambda ctx, grad, _: (*_flash_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None),
    setup_context=_save,
)


@contextmanager
def deterministic_mode() -> Iterator[None]:
    """Switch on PyTorch's deterministic mode, but do not fill uninitialized memory; restore both settings."""
    memory = torch.utils.deterministic
    mode_before, fill_before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode_before)
        memory.fill_uninitialized_memory = fill_before
