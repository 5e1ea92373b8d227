"""Expert parallelism: each rank holds some experts of a layer; all-to-alls send tokens to their experts and back.

Shapes as in kernels/experts.py. R = N x K rows are sorted by expert, so also by rank; S rows are received; P ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed.world import all_to_all_rows
from training.kernels.experts import Dispatch, permute, sort_by_expert, unpermute


def split_experts(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep only this rank's experts of a layer, in place; its forward becomes a collective that uses all experts.

    The forward synchronizes with the device once, to read the row counts on the host.
    """
    size, rank, local_forward = group.size(), group.rank(), experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(size)[rank].clone()))

    @torch.compiler.disable  # the number of received rows changes every step
    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        offsets_E = dispatch.offsets_E.long()
        sent_PE = offsets_E.diff(prepend=offsets_E.new_zeros(1)).view(size, -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=group)
        sent_P, received_P = torch.stack([sent_PE.sum(1), received_PE.sum(1)]).tolist()
        x_SC = all_to_all_rows(permute(x_NC, dispatch), sent_P, received_P, group)
        local_E = torch.arange(received_PE.shape[1], device=x_NC.device).repeat(size)
        expert_S1 = local_E.repeat_interleave(received_PE.flatten(), output_size=sum(received_P))[:, None]
        one_S1 = weight_NK.new_ones(len(x_SC), 1)
        y_SC = local_forward(x_SC, expert_S1, one_S1, sort_by_expert(expert_S1, received_PE.shape[1]))
        return unpermute(all_to_all_rows(y_SC, received_P, sent_P, group), weight_NK, dispatch)

    experts.forward = forward  # set on the instance: a wrapper module would rename parameters
