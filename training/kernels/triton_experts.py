"""The experts' products in Triton: tokens go to rows and rows to tokens inside of them, so neither is written out.

Shapes are those of `experts.py`. A product has I inputs and O outputs; a tile is T rows of an expert; S = N x K are the
places (token, k). The grid has as many tiles as there could be, and each finds its expert on the device, so nothing
waits for row counts. A row's result is written to its own place and a token's places are summed in order: no atomics,
and so the same bits every time. Sums are float32, and products of float32 are no less.

Triton is not everywhere: this file is imported where one of its functions is called, by `kernels/__init__.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.kernels.experts import Dispatch, ExpertKernel


class Blocks(NamedTuple):
    """The piece of a product that one program computes. The defaults are for 16-bit types."""

    side: int = 128  # rows and columns of the result, at most
    inner: int = 64  # of the sum, at a time
    warps: int = 8
    stages: int = 3  # pieces of the sum that are on their way at a time: 96 KiB of shared memory

    @classmethod
    def of(cls, x: Tensor) -> Blocks:
        return cls() if x.element_size() == 2 else cls(side=64, inner=32, warps=4, stages=2)


GROUP = tl.constexpr(8)  # tiles that go through all columns together, to find each other's operands in L2


# --- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _tile_of(place, offsets_E, n_experts, T: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows) of the place-th tile; beyond the last, the expert is none."""
    e = tl.arange(0, BLOCK_E)
    end_E = tl.load(offsets_E + e, mask=e < n_experts, other=0)
    start_E = tl.load(offsets_E + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    n_tiles_E = tl.cdiv(end_E - start_E, T)
    until_E = tl.cumsum(n_tiles_E, 0)
    expert = tl.sum((until_E <= place).to(tl.int32), 0)
    first_E = start_E + (place - (until_E - n_tiles_E)) * T
    mine_E = e == expert
    return expert, tl.sum(tl.where(mine_E, first_E, 0), 0), tl.sum(tl.where(mine_E, end_E, 0), 0)


@triton.jit
def _rows_kernel(
    x,  # (any, I)
    w_EIO,
    y,  # (any, O)
    offsets_E,
    from_R,  # the row of x for each row; None: its own
    to_R,  # the row of y for each row; None: its own
    weight_R,  # factors of the results, or None
    h_RO,  # to be multiplied with the results before they are weighted, or None
    dot_PR,  # the sums of that, in P parts
    added,  # to y, and like it; or None
    n_rows,
    n_experts,
    n_in,
    n_out,
    stride_e,
    stride_i,
    stride_o,
    EVEN: tl.constexpr,  # BLOCK_I divides n_in
    T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    n_tiles, n_parts = tl.cdiv(n_rows, T) + n_experts, tl.cdiv(n_out, BLOCK_O)
    group, member = tl.program_id(0) // (GROUP * n_parts), tl.program_id(0) % (GROUP * n_parts)
    n_members = tl.minimum(n_tiles - group * GROUP, GROUP)
    tile, part = group * GROUP + member % n_members, member // n_members
    expert, first, end = _tile_of(tile, offsets_E, n_experts, T, BLOCK_E)
    if expert >= n_experts:
        return

    row_T = first + tl.arange(0, T)
    real_T = row_T < end
    row_T = tl.minimum(row_T, end - 1).to(tl.int64)  # what is read in place of none is not written
    from_T = row_T if from_R is None else tl.load(from_R + row_T)
    to_T = row_T if to_R is None else tl.load(to_R + row_T)
    i, o = tl.arange(0, BLOCK_I), part * BLOCK_O + tl.arange(0, BLOCK_O)
    x_TI = x + from_T[:, None] * n_in + i[None, :]
    w_IO = w_EIO + expert.to(tl.int64) * stride_e + i[:, None] * stride_i + o[None, :] * stride_o
    sum_TO = tl.zeros((T, BLOCK_O), tl.float32)
    for done in range(0, n_in, BLOCK_I):
        left = BLOCK_I if EVEN else n_in - done
        piece_TI = tl.load(x_TI, mask=i[None, :] < left, other=0.0)
        piece_IO = tl.load(w_IO, mask=(i[:, None] < left) & (o[None, :] < n_out), other=0.0)
        sum_TO = tl.dot(piece_TI, piece_IO, sum_TO, input_precision="ieee")
        x_TI += BLOCK_I
        w_IO += BLOCK_I * stride_i

    real_TO = real_T[:, None] & (o[None, :] < n_out)
    if h_RO is not None:
        h_TO = tl.load(h_RO + row_T[:, None] * n_out + o[None, :], mask=real_TO, other=0.0)
        tl.store(dot_PR + part.to(tl.int64) * n_rows + row_T, tl.sum(sum_TO * h_TO, 1), mask=real_T)
    if weight_R is not None:
        sum_TO *= tl.load(weight_R + row_T)[:, None]
    to_TO = to_T[:, None] * n_out + o[None, :]
    if added is not None:
        sum_TO += tl.load(added + to_TO, mask=real_TO, other=0.0)
    tl.store(y + to_TO, sum_TO.to(y.dtype.element_ty), mask=real_TO)


@triton.jit
def _outer_kernel(
    x_NI,
    y_RO,
    w_EIO,
    offsets_E,
    token_R,
    weight_R,  # factors of the rows, or None
    n_in,
    n_out,
    stride_e,
    stride_i,
    stride_o,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    T: tl.constexpr,
):
    expert, n_parts = tl.program_id(1), tl.cdiv(n_out, BLOCK_O)
    start = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_E + expert)
    i = (tl.program_id(0) // n_parts) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (tl.program_id(0) % n_parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_IO = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for first in range(start, end, T):
        row_T = first + tl.arange(0, T).to(tl.int64)
        real_T = row_T < end
        token_T = tl.load(token_R + row_T, mask=real_T, other=0)
        x_TI = tl.load(x_NI + token_T[:, None] * n_in + i[None, :], mask=real_T[:, None] & (i[None, :] < n_in), other=0)
        y_TO = tl.load(y_RO + row_T[:, None] * n_out + o[None, :], mask=real_T[:, None] & (o[None, :] < n_out), other=0)
        if weight_R is not None:
            weight_T = tl.load(weight_R + row_T, mask=real_T, other=0.0)
            x_TI = (x_TI * weight_T[:, None]).to(x_TI.dtype)
        sum_IO = tl.dot(tl.trans(x_TI), y_TO, sum_IO, input_precision="ieee")
    to_IO = w_EIO + expert.to(tl.int64) * stride_e + i[:, None] * stride_i + o[None, :] * stride_o
    tl.store(to_IO, sum_IO.to(w_EIO.dtype.element_ty), mask=(i[:, None] < n_in) & (o[None, :] < n_out))


# --- their launch ----------------------------------------------------------------------------------

# Operators, which compilers leave alone.
_OPS = __name__.replace(".", "_")


def _launch_rows(x, w_EIO, y, offsets_E, *, from_R=None, to_R=None, weight_R=None, h_RO=None, dot_PR=None, added=None):
    x, blocks = x.contiguous(), Blocks.of(x)
    (n_experts, n_in, n_out), n_rows = w_EIO.shape, len(y)
    T = min(blocks.side, max(16, triton.next_power_of_2(n_rows // n_experts)))
    n_tiles = triton.cdiv(n_rows, T) + n_experts  # every expert may have one that is not full
    _rows_kernel[(n_tiles * triton.cdiv(n_out, blocks.side),)](
        *(x, w_EIO, y, offsets_E, from_R, to_R, weight_R, h_RO, dot_PR, added),
        *(n_rows, n_experts, n_in, n_out, *w_EIO.stride()),
        EVEN=n_in % blocks.inner == 0,
        T=T,
        BLOCK_I=blocks.inner,
        BLOCK_O=blocks.side,
        BLOCK_E=triton.next_power_of_2(n_experts),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


@torch.library.custom_op(f"{_OPS}::gather_matmul", mutates_args=())
def _gather_matmul(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor, token_R: Tensor) -> Tensor:
    """Each row's token through its expert's matrix: y_RO."""
    y_RO = _gather_matmul_shape(x_NI, w_EIO, offsets_E, token_R)
    _launch_rows(x_NI, w_EIO, y_RO, offsets_E, from_R=token_R)
    return y_RO


@_gather_matmul.register_fake
def _gather_matmul_shape(x_NI, w_EIO, offsets_E, token_R):  # noqa: ARG001 (one signature)
    return x_NI.new_empty(len(token_R), w_EIO.shape[2])


@torch.library.custom_op(f"{_OPS}::gather_matmul_weighted", mutates_args=())
def _gather_matmul_weighted(
    x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor, token_R: Tensor, weight_R: Tensor, h_RO: Tensor
) -> tuple[Tensor, Tensor]:
    """The same times each row's weight, y_RO, and before that each row's product with h, in P parts: dot_PR."""
    y_RO, dot_PR = _gather_matmul_weighted_shapes(x_NI, w_EIO, offsets_E, token_R, weight_R, h_RO)
    h_RO = h_RO.contiguous()
    _launch_rows(x_NI, w_EIO, y_RO, offsets_E, from_R=token_R, weight_R=weight_R, h_RO=h_RO, dot_PR=dot_PR)
    return y_RO, dot_PR


@_gather_matmul_weighted.register_fake
def _gather_matmul_weighted_shapes(x_NI, w_EIO, offsets_E, token_R, weight_R, h_RO):  # noqa: ARG001
    n_rows, n_parts = len(token_R), triton.cdiv(w_EIO.shape[2], Blocks.of(x_NI).side)
    return x_NI.new_empty(n_rows, w_EIO.shape[2]), x_NI.new_empty(n_parts, n_rows, dtype=torch.float32)


@torch.library.custom_op(f"{_OPS}::matmul_scatter", mutates_args=())
def _matmul_scatter(
    x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor, order_R: Tensor, weight_R: Tensor | None, added_SO: Tensor | None
) -> Tensor:
    """Each row through its expert's matrix, times its weight, to its place and what is there already: y_SO."""
    y_SO = _matmul_scatter_shape(x_RI, w_EIO, offsets_E, order_R, weight_R, added_SO)
    _launch_rows(x_RI, w_EIO, y_SO, offsets_E, to_R=order_R, weight_R=weight_R, added=added_SO)
    return y_SO


@_matmul_scatter.register_fake
def _matmul_scatter_shape(x_RI, w_EIO, offsets_E, order_R, weight_R, added_SO):  # noqa: ARG001
    return x_RI.new_empty(len(order_R), w_EIO.shape[2])


@torch.library.custom_op(f"{_OPS}::grouped_outer", mutates_args=())
def _grouped_outer(
    x_NI: Tensor, y_RO: Tensor, offsets_E: Tensor, token_R: Tensor, weight_R: Tensor | None, turned: bool
) -> Tensor:
    """Each expert's sum over its rows of token (outer) row, by weight: w_EIO, or turned w_EOI."""
    w_E__ = _grouped_outer_shape(x_NI, y_RO, offsets_E, token_R, weight_R, turned)
    x_NI, y_RO, blocks = x_NI.contiguous(), y_RO.contiguous(), Blocks.of(x_NI)
    n_in, n_out = x_NI.shape[1], y_RO.shape[1]
    _outer_kernel[(triton.cdiv(n_in, blocks.side) * triton.cdiv(n_out, blocks.side), len(offsets_E))](
        *(x_NI, y_RO, w_E__, offsets_E, token_R, weight_R),
        *(n_in, n_out, *(w_E__.mT if turned else w_E__).stride()),
        BLOCK_I=blocks.side,
        BLOCK_O=blocks.side,
        T=blocks.inner,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return w_E__


@_grouped_outer.register_fake
def _grouped_outer_shape(x_NI, y_RO, offsets_E, token_R, weight_R, turned):  # noqa: ARG001
    n_in, n_out = x_NI.shape[1], y_RO.shape[1]
    return x_NI.new_empty(len(offsets_E), *((n_out, n_in) if turned else (n_in, n_out)))


# --- forward and backward --------------------------------------------------------------------------


class _TritonUp(torch.autograd.Function):
    """Tokens to rows, and through matrices."""

    @staticmethod
    def forward(
        ctx: Any, order_R: Tensor, token_R: Tensor, offsets_E: Tensor, top_k: int, x_NC: Tensor, *w_EFC: Tensor
    ):
        ctx.top_k = top_k
        ctx.save_for_backward(order_R, token_R, offsets_E, x_NC, *w_EFC)
        return tuple(_gather_matmul(x_NC, w.mT, offsets_E, token_R) for w in w_EFC)

    @staticmethod
    def backward(ctx: Any, *grad_RF: Tensor):
        order_R, token_R, offsets_E, x_NC, *w_EFC = ctx.saved_tensors
        grad_SC = None
        for grad, w in zip(grad_RF, w_EFC, strict=True):
            grad_SC = _matmul_scatter(grad, w, offsets_E, order_R, None, grad_SC)
        grad_w = [_grouped_outer(x_NC, grad, offsets_E, token_R, None, True) for grad in grad_RF]
        return None, None, None, None, _summed(grad_SC, ctx.top_k), *grad_w


class _TritonDown(torch.autograd.Function):
    """Rows through a matrix, and back to their tokens by weight."""

    @staticmethod
    def forward(ctx: Any, order_R, token_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_NK):
        weight_R = weight_NK.flatten().index_select(0, order_R)
        ctx.save_for_backward(token_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_R)
        return _summed(_matmul_scatter(h_RF, w_ECF.mT, offsets_E, order_R, weight_R, None), weight_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor):
        token_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_R = ctx.saved_tensors
        # A weight's gradient is <grad, w h> = <grad w, h>, so results of rows need not be kept.
        grad_h_RF, dot_PR = _gather_matmul_weighted(grad_NC, w_ECF, offsets_E, token_R, weight_R, h_RF)
        grad_w_ECF = _grouped_outer(grad_NC, h_RF, offsets_E, token_R, weight_R, False)
        return None, None, None, None, grad_h_RF, grad_w_ECF, dot_PR.sum(dim=0).to(weight_R.dtype)[inverse_NK]


def _summed(y_SC: Tensor, top_k: int) -> Tensor:
    """The sum of each token's places."""
    return y_SC.unflatten(0, (-1, top_k)).sum(dim=1)


def _up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    return _TritonUp.apply(
        dispatch.order_R, dispatch.token_R, dispatch.offsets_E, dispatch.inverse_NK.shape[1], x_NC, *w_EFC
    )


def _down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    return _TritonDown.apply(
        dispatch.order_R, dispatch.token_R, dispatch.inverse_NK, dispatch.offsets_E, h_RF, w_ECF, weight_NK
    )


TRITON = ExpertKernel(_up, _down)
