"""Cross-entropy of the output projection, in functions of one signature.

Shapes: N tokens, C channels, V vocabulary. Each takes x_NC, w_VC (cast to the type of x_NC) and targets_N (int64; -1
is not counted), optionally a soft-cap of the logits (softcap x tanh(logit / softcap), arXiv:2408.00118), and
returns the sum of the tokens' losses in nats, a float32 scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time. On a CPU few enough for its caches, but never those of fewer tokens than make a product
# fast: all of the weights' gradient is read and written for each chunk. Elsewhere enough for large products (1 GiB).
CHUNKS = {"cpu": (2**20, 256)}  # by type of device: (logits, tokens at least)
CHUNK_ELSEWHERE = (2**28, 1)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, bounded smoothly if asked for."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """All logits at once, in float32."""
    logits_NV = soft_capped(F.linear(x_NC, w_VC.to(x_NC.dtype)).float(), softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of tokens, so that all logits never exist at once.

    The loss is a sum, so its gradients are known up to the scalar that arrives in backward. Logits become
    probabilities and these the gradient in one piece of memory. A token that is not counted is so in the small
    matrices: its row of x_NC's gradient is zeroed, and its x adds zero to w_VC's.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None) -> Tensor:
        needs_x, needs_w, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if needs_x else None
        grad_w_VC = torch.empty_like(w_VC, dtype=torch.float32) if needs_w else None
        w_VC, exact = w_VC.to(x_NC.dtype), x_NC.dtype == torch.float32
        size = min(len(x_NC), _chunk(x_NC.device, len(w_VC)))
        logits_nV = x_NC.new_empty(size, len(w_VC))
        p_nV = logits_nV if exact else torch.empty_like(logits_nV, dtype=torch.float32)
        for start in range(0, len(x_NC), size):
            rows = slice(start, start + size)
            x_nC, target_n1 = x_NC[rows], targets_N[rows, None]
            counted_n1 = target_n1 >= 0
            target_n1 = target_n1.clamp(min=0)
            logits_nV, p_nV = logits_nV[: len(x_nC)], p_nV[: len(x_nC)]
            torch.mm(x_nC, w_VC.t(), out=logits_nV)
            if not exact:
                p_nV.copy_(logits_nV)
            if softcap is not None:
                tanh_nV = p_nV.div_(softcap).tanh_().clone()
                p_nV.mul_(softcap)
            margin_n1 = p_nV.amax(dim=1, keepdim=True) - p_nV.gather(1, target_n1)
            torch.softmax(p_nV, 1, out=p_nV)
            total += ((margin_n1 - p_nV.amax(dim=1, keepdim=True).log()) * counted_n1).sum()
            if not (needs_x or needs_w):
                continue
            p_nV.scatter_add_(1, target_n1, p_nV.new_full((), -1.0).expand_as(target_n1))
            if softcap is not None:
                p_nV *= 1 - tanh_nV.square_()
            grad_nV = p_nV if exact else logits_nV.copy_(p_nV)
            if needs_x:
                torch.mm(grad_nV, w_VC, out=grad_x_NC[rows])
                grad_x_NC[rows] *= counted_n1
            if needs_w:
                _add_product(grad_w_VC, grad_nV.t(), x_nC * counted_n1, first=start == 0)
        ctx.grads = grad_x_NC, grad_w_VC
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_x_NC, grad_w_VC), ctx.grads = ctx.grads, None  # scaled where they are, and so once
        for scaled in (grad_x_NC, grad_w_VC):
            if scaled is not None:
                scaled *= grad
        return grad_x_NC, grad_w_VC, None, None


def _chunk(device: torch.device, n_vocab: int) -> int:
    """Tokens whose logits exist at a time."""
    n_logits, at_least = CHUNKS.get(device.type, CHUNK_ELSEWHERE)
    return max(at_least, n_logits // n_vocab)


def _add_product(sum_IO: Tensor, x_IN: Tensor, y_NO: Tensor, *, first: bool) -> None:
    """Add x y to a float32 sum; the first is written over what is there."""
    if x_IN.dtype == torch.float32:
        sum_IO.addmm_(x_IN, y_NO, beta=0 if first else 1)
    elif first:
        sum_IO.copy_(x_IN @ y_NO)
    else:
        sum_IO += x_IN @ y_NO


def chunked_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """The logits of a few tokens at a time, in float32; gradients are computed on the way."""
    if not torch.is_grad_enabled():  # which a Function cannot see: it would compute gradients nobody asked for
        x_NC, w_VC = x_NC.detach(), w_VC.detach()
    return _ChunkedCrossEntropy.apply(x_NC, w_VC, targets_N, softcap)


LOSS = {"chunked": chunked_loss, "reference": reference_loss}
