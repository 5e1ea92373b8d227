"""Cross-entropy of the output projection.

Shapes: N tokens, C channels, V rows of the projection. A kernel takes x_NC, w_VC (which it casts to the dtype of x_NC),
targets_N (int64; -1 is ignored) and optionally a soft-cap of the logits (softcap x tanh(logit / softcap),
arXiv:2408.00118) and the size of the vocabulary, `n_vocab`: later rows are padding, whose gradient is 0. It returns the
sum of the tokens' losses in nats, a float32 scalar.

>>> x_NC, w_VC, targets_N = torch.zeros(3, 8), torch.randn(100, 8), torch.tensor([7, -1, 42])
>>> TORCH_LOSS["chunked"](x_NC, w_VC, targets_N, softcap=30.0)  # two targets, each log(100) nats
tensor(9.2103)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Limits of a chunk of tokens, whose logits are in memory at the same time. On a CPU 2048 tokens (16-bit) or 1024
# (32-bit), where matmuls are fast and updates of w_VC's gradient rare, and at most 256 MiB. Elsewhere 1 GiB (bf16).
CHUNK_BYTES = {"cpu": (2**12, 2**28)}  # by device type: max bytes of one column of logits_NV, and of all of it
CHUNK_ELEMENTS = 2**29  # on other devices: max logits
BLOCK_ELEMENTS = 2**19  # on devices in CHUNK_BYTES, process this many logits at a time: they fit in the cache

# (logits_NV, targets_N, softcap, n_vocab, *, gradient: bool) -> each token's loss, float32 (N,), 0 if target is -1. If
# `gradient`, overwrites logits_NV with d loss / d logits, 0 from column n_vocab on; rows with target -1 are undefined.
LogitsBackward = Callable[..., Tensor]


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """Bound the logits smoothly to (-softcap, softcap); None: no bound."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_loss(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None, n_vocab: int | None = None
) -> Tensor:
    """Compute all logits at once, in float32."""
    logits_NV = apply_softcap(F.linear(x_NC, w_VC[:n_vocab].to(x_NC.dtype)).float(), softcap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum")


def torch_logits_backward(
    logits_NV: Tensor, targets_N: Tensor, softcap: float | None, n_vocab: int, *, gradient: bool
) -> Tensor:
    """Implement `LogitsBackward` in PyTorch operations; on a CPU in blocks that fit in the cache."""
    size = max(1, BLOCK_ELEMENTS // logits_NV.shape[1]) if logits_NV.device.type in CHUNK_BYTES else len(logits_NV)
    losses = []
    for logits_nV, targets_n in zip(logits_NV.split(size), targets_N.split(size), strict=True):
        p_nV = logits_nV.float()  # the same tensor if it is float32
        target_n1 = targets_n[:, None].clamp(min=0)
        if softcap is not None:
            tanh_nV = p_nV.div_(softcap).tanh_().clone()
            p_nV.mul_(softcap)
        p_nV[:, n_vocab:] = -torch.inf  # not a narrower view: rows of an odd length make matmuls slow
        margin_n1 = p_nV.amax(dim=1, keepdim=True) - p_nV.gather(1, target_n1)
        torch.softmax(p_nV, 1, out=p_nV)
        loss_n1 = margin_n1 - p_nV.amax(dim=1, keepdim=True).log()
        losses.append(loss_n1.squeeze(1) * (targets_n >= 0))
        if gradient:
            p_nV.scatter_add_(1, target_n1, p_nV.new_full((), -1.0).expand_as(target_n1))
            if softcap is not None:
                p_nV *= 1 - tanh_nV.square_()
            logits_nV.copy_(p_nV)  # does nothing if it is the same tensor
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of tokens, so that only one chunk of logits is in memory.

    The loss is a sum, so forward computes its gradients, up to the scalar that backward receives. Tokens with target
    -1 are masked outside of logits_NV, in smaller tensors: the gradient of x_NC, and x_NC in the gradient of w_VC.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_backward: LogitsBackward,
        x_NC: Tensor,
        w_VC: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        n_vocab: int,
    ) -> Tensor:
        _, needs_x, needs_w, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if needs_x else None
        grad_w_VC = torch.empty_like(w_VC, dtype=torch.float32) if needs_w else None
        w_VC = w_VC.to(x_NC.dtype)
        size = chunk_tokens(x_NC, len(w_VC))
        logits_nV = x_NC.new_empty(size, len(w_VC))
        for start in range(0, len(x_NC), size):
            chunk = slice(start, start + size)
            x_nC, targets_n = x_NC[chunk], targets_N[chunk]
            logits_nV = logits_nV[: len(x_nC)]
            torch.mm(x_nC, w_VC.t(), out=logits_nV)
            total += logits_backward(logits_nV, targets_n, softcap, n_vocab, gradient=needs_x or needs_w).sum()
            is_counted_n1 = targets_n[:, None] >= 0
            if needs_x:
                torch.mm(logits_nV, w_VC, out=grad_x_NC[chunk])
                grad_x_NC[chunk] *= is_counted_n1
            if needs_w:
                _add_product(grad_w_VC, logits_nV.t(), x_nC * is_counted_n1, first=start == 0)
        ctx.grads = grad_x_NC, grad_w_VC
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unscaled, ctx.grads = ctx.grads, None  # scaled in place, so backward runs only once
        return None, *(None if x is None else x.mul_(grad) for x in unscaled), None, None, None


def chunk_tokens(x_NC: Tensor, n_rows: int) -> int:
    """Return the number of tokens in a chunk: within the limits, in nearly equal chunks."""
    limit = CHUNK_ELEMENTS // n_rows
    if x_NC.device.type in CHUNK_BYTES:
        entry_bytes, total_bytes = CHUNK_BYTES[x_NC.device.type]
        limit = min(entry_bytes, total_bytes // n_rows) // x_NC.element_size()
    n_chunks = max(1, -(-len(x_NC) // max(1, limit)))
    return max(1, -(-len(x_NC) // n_chunks))


def _add_product(sum_IO: Tensor, x_IN: Tensor, y_NO: Tensor, *, first: bool) -> None:
    """Add x y to a float32 sum, or overwrite the sum if it is the first product."""
    if x_IN.dtype == torch.float32:
        sum_IO.addmm_(x_IN, y_NO, beta=0 if first else 1)
    elif first:
        sum_IO.copy_(x_IN @ y_NO)
    elif sum_IO.device.type not in CHUNK_BYTES:
        sum_IO += x_IN @ y_NO
    else:  # adding two dtypes is slow on a CPU: convert a block first
        size = max(1, BLOCK_ELEMENTS // sum_IO.shape[1])
        for sum_iO, product_iO in zip(sum_IO.split(size), (x_IN @ y_NO).split(size), strict=True):
            sum_iO += product_iO.float()


def chunked_cross_entropy(
    logits_backward: LogitsBackward,
    x_NC: Tensor,
    w_VC: Tensor,
    targets_N: Tensor,
    softcap: float | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """Compute the loss, and in the same pass its gradients, in chunks of tokens."""
    if not torch.is_grad_enabled():  # inside a Function grad mode is always off: tell it by detaching
        x_NC, w_VC = x_NC.detach(), w_VC.detach()
    return _ChunkedCrossEntropy.apply(logits_backward, x_NC, w_VC, targets_N, softcap, n_vocab or len(w_VC))


TORCH_LOSS = {"chunked": partial(chunked_cross_entropy, torch_logits_backward), "reference": reference_loss}
