"""Cross-entropy of logits and its gradient in Triton: the logits are read twice and written once, in their own type.

Shapes are those of `loss.py`. A program takes a token: it goes through its logits for their maximum and sum, and again
to turn them into the gradient where they are. No atomics, and so the same bits every time. Sums are float32.

Triton is not everywhere: this file is imported where its function is called, by `kernels/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16  # logits that a program has at a time; the fastest of eight pairs on an H100


@triton.jit
def _capped(x, softcap):
    """softcap x tanh(x / softcap); without one, x."""
    return x if softcap is None else softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)


@triton.jit
def _loss_kernel(logits_NV, target_N, loss_N, n_vocab, softcap, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_V, v = logits_NV + row * n_vocab, tl.arange(0, BLOCK)
    target = tl.load(target_N + row)
    most_B, sum_B = tl.full((BLOCK,), -1e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_vocab, BLOCK):
        real_B = first + v < n_vocab
        x_B = _capped(tl.load(logits_V + first + v, mask=real_B, other=0.0).to(tl.float32), softcap)
        higher_B = tl.where(real_B, tl.maximum(most_B, x_B), most_B)
        sum_B = sum_B * tl.exp(most_B - higher_B) + tl.where(real_B, tl.exp(tl.minimum(x_B - higher_B, 0.0)), 0.0)
        most_B = higher_B
    most = tl.max(most_B, 0)
    log_sum = tl.log(tl.sum(sum_B * tl.exp(most_B - most), 0))
    counted = target >= 0
    at_target = _capped(tl.load(logits_V + tl.maximum(target, 0)).to(tl.float32), softcap)
    tl.store(loss_N + row, tl.where(counted, log_sum + (most - at_target), 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is written over
        for first in range(0, n_vocab, BLOCK):
            real_B = first + v < n_vocab
            x_B = _capped(tl.load(logits_V + first + v, mask=real_B, other=0.0).to(tl.float32), softcap)
            grad_B = tl.exp((x_B - most) - log_sum) - tl.where(first + v == target, 1.0, 0.0)
            if softcap is not None:
                grad_B *= 1 - (x_B / softcap) * (x_B / softcap)
            grad_B = tl.where(counted, grad_B, 0.0)
            tl.store(logits_V + first + v, grad_B.to(logits_NV.dtype.element_ty), mask=real_B)


def triton_logits_backward(logits_NV: Tensor, targets_N: Tensor, softcap: float | None, *, gradient: bool) -> Tensor:
    """As `loss.TorchLogitsBackward`."""
    loss_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    block = min(BLOCK, triton.next_power_of_2(logits_NV.shape[1]))
    grid = (len(logits_NV),)
    _loss_kernel[grid](
        logits_NV, targets_N, loss_N, logits_NV.shape[1], softcap, GRADIENT=gradient, BLOCK=block, num_warps=WARPS
    )
    return loss_N
