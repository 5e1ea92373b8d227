"""Cross-entropy of the output projection, in functions of one signature.

Shapes: N tokens, C channels, V vocabulary. Each takes x_NC, w_VC (cast to the type of x_NC) and targets_N (int64; -1
is not counted), optionally a soft-cap of the logits (softcap x tanh(logit / softcap), arXiv:2408.00118), and
returns the sum of the tokens' losses in nats, a float32 scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time. On a CPU so many tokens that products are fast and the weights' gradient is seldom read
# and written, 2048 of 16 bits or 1024 of 32, but not more than 256 MiB. Elsewhere by their number, 1 GiB of bfloat16.
CHUNK_BYTES = {"cpu": (2**12, 2**28)}  # by type of device: most bytes of one word's logits, and of all
CHUNK_ELSEWHERE = 2**29
BLOCK_ELEMENTS = 2**19  # numbers that are worked on at a time where there are CHUNK_BYTES: caches hold them

# Takes logits_NV, targets_N, softcap and whether the gradient is wanted. Returns the tokens' losses, float32 (N,), 0
# where a target is not counted; the logits then are the losses' gradients, but for rows that are not counted.
LogitsBackward = Callable[..., Tensor]


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, bounded smoothly if asked for."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """All logits at once, in float32."""
    logits_NV = apply_softcap(F.linear(x_NC, w_VC.to(x_NC.dtype)).float(), softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum")


class TorchLogitsBackward:
    """`LogitsBackward` of PyTorch's operations: logits become probabilities, and these the gradient.

    On a CPU it is done for so few tokens at a time that its caches hold them.
    """

    def __init__(self):
        self.work_nV: Tensor | None = None  # for logits that are not float32: theirs in float32, used again

    def __call__(self, logits_NV: Tensor, targets_N: Tensor, softcap: float | None, *, gradient: bool) -> Tensor:
        size = max(1, BLOCK_ELEMENTS // logits_NV.shape[1]) if logits_NV.device.type in CHUNK_BYTES else len(logits_NV)
        blocks = zip(logits_NV.split(size), targets_N.split(size), strict=True)
        return torch.cat([self._block(logits_nV, targets_n, softcap, gradient) for logits_nV, targets_n in blocks])

    def _block(self, logits_NV: Tensor, targets_N: Tensor, softcap: float | None, gradient: bool) -> Tensor:
        p_NV = logits_NV if logits_NV.dtype == torch.float32 else self._in_float32(logits_NV)
        target_N1 = targets_N[:, None].clamp(min=0)
        if softcap is not None:
            tanh_NV = p_NV.div_(softcap).tanh_().clone()
            p_NV.mul_(softcap)
        margin_N1 = p_NV.amax(dim=1, keepdim=True) - p_NV.gather(1, target_N1)
        torch.softmax(p_NV, 1, out=p_NV)
        loss_N1 = margin_N1 - p_NV.amax(dim=1, keepdim=True).log()
        if gradient:
            p_NV.scatter_add_(1, target_N1, p_NV.new_full((), -1.0).expand_as(target_N1))
            if softcap is not None:
                p_NV *= 1 - tanh_NV.square_()
            if p_NV is not logits_NV:
                logits_NV.copy_(p_NV)
        return loss_N1.squeeze(1) * (targets_N >= 0)

    def _in_float32(self, logits_NV: Tensor) -> Tensor:
        if self.work_nV is None:
            self.work_nV = torch.empty_like(logits_NV, dtype=torch.float32)
        return self.work_nV[: len(logits_NV)].copy_(logits_NV)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of tokens, so that all logits never exist at once.

    The loss is a sum, so its gradients are known up to the scalar that arrives in backward. A token that is not
    counted is so in the small matrices: its row of x_NC's gradient is zeroed, and its x adds zero to w_VC's.
    """

    @staticmethod
    def forward(
        ctx, rows: LogitsBackward, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None
    ) -> Tensor:
        _, needs_x, needs_w, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if needs_x else None
        grad_w_VC = torch.empty_like(w_VC, dtype=torch.float32) if needs_w else None
        w_VC = w_VC.to(x_NC.dtype)
        size = _chunk(x_NC, len(w_VC))
        logits_nV = x_NC.new_empty(size, len(w_VC))
        for start in range(0, len(x_NC), size):
            part = slice(start, start + size)
            x_nC, targets_n = x_NC[part], targets_N[part]
            logits_nV = logits_nV[: len(x_nC)]
            torch.mm(x_nC, w_VC.t(), out=logits_nV)
            total += rows(logits_nV, targets_n, softcap, gradient=needs_x or needs_w).sum()
            counted_n1 = targets_n[:, None] >= 0
            if needs_x:
                torch.mm(logits_nV, w_VC, out=grad_x_NC[part])
                grad_x_NC[part] *= counted_n1
            if needs_w:
                _add_product(grad_w_VC, logits_nV.t(), x_nC * counted_n1, first=start == 0)
        ctx.grads = grad_x_NC, grad_w_VC
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        (grad_x_NC, grad_w_VC), ctx.grads = ctx.grads, None  # scaled where they are, and so once
        for scaled in (grad_x_NC, grad_w_VC):
            if scaled is not None:
                scaled *= grad
        return None, grad_x_NC, grad_w_VC, None, None


def _chunk(x_NC: Tensor, n_vocab: int) -> int:
    """Tokens whose logits exist at a time: as many each time."""
    most = CHUNK_ELSEWHERE // n_vocab
    if x_NC.device.type in CHUNK_BYTES:
        of_a_word, of_all = CHUNK_BYTES[x_NC.device.type]
        most = min(of_a_word, of_all // n_vocab) // x_NC.element_size()
    n_chunks = max(1, -(-len(x_NC) // max(1, most)))
    return max(1, -(-len(x_NC) // n_chunks))


def _add_product(sum_IO: Tensor, x_IN: Tensor, y_NO: Tensor, *, first: bool) -> None:
    """Add x y to a float32 sum; the first is written over what is there."""
    if x_IN.dtype == torch.float32:
        sum_IO.addmm_(x_IN, y_NO, beta=0 if first else 1)
    elif first:
        sum_IO.copy_(x_IN @ y_NO)
    elif sum_IO.device.type not in CHUNK_BYTES:
        sum_IO += x_IN @ y_NO
    else:  # where a sum of two types is slow
        size = max(1, BLOCK_ELEMENTS // sum_IO.shape[1])
        for sum_iO, product_iO in zip(sum_IO.split(size), (x_IN @ y_NO).split(size), strict=True):
            sum_iO += product_iO.float()


def chunked_cross_entropy(
    rows: LogitsBackward, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None
) -> Tensor:
    """The loss, its rows computed by `rows`."""
    if not torch.is_grad_enabled():  # which a Function cannot see: it would compute gradients nobody asked for
        x_NC, w_VC = x_NC.detach(), w_VC.detach()
    return _ChunkedCrossEntropy.apply(rows, x_NC, w_VC, targets_N, softcap)


def chunked_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """The logits of a few tokens at a time, in float32; gradients are computed on the way."""
    return chunked_cross_entropy(TorchLogitsBackward(), x_NC, w_VC, targets_N, softcap)


TORCH_LOSS = {"chunked": chunked_loss, "reference": reference_loss}
