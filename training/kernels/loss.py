"""Cross-entropy of the output projection, in functions of one signature.

Shapes: N tokens, C channels, V vocabulary. Each takes x_NC, w_VC and targets_N (int64; -1 is
not counted), optionally a soft-cap of the logits (softcap x tanh(logit / softcap), arXiv:2408.00118), and
returns the sum of the tokens' losses in nats, a float32 scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time: on a CPU what its caches hold, elsewhere enough for large products (1 GiB in float32).
CHUNK_LOGITS = 2**22
CHUNK_LOGITS_GPU = 2**28


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, bounded smoothly if asked for."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """All logits at once, in float32."""
    logits_NV = soft_capped(F.linear(x_NC, w_VC).float(), softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of tokens, so that all logits never exist at once.

    The loss is a sum, so its gradients are known up to the scalar that arrives in backward.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None) -> Tensor:
        needs_x, needs_w, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if needs_x else None
        grad_w_VC = torch.zeros_like(w_VC, dtype=torch.float32) if needs_w else None
        chunk = CHUNK_LOGITS if x_NC.device.type == "cpu" else CHUNK_LOGITS_GPU
        size = min(len(x_NC), max(1, chunk // len(w_VC)))
        logits_nV = x_NC.new_empty(size, len(w_VC))  # one piece of memory for all chunks
        for start in range(0, len(x_NC), size):
            rows = slice(start, start + size)
            x_nC, target_n1 = x_NC[rows], targets_N[rows, None]
            counted_n1 = target_n1 >= 0
            target_n1 = target_n1.clamp(min=0)
            p_nV = torch.mm(x_nC, w_VC.t(), out=logits_nV[: len(x_nC)]).float()
            if softcap is not None:
                tanh_nV = p_nV.div_(softcap).tanh_()
                p_nV = tanh_nV * softcap
            p_nV -= p_nV.amax(dim=1, keepdim=True)
            right_n1 = p_nV.gather(1, target_n1)
            sum_n1 = p_nV.exp_().sum(dim=1, keepdim=True)
            total += ((sum_n1.log() - right_n1) * counted_n1).sum()
            if not (needs_x or needs_w):
                continue
            p_nV *= counted_n1 / sum_n1
            p_nV.scatter_add_(1, target_n1, -counted_n1.to(p_nV.dtype))
            if softcap is not None:
                p_nV *= 1 - tanh_nV.square_()
            grad_nV = p_nV.to(x_NC.dtype)
            if needs_x:
                torch.mm(grad_nV, w_VC, out=grad_x_NC[rows])
            if needs_w:
                grad_w_VC += grad_nV.t() @ x_nC
        ctx.save_for_backward(grad_x_NC, grad_w_VC)
        ctx.w_dtype = w_VC.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x_NC, grad_w_VC = ctx.saved_tensors
        return (
            None if grad_x_NC is None else grad_x_NC * grad.to(grad_x_NC.dtype),
            None if grad_w_VC is None else (grad_w_VC * grad).to(ctx.w_dtype),
            None,
            None,
        )


def chunked_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """The logits of a few tokens at a time, in float32; gradients are computed on the way."""
    if not torch.is_grad_enabled():  # which a Function cannot see: it would compute gradients nobody asked for
        x_NC, w_VC = x_NC.detach(), w_VC.detach()
    return _ChunkedCrossEntropy.apply(x_NC, w_VC, targets_N, softcap)


LOSS = {"chunked": chunked_loss, "reference": reference_loss}
