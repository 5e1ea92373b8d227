"""The experts' matmuls in Triton. They gather tokens and scatter results themselves, so no permuted copy is stored.

Shapes are those of `experts.py`; also I inputs, O outputs, tiles of T rows of one expert, S = N x K flattened
(token, k). The grid has the largest possible number of tiles, and each tile finds its expert on the device, so the host
never waits for row counts. There are no atomic additions: each row is written to its own place, and a token's results
are summed in order, so the bits repeat. Accumulation is in float32; float32 inputs are not rounded to TF32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# By bytes of an element: max rows and columns of the block of a matmul that one program computes, terms of the sum per
# step, warps, pipeline stages. They need up to 96 KiB of shared memory.
TILES = {2: (128, 64, 8, 3), 4: (64, 32, 4, 2)}
GROUP = tl.constexpr(8)  # consecutive programs cover this many tiles x all columns, to reuse operands in the L2 cache


@triton.jit
def _locate_tile(tile, offsets_E, n_experts, T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (expert, first row, end of the expert's rows). The expert is n_experts if the tile does not exist."""
    e = tl.arange(0, BLOCK_E)
    end_E = tl.load(offsets_E + e, mask=e < n_experts, other=0)
    start_E = tl.load(offsets_E + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    n_tiles_E = tl.cdiv(end_E - start_E, T)
    tiles_end_E = tl.cumsum(n_tiles_E, 0)
    expert = tl.sum((tiles_end_E <= tile).to(tl.int32), 0)
    first_E = start_E + (tile - (tiles_end_E - n_tiles_E)) * T
    is_this_E = e == expert
    return expert, tl.sum(tl.where(is_this_E, first_E, 0), 0), tl.sum(tl.where(is_this_E, end_E, 0), 0)


@triton.jit
def _matmul_kernel(
    x,  # (any, I)
    w_EIO,
    y,  # (any, O)
    offsets_E,
    from_R,  # row of x to read for each row; None: the same row
    to_R,  # row of y to write for each row; None: the same row
    weight_R,  # factor of each row of the result, or None
    h_RO,  # for dot_PR, or None
    dot_PR,  # row sums of (unweighted result x h_RO), one per column block P
    base,  # shaped like y: added to the result, or None
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
    n_tiles, n_blocks = tl.cdiv(n_rows, T) + n_experts, tl.cdiv(n_out, BLOCK_O)
    group, member = tl.program_id(0) // (GROUP * n_blocks), tl.program_id(0) % (GROUP * n_blocks)
    n_members = tl.minimum(n_tiles - group * GROUP, GROUP)
    tile, block = group * GROUP + member % n_members, member // n_members
    expert, first, end = _locate_tile(tile, offsets_E, n_experts, T, BLOCK_E)
    if expert >= n_experts:
        return

    row_T = first + tl.arange(0, T)
    is_row_T = row_T < end
    row_T = tl.minimum(row_T, end - 1).to(tl.int64)  # rows past the end repeat the last row and are not written
    from_T = row_T if from_R is None else tl.load(from_R + row_T)
    to_T = row_T if to_R is None else tl.load(to_R + row_T)
    i, o = tl.arange(0, BLOCK_I), block * BLOCK_O + tl.arange(0, BLOCK_O)
    x_TI = x + from_T[:, None] * n_in + i[None, :]
    w_IO = w_EIO + expert.to(tl.int64) * stride_e + i[:, None] * stride_i + o[None, :] * stride_o
    sum_TO = tl.zeros((T, BLOCK_O), tl.float32)
    for offset in range(0, n_in, BLOCK_I):
        remaining = BLOCK_I if EVEN else n_in - offset
        a_TI = tl.load(x_TI, mask=i[None, :] < remaining, other=0.0)
        b_IO = tl.load(w_IO, mask=(i[:, None] < remaining) & (o[None, :] < n_out), other=0.0)
        sum_TO = tl.dot(a_TI, b_IO, sum_TO, input_precision="ieee")
        x_TI += BLOCK_I
        w_IO += BLOCK_I * stride_i

    is_inside_TO = is_row_T[:, None] & (o[None, :] < n_out)
    if h_RO is not None:
        h_TO = tl.load(h_RO + row_T[:, None] * n_out + o[None, :], mask=is_inside_TO, other=0.0)
        tl.store(dot_PR + block.to(tl.int64) * n_rows + row_T, tl.sum(sum_TO * h_TO, 1), mask=is_row_T)
    if weight_R is not None:
        sum_TO *= tl.load(weight_R + row_T)[:, None]
    to_TO = to_T[:, None] * n_out + o[None, :]
    if base is not None:
        sum_TO += tl.load(base + to_TO, mask=is_inside_TO, other=0.0)
    tl.store(y + to_TO, sum_TO.to(y.dtype.element_ty), mask=is_inside_TO)


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
    expert, n_blocks = tl.program_id(1), tl.cdiv(n_out, BLOCK_O)
    start = tl.load(offsets_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_E + expert)
    i = (tl.program_id(0) // n_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (tl.program_id(0) % n_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_IO = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for first in range(start, end, T):
        row_T = first + tl.arange(0, T).to(tl.int64)
        is_row_T = row_T < end
        token_T = tl.load(token_R + row_T, mask=is_row_T, other=0)
        is_x_TI, is_y_TO = is_row_T[:, None] & (i[None, :] < n_in), is_row_T[:, None] & (o[None, :] < n_out)
        x_TI = tl.load(x_NI + token_T[:, None] * n_in + i[None, :], mask=is_x_TI, other=0)
        y_TO = tl.load(y_RO + row_T[:, None] * n_out + o[None, :], mask=is_y_TO, other=0)
        if weight_R is not None:
            weight_T = tl.load(weight_R + row_T, mask=is_row_T, other=0.0)
            x_TI = (x_TI * weight_T[:, None]).to(x_TI.dtype)
        sum_IO = tl.dot(tl.trans(x_TI), y_TO, sum_IO, input_precision="ieee")
    to_IO = w_EIO + expert.to(tl.int64) * stride_e + i[:, None] * stride_i + o[None, :] * stride_o
    tl.store(to_IO, sum_IO.to(w_EIO.dtype.element_ty), mask=(i[:, None] < n_in) & (o[None, :] < n_out))


# The launches are custom operators, which torch.compile does not trace.
_OPS = __name__.replace(".", "_")


@torch.library.custom_op(f"{_OPS}::matmul", mutates_args=())
def _matmul(
    x: Tensor,
    w_EIO: Tensor,
    offsets_E: Tensor,
    from_R: Tensor | None = None,
    to_R: Tensor | None = None,
    weight_R: Tensor | None = None,
    h_RO: Tensor | None = None,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply each row by its expert's matrix, see `_matmul_kernel`. Returns y (R, O) and dot_PR."""
    y, dot_PR = _matmul_shapes(x, w_EIO, offsets_E, from_R, to_R, weight_R, h_RO, base)
    x, h_RO = x.contiguous(), None if h_RO is None else h_RO.contiguous()
    (n_experts, n_in, n_out), n_rows = w_EIO.shape, len(y)
    side, inner, warps, stages = TILES[x.element_size()]
    T = min(side, max(16, triton.next_power_of_2(n_rows // n_experts)))
    n_tiles = triton.cdiv(n_rows, T) + n_experts  # each expert may have a partial tile
    _matmul_kernel[(n_tiles * triton.cdiv(n_out, side),)](
        *(x, w_EIO, y, offsets_E, from_R, to_R, weight_R, h_RO, None if h_RO is None else dot_PR, base),
        *(n_rows, n_experts, n_in, n_out, *w_EIO.stride()),
        EVEN=n_in % inner == 0,
        T=T,
        BLOCK_I=inner,
        BLOCK_O=side,
        BLOCK_E=triton.next_power_of_2(n_experts),
        num_warps=warps,
        num_stages=stages,
    )
    return y, dot_PR


@_matmul.register_fake
def _matmul_shapes(x, w_EIO, offsets_E, from_R=None, to_R=None, weight_R=None, h_RO=None, base=None):  # noqa: ARG001
    n_rows, n_out = len(x if from_R is None else from_R), w_EIO.shape[2]
    n_blocks = 0 if h_RO is None else triton.cdiv(n_out, TILES[x.element_size()][0])
    return x.new_empty(n_rows, n_out), x.new_empty(n_blocks, n_rows, dtype=torch.float32)


@torch.library.custom_op(f"{_OPS}::grouped_outer", mutates_args=())
def _grouped_outer(
    x_NI: Tensor, y_RO: Tensor, offsets_E: Tensor, token_R: Tensor, weight_R: Tensor | None, transposed: bool
) -> Tensor:
    """Return each expert's weighted sum of outer products of x and y rows: w_EIO, or w_EOI if `transposed`."""
    w_E__ = _empty_w(x_NI, y_RO, offsets_E, token_R, weight_R, transposed)
    x_NI, y_RO, n_in, n_out = x_NI.contiguous(), y_RO.contiguous(), x_NI.shape[1], y_RO.shape[1]
    side, inner, warps, stages = TILES[x_NI.element_size()]
    _outer_kernel[(triton.cdiv(n_in, side) * triton.cdiv(n_out, side), len(offsets_E))](
        *(x_NI, y_RO, w_E__, offsets_E, token_R, weight_R),
        *(n_in, n_out, *(w_E__.mT if transposed else w_E__).stride()),
        BLOCK_I=side,
        BLOCK_O=side,
        T=inner,
        num_warps=warps,
        num_stages=stages,
    )
    return w_E__


@_grouped_outer.register_fake
def _empty_w(x_NI, y_RO, offsets_E, token_R, weight_R, transposed):  # noqa: ARG001 (one signature)
    n_in, n_out = x_NI.shape[1], y_RO.shape[1]
    return x_NI.new_empty(len(offsets_E), *((n_out, n_in) if transposed else (n_in, n_out)))


class UpProjection(torch.autograd.Function):
    """Implements `ExpertKernel.up`: gather tokens into rows and project them by one or more matrices."""

    @staticmethod
    def forward(ctx: Any, order_R, token_R, inverse_NK, _expert_R, offsets_E, x_NC: Tensor, *w_EFC: Tensor):
        ctx.top_k = inverse_NK.shape[1]
        ctx.save_for_backward(order_R, token_R, offsets_E, x_NC, *w_EFC)
        return tuple(_matmul(x_NC, w.mT, offsets_E, from_R=token_R)[0] for w in w_EFC)

    @staticmethod
    def backward(ctx: Any, *grad_RF: Tensor):
        order_R, token_R, offsets_E, x_NC, *w_EFC = ctx.saved_tensors
        grad_SC = None
        for grad, w in zip(grad_RF, w_EFC, strict=True):
            grad_SC, _ = _matmul(grad, w, offsets_E, to_R=order_R, base=grad_SC)
        grad_w = [
            _grouped_outer(x_NC, grad, offsets_E, token_R, None, True) if needs_w else None
            for grad, needs_w in zip(grad_RF, ctx.needs_input_grad[6:], strict=True)
        ]
        return None, None, None, None, None, grad_SC.unflatten(0, (-1, ctx.top_k)).sum(dim=1), *grad_w


class DownProjection(torch.autograd.Function):
    """Implements `ExpertKernel.down`: project rows by a matrix and sum each token's rows by their weights."""

    @staticmethod
    def forward(ctx: Any, order_R, token_R, inverse_NK, _expert_R, offsets_E, h_RF, w_ECF, weight_NK):
        weight_R = weight_NK.flatten().index_select(0, order_R)
        ctx.save_for_backward(token_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_R)
        y_SC, _ = _matmul(h_RF, w_ECF.mT, offsets_E, to_R=order_R, weight_R=weight_R)
        return y_SC.unflatten(0, (-1, weight_NK.shape[1])).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor):
        token_R, inverse_NK, offsets_E, h_RF, w_ECF, weight_R = ctx.saved_tensors
        # The gradient of a weight is <grad, w h> = <grad w, h>, so w h need not be saved.
        grad_h_RF, dot_PR = _matmul(grad_NC, w_ECF, offsets_E, from_R=token_R, weight_R=weight_R, h_RO=h_RF)
        grad_w_ECF = None
        if ctx.needs_input_grad[6]:
            grad_w_ECF = _grouped_outer(grad_NC, h_RF, offsets_E, token_R, weight_R, False)
        return None, None, None, None, None, grad_h_RF, grad_w_ECF, dot_PR.sum(dim=0).to(weight_R.dtype)[inverse_NK]
