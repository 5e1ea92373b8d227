"""Apply expert parallelism, FSDP2 and activation checkpointing to a model, in place. Parameter names do not change."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import ParallelConfig
from training.distributed.mesh import MeshGroups, build_groups, mesh_shape
from training.distributed.sharded_model import ShardedModel
from training.distributed.world import World, all_to_all_rows
from training.errors import UserError
from training.kernels.experts import Dispatch, permute, sort_by_expert, unpermute


def parallelize(model: nn.Module, config: ParallelConfig, world: World, dtype: torch.dtype) -> ShardedModel:
    """Distribute the model over the ranks of `config.mesh`; `dtype` is the compute dtype. Collective.

    A model on the meta device gets uninitialized memory on the rank's device, for this rank's part only. Compile with
    `ShardedModel.compile` once the micro-batch is known. Raises UserError if the mesh does not fit.
    """
    mesh = mesh_shape(config.mesh, world.size, model.config)
    groups = build_groups(mesh, world.device)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if mesh.expert > 1:
        for experts in (block.ffn.experts for block in model.blocks if hasattr(block.ffn, "experts")):
            _split_experts(experts, groups.expert)
    if mesh.shard > 1:
        _fully_shard(model, groups, dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=world.device)
    sharded = ShardedModel(model, world, mesh, groups, shapes)
    if config.recompute != "none":
        sharded.set_activation_checkpointing(config.recompute)
    return sharded


def _split_experts(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep only this rank's experts of a layer, in place; its forward becomes a collective that uses all experts.

    The forward synchronizes with the device once, to read the row counts on the host. Shapes as in kernels/experts.py;
    P ranks. The R = N x K rows to send are sorted by expert, so also by rank; S rows are received.
    """
    size, rank, local_forward = group.size(), group.rank(), experts.forward
    for name, parameter in experts.named_parameters():
        local = parameter.detach().chunk(size)[rank].clone()
        setattr(experts, name, nn.Parameter(local, requires_grad=parameter.requires_grad))

    @torch.compiler.disable  # the number of received rows changes every step
    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        sent_PE = dispatch.count_E.long().view(size, -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=group)
        sent_P, received_P = torch.stack([sent_PE.sum(1), received_PE.sum(1)]).tolist()
        x_SC = _Exchange.apply(permute(x_NC, dispatch), sent_P, received_P, group)
        local_E = torch.arange(received_PE.shape[1], device=x_NC.device).repeat(size)
        expert_S1 = local_E.repeat_interleave(received_PE.flatten(), output_size=sum(received_P))[:, None]
        one_S1 = weight_NK.new_ones(len(x_SC), 1)
        y_SC = local_forward(x_SC, expert_S1, one_S1, sort_by_expert(expert_S1, received_PE.shape[1]))
        return unpermute(_Exchange.apply(y_SC, received_P, sent_P, group), weight_NK, dispatch)

    experts.forward = forward  # set on the instance: a wrapper module would rename parameters


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows; the backward sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, sent_P: list[int], received_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received_P, sent_P, group
        return all_to_all_rows(x_RC, sent_P, received_P, group)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor):
        return all_to_all_rows(grad_SC, *ctx.way_back), None, None, None


def _fully_shard(model: nn.Module, groups: MeshGroups, dtype: torch.dtype) -> None:
    """Apply FSDP2 to each block, then to the rest of the model.

    FSDP2 casts a block's parameters to `dtype` before the all-gather, with the same bits as a cast in the forward.
    Routers and embeddings compute in float32: routers are separate FSDP groups, embeddings belong to the root group.
    """
    # Imported here: the import takes a second, and evaluation and export never shard.
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    except ImportError:  # PyTorch 2.5
        from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if groups.shard.device_type == "cpu":
            text = f"parallel.mesh.shard: PyTorch {torch.__version__} shards on CUDA only; use 2.6 or newer"
            raise UserError(text) from None
    cast = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        has_experts = hasattr(block.ffn, "experts")
        if has_experts and cast is not None:
            fully_shard(block.ffn.router, mesh=groups.shard)
        if has_experts and groups.expert is not None:
            fully_shard(block.ffn.experts, mesh=groups.expert_shard, mp_policy=policy)
        fully_shard(block, mesh=groups.shard, mp_policy=policy)
    fully_shard(model, mesh=groups.shard)
    for method in (model.logits, model.routed_experts):  # entry points other than `forward`
        register_fsdp_forward_method(model, method.__name__)
