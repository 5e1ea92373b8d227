"""The matmuls of a Mixture-of-Experts layer, including the permutation of tokens to experts and back.

Shapes: N tokens, K experts per token, R = N x K rows (one for each token and each of its experts, sorted by expert),
E experts, C channels, F hidden channels. Weights are laid out as in `nn.Linear`, one matrix per expert. No kernel but
the reference uses atomic additions: each token's rows are summed in order, so the bits repeat from run to run.

>>> topk_ids_NK, weight_NK = torch.tensor([[0, 2], [2, 1]]), torch.full((2, 2), 0.5)
>>> x_NC, up_EFC, down_ECF = torch.randn(2, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 16)
>>> kernel, dispatch = TORCH_EXPERTS["loop"], sort_by_expert(topk_ids_NK, n_experts=3)
>>> (h_RF,) = kernel.up(x_NC, (up_EFC,), dispatch)
>>> kernel.down(h_RF.relu(), down_ECF, weight_NK, dispatch).shape
torch.Size([2, 8])
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatch(NamedTuple):
    """The assignment of rows to tokens and experts."""

    order_R: Tensor  # int64: index of each row in the flattened (N, K)
    token_R: Tensor  # int64: token of each row
    inverse_NK: Tensor  # int64: row of each token's k-th expert
    expert_R: Tensor  # int64, sorted: expert of each row
    offsets_E: Tensor  # int32: end of each expert's rows

    @property
    def count_E(self) -> Tensor:
        """The number of each expert's rows, int32."""
        return self.offsets_E.diff(prepend=self.offsets_E.new_zeros(1))


def sort_by_expert(topk_ids_NK: Tensor, n_experts: int) -> Dispatch:
    """Sort tokens by expert, and within an expert by token. Does not synchronize with the device."""
    expert_R, order_R = topk_ids_NK.flatten().sort(stable=True)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    offsets_E = torch.searchsorted(expert_R, torch.arange(n_experts, device=order_R.device), right=True, out_int32=True)
    return Dispatch(order_R, order_R // topk_ids_NK.shape[1], inverse_R.view_as(topk_ids_NK), expert_R, offsets_E)


class ExpertKernel(NamedTuple):
    """One implementation of a layer's matmuls."""

    # x_NC, several w_EFC, dispatch -> y_RF for each of them: permute the tokens to rows, then project
    up: Callable[[Tensor, tuple[Tensor, ...], Dispatch], tuple[Tensor, ...]]
    # h_RF, w_ECF, weight_NK, dispatch -> y_NC: project, then sum each token's rows by their weights
    down: Callable[[Tensor, Tensor, Tensor, Dispatch], Tensor]
    # operators whose results selective activation checkpointing saves, because they are slow to recompute
    saved_operators: tuple[str, ...] = ()


class _Projection(torch.autograd.Function):
    """Project rows by one or more matrices, after permuting tokens to rows if `token_R` is not None.

    Backward permutes again instead of saving the rows. If `join`, the matrices are concatenated for one matmul, and
    again in backward.
    """

    @staticmethod
    def forward(ctx: Any, matmul, outer, join: bool, offsets_E, token_R, inverse_NK, x: Tensor, *w_EOI: Tensor):
        ctx.matmul, ctx.outer, ctx.join, ctx.n_out = matmul, outer, join, w_EOI[0].shape[1]
        ctx.save_for_backward(offsets_E, token_R, inverse_NK, x, *w_EOI)
        x_RI = x if token_R is None else x.index_select(0, token_R)
        return _split(ctx, [matmul(x_RI, w.mT, offsets_E) for w in _join(ctx, w_EOI)])

    @staticmethod
    def backward(ctx: Any, *grad_RO: Tensor):
        offsets_E, token_R, inverse_NK, x, *w_EOI = ctx.saved_tensors
        x_RI = x if token_R is None else x.index_select(0, token_R)
        grad_RO = [grad.contiguous() for grad in _join(ctx, grad_RO)]
        needs_w = any(ctx.needs_input_grad[7:])  # not if the experts are frozen
        grad_w = [ctx.outer(grad, x_RI, offsets_E) for grad in grad_RO] if needs_w else []
        pairs = zip(grad_RO, _join(ctx, w_EOI), strict=True)
        grad_x = (ctx.matmul(grad, w, offsets_E) for grad, w in pairs)  # one at a time in memory
        grad_x = [grad if token_R is None else _combine(grad, inverse_NK, None) for grad in grad_x]
        return (
            None,
            None,
            None,
            None,
            None,
            None,
            sum(grad_x[1:], grad_x[0]),
            *(_split(ctx, grad_w) or [None] * len(w_EOI)),
        )


def _join(ctx: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat(tensors, dim=1)] if ctx.join else tensors


def _split(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Undo `_join`."""
    return tuple(part for each in tensors for part in each.split(ctx.n_out, dim=1))


def _combine(y_RC: Tensor, inverse_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """Sum each token's rows, weighted unless `weight_NK` is None."""
    weight_NK = None if weight_NK is None else weight_NK.to(y_RC.dtype)
    if y_RC.device.type == "cuda":  # several times faster than embedding_bag; compiles to one kernel
        y_NKC = y_RC[inverse_NK]
        return (y_NKC if weight_NK is None else y_NKC.mul_(weight_NK[..., None])).sum(dim=1)
    return F.embedding_bag(inverse_NK, y_RC, per_sample_weights=weight_NK, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_R: Tensor, inverse_NK: Tensor, x_NC: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_NC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor):
        return None, None, _combine(grad_RC, *ctx.saved_tensors, None)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order_R: Tensor, inverse_NK: Tensor, y_RC: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, inverse_NK, y_RC, weight_NK)
        return _combine(y_RC, inverse_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor):
        order_R, inverse_NK, y_RC, weight_NK = ctx.saved_tensors
        grad_RC = grad_NC.index_select(0, order_R // weight_NK.shape[1])
        grad_weight_R = (grad_RC * y_RC).sum(dim=-1, dtype=weight_NK.dtype)
        grad_RC *= weight_NK.flatten().index_select(0, order_R).to(grad_RC.dtype)[:, None]
        return None, None, grad_RC, grad_weight_R[inverse_NK]


def permute(x_NC: Tensor, dispatch: Dispatch) -> Tensor:
    """Return x_RC, a copy of each token for each of its experts. For experts on other ranks."""
    return _Permute.apply(dispatch.token_R, dispatch.inverse_NK, x_NC)


def unpermute(y_RC: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """Return y_NC, the weighted sum of each token's rows."""
    return _Unpermute.apply(dispatch.order_R, dispatch.inverse_NK, y_RC, weight_NK)


def _build_kernel(matmul: Callable[..., Tensor], outer: Callable[..., Tensor], *saved_operators: str) -> ExpertKernel:
    """Return the kernel that computes with grouped matmuls of rows (I inputs, O outputs), sorted by expert.

    `matmul` maps x_RI, w_EIO, offsets_E to y_RO, each row times its expert's matrix. `outer` maps y_RO, x_RI, offsets_E
    to w_EOI, each expert's y.T x.
    """

    def up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
        # One matmul is faster in training on CUDA. In generation, copying the weights for each token would be slower.
        join = x_NC.device.type == "cuda" and len(w_EFC) > 1 and torch.is_grad_enabled()
        _, token_R, inverse_NK, _, offsets_E = dispatch
        return _Projection.apply(matmul, outer, join, offsets_E, token_R, inverse_NK, x_NC, *w_EFC)

    def down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        (y_RC,) = _Projection.apply(matmul, outer, False, dispatch.offsets_E, None, None, h_RF, w_ECF)
        return unpermute(y_RC, weight_NK, dispatch)

    return ExpertKernel(up, down, saved_operators)


_OPS = __name__.replace(".", "_")  # a copy of this file in an export gets its own operator names


# Custom operators, because torch.compile would recompile the loops for each step's row counts.
@torch.library.custom_op(f"{_OPS}::loop_matmul", mutates_args=())
def _loop_matmul(x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    y_RO = x_RI.new_empty(len(x_RI), w_EIO.shape[2])
    for (start, end, rounded), w_IO in zip(_spans(x_RI, offsets_E), w_EIO.unbind(0), strict=True):
        if rounded <= len(x_RI):  # computes rows of the next experts too, which they overwrite
            torch.mm(x_RI[start:rounded], w_IO, out=y_RO[start:rounded])
        else:
            y_RO[start:end] = (_zero_padded(x_RI, start, end, rounded) @ w_IO)[: end - start]
    return y_RO


@torch.library.custom_op(f"{_OPS}::loop_outer", mutates_args=())
def _loop_outer(y_RO: Tensor, x_RI: Tensor, offsets_E: Tensor) -> Tensor:
    w_EOI = x_RI.new_empty(len(offsets_E), y_RO.shape[1], x_RI.shape[1])
    y_is_narrower = y_RO.shape[1] <= x_RI.shape[1]
    for (start, end, rounded), w_OI in zip(_spans(x_RI, offsets_E), w_EOI.unbind(0), strict=True):
        # The padded range overlaps the next experts' rows: copy the narrower operand, with zeros in that range.
        is_last = rounded > len(x_RI)
        y = _zero_padded(y_RO, start, end, rounded) if is_last or y_is_narrower else y_RO[start:rounded]
        x = _zero_padded(x_RI, start, end, rounded) if is_last or not y_is_narrower else x_RI[start:rounded]
        torch.mm(y.mT, x, out=w_OI)
    return w_EOI


_loop_matmul.register_fake(lambda x, w_EIO, _: x.new_empty(len(x), w_EIO.shape[2]))
_loop_outer.register_fake(lambda y, x, offsets_E: x.new_empty(len(offsets_E), y.shape[1], x.shape[1]))


def _spans(x_RI: Tensor, offsets_E: Tensor) -> list[tuple[int, int, int]]:
    """Return (first row, end, rounded end) of each expert. Synchronizes with the device to read the row counts.

    On a CPU, oneDNN generates code for each row count of a 16-bit matmul, which takes longer than several matmuls. The
    count is therefore rounded up to a multiple of 16, or of a larger power of two if that adds at most an eighth.
    """
    ends = offsets_E.tolist()
    is_rounded = x_RI.device.type == "cpu" and x_RI.element_size() == 2
    spans = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        step = 1 << max(4, (end - start).bit_length() - 4) if is_rounded else 1
        spans.append((start, end, start - (start - end) // step * step))
    return spans


def _zero_padded(rows: Tensor, start: int, end: int, rounded: int) -> Tensor:
    """Return rows start..end, followed by zeros up to `rounded`; a view if no zeros are needed."""
    return rows[start:end] if rounded == end else F.pad(rows[start:end], (0, 0, 0, rounded - end))


def _reference_matmul(x_RI: Tensor, w_EOI: Tensor, expert_R: Tensor) -> Tensor:
    """Multiply all rows by each expert's matrix; keep the products of the expert's own rows."""
    y_RO = x_RI.new_zeros(len(x_RI), w_EOI.shape[1])
    for expert, w_OI in enumerate(w_EOI):
        y_RO = torch.where((expert_R == expert)[:, None], x_RI @ w_OI.T, y_RO)
    return y_RO


def _reference_up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    return tuple(_reference_matmul(x_NC[dispatch.token_R], w, dispatch.expert_R) for w in w_EFC)


def _reference_down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    y_RC = _reference_matmul(h_RF, w_ECF, dispatch.expert_R)
    weight_R = weight_NK.flatten()[dispatch.order_R].to(y_RC.dtype)
    return y_RC.new_zeros(len(weight_NK), y_RC.shape[1]).index_add(0, dispatch.token_R, y_RC * weight_R[:, None])


def pick_portable(x: Tensor, w_EOI: Tensor) -> ExpertKernel:
    """Return the grouped kernel if this version of PyTorch supports it for these tensors, else the loop."""
    is_aligned = all(width * x.element_size() % 16 == 0 for width in w_EOI.shape[1:])
    has_dtype = x.device.type == "cpu" or x.dtype == torch.bfloat16
    return TORCH_EXPERTS["grouped" if hasattr(F, "grouped_mm") and is_aligned and has_dtype else "loop"]


TORCH_EXPERTS = {
    "grouped": _build_kernel(
        lambda x_RI, w_EIO, offsets_E: F.grouped_mm(x_RI, w_EIO, offs=offsets_E),
        lambda y_RO, x_RI, offsets_E: F.grouped_mm(y_RO.mT, x_RI, offs=offsets_E),
        "aten::_grouped_mm",
    ),
    "loop": _build_kernel(_loop_matmul, _loop_outer, f"{_OPS}::loop_matmul"),
    "reference": ExpertKernel(_reference_up, _reference_down),
}
PORTABLE = ExpertKernel(  # for exported models, which run on any machine
    up=lambda x_NC, w_EFC, dispatch: pick_portable(x_NC, w_EFC[0]).up(x_NC, w_EFC, dispatch),
    down=lambda h_RF, w_ECF, *rest: pick_portable(h_RF, w_ECF).down(h_RF, w_ECF, *rest),
)
