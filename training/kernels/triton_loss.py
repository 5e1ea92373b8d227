"""Cross-entropy of logits and its gradient in Triton: reads the logits twice and overwrites them once.

Shapes are those of `loss.py`. One program handles one token: it reads the logits for their maximum and the sum of
their exponentials, then again to overwrite them with the gradient. There are no atomic additions, so the bits repeat.
Sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16  # logits per step of a program, warps; the fastest of eight pairs on an H100


@triton.jit
def _soft_cap(x, softcap):
    """Return softcap x tanh(x / softcap); x if softcap is None."""
    return x if softcap is None else softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)


@triton.jit
def _loss_kernel(logits_NV, target_N, loss_N, n_columns, n_vocab, softcap, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_V, v = logits_NV + row * n_columns, tl.arange(0, BLOCK)
    target = tl.load(target_N + row)
    max_B, sum_B = tl.full((BLOCK,), -1e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_vocab, BLOCK):
        is_logit_B = first + v < n_vocab
        x_B = _soft_cap(tl.load(logits_V + first + v, mask=is_logit_B, other=0.0).to(tl.float32), softcap)
        higher_B = tl.where(is_logit_B, tl.maximum(max_B, x_B), max_B)
        sum_B = sum_B * tl.exp(max_B - higher_B) + tl.where(is_logit_B, tl.exp(tl.minimum(x_B - higher_B, 0.0)), 0.0)
        max_B = higher_B
    maximum = tl.max(max_B, 0)
    log_sum = tl.log(tl.sum(sum_B * tl.exp(max_B - maximum), 0))
    is_counted = target >= 0
    at_target = _soft_cap(tl.load(logits_V + tl.maximum(target, 0)).to(tl.float32), softcap)
    tl.store(loss_N + row, tl.where(is_counted, log_sum + (maximum - at_target), 0.0))
    if GRADIENT:
        tl.debug_barrier()  # read the target's logit before it is overwritten
        for first in range(0, n_columns, BLOCK):
            is_logit_B = first + v < n_vocab
            x_B = _soft_cap(tl.load(logits_V + first + v, mask=is_logit_B, other=0.0).to(tl.float32), softcap)
            grad_B = tl.exp((x_B - maximum) - log_sum) - tl.where(first + v == target, 1.0, 0.0)
            if softcap is not None:
                grad_B *= 1 - (x_B / softcap) * (x_B / softcap)
            grad_B = tl.where(is_counted & is_logit_B, grad_B, 0.0)
            tl.store(logits_V + first + v, grad_B.to(logits_NV.dtype.element_ty), mask=first + v < n_columns)


def triton_logits_backward(
    logits_NV: Tensor, targets_N: Tensor, softcap: float | None, n_vocab: int, *, gradient: bool
) -> Tensor:
    """Implement `loss.LogitsBackward`."""
    n_tokens, n_columns = logits_NV.shape
    loss_N = torch.empty(n_tokens, dtype=torch.float32, device=logits_NV.device)
    options = {"GRADIENT": gradient, "BLOCK": min(BLOCK, triton.next_power_of_2(n_columns)), "num_warps": WARPS}
    _loss_kernel[(n_tokens,)](logits_NV, targets_N, loss_N, n_columns, n_vocab, softcap, **options)
    return loss_N
