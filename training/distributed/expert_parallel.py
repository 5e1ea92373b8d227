"""Expert parallelism: a layer's experts are split over ranks, and tokens travel to them and back.

Shapes as in kernels/experts.py: N tokens, K experts a token, R = N x K rows sorted by expert, so that what goes
to one rank lies together; S rows that came from all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.kernels.experts import Dispatch, permute, sort_by_expert, unpermute


def split_experts(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep this rank's experts of a layer, in place; its forward then is a collective that takes all of them.

    The counts that decide who gets how much are read on the host, once a layer.
    """
    size, rank, compute = group.size(), group.rank(), experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(size)[rank].clone()))

    @torch.compiler.disable  # how many rows come is another number in every step
    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        offsets_E = dispatch.offsets_E.long()
        sent_PE = offsets_E.diff(prepend=offsets_E.new_zeros(1)).view(size, -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=group)
        sent_P, received_P = torch.stack([sent_PE.sum(1), received_PE.sum(1)]).tolist()
        x_SC = _Exchange.apply(group, sent_P, received_P, permute(x_NC, dispatch))
        local = torch.arange(received_PE.shape[1], device=x_NC.device).repeat(size)
        expert_S1 = local.repeat_interleave(received_PE.flatten(), output_size=sum(received_P))[:, None]
        one_S1 = weight_NK.new_ones(len(x_SC), 1)
        y_SC = compute(x_SC, expert_S1, one_S1, sort_by_expert(expert_S1, received_PE.shape[1]))
        return unpermute(_Exchange.apply(group, received_P, sent_P, y_SC), weight_NK, dispatch)

    experts.forward = forward


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that they are for; their gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, sent_P: list[int], received_P: list[int], x_RC: Tensor) -> Tensor:
        ctx.group, ctx.sent_P, ctx.received_P = group, sent_P, received_P
        return _exchanged(group, sent_P, received_P, x_RC)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor):
        return None, None, None, _exchanged(ctx.group, ctx.received_P, ctx.sent_P, grad_SC)


def _exchanged(group: dist.ProcessGroup, sent_P: list[int], received_P: list[int], x_RC: Tensor) -> Tensor:
    y_SC = x_RC.new_empty(sum(received_P), x_RC.shape[1])
    dist.all_to_all_single(y_SC, x_RC.contiguous(), received_P, sent_P, group=group)
    return y_SC
