"""The two matrix products of a layer of experts, each with what it takes to get tokens to experts and back.

Shapes: N tokens, K experts a token, R = N x K rows (a token once for each of its experts, sorted by expert), E experts,
C channels, F hidden channels. Weights are laid out like `nn.Linear`'s, one matrix an expert.

A kernel is two functions: `up` takes tokens to their experts, x_NC -> y_RF for each of several matrices; `down` takes
rows back to their tokens, h_RF -> y_NC, the sum of each token's rows by their weights. No row is scattered: sums are
over each token's rows in order, forward and backward, and so are the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatch(NamedTuple):
    """Which row is whose."""

    order_R: Tensor  # int64: the place of each row in (N, K)
    token_R: Tensor  # int64: its token
    inverse_NK: Tensor  # int64: the row of each token's k-th expert
    expert_R: Tensor  # int64, sorted
    offsets_E: Tensor  # int32: where each expert's rows end


def sort_by_expert(topk_ids_NK: Tensor, n_experts: int) -> Dispatch:
    """Sort tokens by their experts, and an expert's by their order; nothing here waits for the device."""
    expert_R, order_R = topk_ids_NK.flatten().sort(stable=True)
    places = torch.arange(len(order_R), device=order_R.device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, places)
    offsets_E = torch.searchsorted(expert_R, torch.arange(n_experts, device=order_R.device), right=True, out_int32=True)
    return Dispatch(order_R, order_R // topk_ids_NK.shape[1], inverse_R.view_as(topk_ids_NK), expert_R, offsets_E)


class ExpertKernel(NamedTuple):
    """A kernel."""

    up: Callable[[Tensor, tuple[Tensor, ...], Dispatch], tuple[Tensor, ...]]  # x_NC, of w_EFC, dispatch -> of y_RF
    down: Callable[[Tensor, Tensor, Tensor, Dispatch], Tensor]  # h_RF, w_ECF, weight_NK, dispatch -> y_NC


class GroupedMatmul(NamedTuple):
    """GroupedMatmul of rows sorted by expert with matrices; I inputs, O outputs."""

    rows: Callable[[Tensor, Tensor, Tensor], Tensor]  # x_RI, w_EIO, offsets_E -> y_RO
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]  # y_RO, x_RI, offsets_E -> w_EOI, each expert's y.T x


class _Up(torch.autograd.Function):
    """Tokens to rows, and through matrices. Rows are gathered again in backward rather than kept.

    If `join`, the matrices of each expert are joined, and their products one; again in backward, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, products: GroupedMatmul, join: bool, token_R, inverse_NK, offsets_E, x_NC: Tensor, *w_EFC: Tensor
    ):
        ctx.products, ctx.join, ctx.hidden = products, join, w_EFC[0].shape[1]
        ctx.save_for_backward(token_R, inverse_NK, offsets_E, x_NC, *w_EFC)
        x_RC = x_NC.index_select(0, token_R)
        return _split(ctx, [products.rows(x_RC, w.mT, offsets_E) for w in _joined(ctx, w_EFC)])

    @staticmethod
    def backward(ctx: Any, *grad_RF: Tensor):
        products = ctx.products
        token_R, inverse_NK, offsets_E, x_NC, *w_EFC = ctx.saved_tensors
        x_RC = x_NC.index_select(0, token_R)
        grad_RF = [grad.contiguous() for grad in _joined(ctx, grad_RF)]
        grad_w = [products.outer(grad, x_RC, offsets_E) for grad in grad_RF]
        grad_x = [
            _combine(products.rows(grad, w, offsets_E), inverse_NK, None)
            for grad, w in zip(grad_RF, _joined(ctx, w_EFC), strict=True)
        ]
        return None, None, None, None, None, sum(grad_x[1:], grad_x[0]), *_split(ctx, grad_w)


def _joined(ctx: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """One of all, where that is asked for."""
    return [torch.cat(tensors, dim=1)] if ctx.join else tensors


def _split(ctx: Any, joined: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What is each matrix's."""
    return tuple(part for each in joined for part in each.split(ctx.hidden, dim=1))


class _Down(torch.autograd.Function):
    """Rows through a matrix, and back to their tokens by weight."""

    @staticmethod
    def forward(ctx: Any, products: GroupedMatmul, order_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_NK):
        ctx.products = products
        y_RC = products.rows(h_RF, w_ECF.mT, offsets_E)
        ctx.save_for_backward(order_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_NK, y_RC)
        return _combine(y_RC, inverse_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor):
        products = ctx.products
        order_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_NK, y_RC = ctx.saved_tensors
        grad_RC, grad_weight = _uncombine(grad_NC, order_R, inverse_NK, y_RC, weight_NK)
        grad_h = products.rows(grad_RC, w_ECF, offsets_E)
        grad_w = products.outer(grad_RC, h_RF, offsets_E)
        return None, None, None, None, grad_h, grad_w, grad_weight


def _combine(y_RC: Tensor, inverse_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """The sum of each token's rows, by weight if there are any."""
    if weight_NK is not None:
        weight_NK = weight_NK.to(y_RC.dtype)
    if y_RC.device.type == "cuda":  # several times as fast, and a compiler makes one pass of it
        y_NKC = y_RC[inverse_NK]
        return (y_NKC if weight_NK is None else y_NKC.mul_(weight_NK[..., None])).sum(dim=1)
    return F.embedding_bag(inverse_NK, y_RC, per_sample_weights=weight_NK, mode="sum")


def _uncombine(
    grad_NC: Tensor, order_R: Tensor, inverse_NK: Tensor, y_RC: Tensor, weight_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward of `_combine` by weight: gradients of y_RC and of weight_NK."""
    grad_RC = grad_NC.index_select(0, order_R // weight_NK.shape[1])
    grad_weight_R = (grad_RC * y_RC).sum(dim=-1, dtype=weight_NK.dtype)
    grad_RC *= weight_NK.flatten().index_select(0, order_R).to(grad_RC.dtype)[:, None]
    return grad_RC, grad_weight_R[inverse_NK]


class _ToRows(torch.autograd.Function):
    """x_NC -> x_RC."""

    @staticmethod
    def forward(ctx: Any, token_R: Tensor, inverse_NK: Tensor, x_NC: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_NC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor):
        return None, None, _combine(grad_RC, *ctx.saved_tensors, None)


class _ToTokens(torch.autograd.Function):
    """y_RC -> y_NC, by weight."""

    @staticmethod
    def forward(ctx: Any, order_R: Tensor, inverse_NK: Tensor, y_RC: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, inverse_NK, y_RC, weight_NK)
        return _combine(y_RC, inverse_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor):
        return None, None, *_uncombine(grad_NC, *ctx.saved_tensors)


def permute(x_NC: Tensor, dispatch: Dispatch) -> Tensor:
    """Each token once for each of its experts, x_RC: the way to experts that are elsewhere."""
    return _ToRows.apply(dispatch.token_R, dispatch.inverse_NK, x_NC)


def unpermute(y_RC: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """The way back: the sum of each token's rows by their weights, y_NC."""
    return _ToTokens.apply(dispatch.order_R, dispatch.inverse_NK, y_RC, weight_NK)


def _experts(products: GroupedMatmul) -> ExpertKernel:
    def up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
        # In training on CUDA less time; where nothing is learned, each token would pay for it.
        join = x_NC.device.type == "cuda" and len(w_EFC) > 1 and torch.is_grad_enabled()
        return _Up.apply(products, join, dispatch.token_R, dispatch.inverse_NK, dispatch.offsets_E, x_NC, *w_EFC)

    def down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        return _Down.apply(products, dispatch.order_R, dispatch.inverse_NK, dispatch.offsets_E, h_RF, w_ECF, weight_NK)

    return ExpertKernel(up, down)


def _grouped_rows(x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return F.grouped_mm(x_RI, w_EIO, offs=offsets_E)


def _grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_E: Tensor) -> Tensor:
    return F.grouped_mm(y_RO.mT, x_RI, offs=offsets_E)


_OPS = __name__.replace(".", "_")  # a file that an export brings has operators of its own


# Operators to a compiler, which would make a new program of every step's row counts.
@torch.library.custom_op(f"{_OPS}::loop_matmul", mutates_args=())
def _loop_matmul(x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    y_RO = x_RI.new_empty(len(x_RI), w_EIO.shape[2])
    for (start, end, rounded), w_IO in zip(_spans(x_RI, offsets_E), w_EIO.unbind(0), strict=True):
        if rounded <= len(x_RI):  # with rows of the experts after it, whose own products are written over these
            torch.mm(x_RI[start:rounded], w_IO, out=y_RO[start:rounded])
        else:
            y_RO[start:end] = (_zero_padded(x_RI[start:end], rounded - end) @ w_IO)[: end - start]
    return y_RO


@torch.library.custom_op(f"{_OPS}::loop_outer", mutates_args=())
def _loop_outer(y_RO: Tensor, x_RI: Tensor, offsets_E: Tensor) -> Tensor:
    w_EOI = x_RI.new_empty(len(offsets_E), y_RO.shape[1], x_RI.shape[1])
    for (start, end, rounded), w_OI in zip(_spans(x_RI, offsets_E), w_EOI.unbind(0), strict=True):
        if rounded > len(x_RI):
            y, x = (_zero_padded(rows[start:end], rounded - end) for rows in (y_RO, x_RI))
            torch.mm(y.mT, x, out=w_OI)
            continue
        # Rows of the experts after it come along; in the narrower of both they are zeros as long as this takes.
        others = min(y_RO, x_RI, key=lambda rows: rows.shape[1])[end:rounded]
        kept = others.clone()
        others.zero_()
        torch.mm(y_RO[start:rounded].mT, x_RI[start:rounded], out=w_OI)
        others.copy_(kept)
    return w_EOI


@_loop_matmul.register_fake
def _loop_matmul_shape(x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:  # noqa: ARG001 (one signature)
    return x_RI.new_empty(len(x_RI), w_EIO.shape[2])


@_loop_outer.register_fake
def _loop_outer_shape(y_RO: Tensor, x_RI: Tensor, offsets_E: Tensor) -> Tensor:
    return x_RI.new_empty(len(offsets_E), y_RO.shape[1], x_RI.shape[1])


def _spans(x_RI: Tensor, offsets_E: Tensor) -> list[tuple[int, int, int]]:
    """Where the rows of each expert begin and end, and where they would end if their number were a round one.

    On a CPU a product of 16-bit numbers has a program for each number of rows, which takes longer to write than several
    products do (oneDNN). So numbers are rounded up, to a multiple of 16 or, where that is less than an eighth more, of
    a larger power of two. Reads the counts on the host, which on a GPU waits for the device.
    """
    ends = offsets_E.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if x_RI.device.type != "cpu" or x_RI.element_size() != 2:
        return [(start, end, end) for start, end in spans]
    steps = [1 << max(4, (end - start).bit_length() - 4) for start, end in spans]
    return [(start, end, start - (start - end) // step * step) for (start, end), step in zip(spans, steps, strict=True)]


def _zero_padded(rows: Tensor, n: int) -> Tensor:
    """The rows, and n of zeros."""
    if n == 0:
        return rows
    padded = rows.new_empty(len(rows) + n, rows.shape[1])
    padded[: len(rows)] = rows
    padded[len(rows) :] = 0
    return padded


def _reference_rows(x_RI: Tensor, w_EOI: Tensor, expert_R: Tensor) -> Tensor:
    """Each row through every expert's matrix, of which its own is kept."""
    y_RO = x_RI.new_zeros(len(x_RI), w_EOI.shape[1])
    for expert, w_OI in enumerate(w_EOI):
        y_RO = torch.where((expert_R == expert)[:, None], x_RI @ w_OI.T, y_RO)
    return y_RO


def _reference_up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    return tuple(_reference_rows(x_NC[dispatch.token_R], w, dispatch.expert_R) for w in w_EFC)


def _reference_down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    y_RC = _reference_rows(h_RF, w_ECF, dispatch.expert_R)
    weight_R = weight_NK.flatten()[dispatch.order_R].to(y_RC.dtype)
    return y_RC.new_zeros(len(weight_NK), y_RC.shape[1]).index_add(0, dispatch.token_R, y_RC * weight_R[:, None])


GROUPED = _experts(GroupedMatmul(_grouped_rows, _grouped_outer))
LOOP = _experts(GroupedMatmul(_loop_matmul, _loop_outer))
REFERENCE = ExpertKernel(_reference_up, _reference_down)


def _any_up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    return _able(x_NC, w_EFC[0]).up(x_NC, w_EFC, dispatch)


def _any_down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    return _able(h_RF, w_ECF).down(h_RF, w_ECF, weight_NK, dispatch)


def _able(x: Tensor, w_EOI: Tensor) -> ExpertKernel:
    """The grouped product where this torch has it for these tensors, else the loop."""
    aligned = all(width * x.element_size() % 16 == 0 for width in w_EOI.shape[1:])
    typed = x.device.type == "cpu" or x.dtype == torch.bfloat16
    return GROUPED if hasattr(F, "grouped_mm") and aligned and typed else LOOP


PORTABLE = ExpertKernel(_any_up, _any_down)  # for a model that is opened anywhere
TORCH_EXPERTS = {"grouped": GROUPED, "loop": LOOP, "reference": REFERENCE}
