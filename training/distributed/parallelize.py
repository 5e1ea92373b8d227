"""Apply expert parallelism, FSDP2 and activation checkpointing to a model, in place. Parameter names do not change."""

import torch
from torch import nn

from training.config import ParallelConfig
from training.distributed.expert_parallel import split_experts
from training.distributed.mesh import MeshGroups, build_groups, mesh_shape
from training.distributed.sharded_model import ShardedModel
from training.distributed.world import World
from training.errors import UserError


def parallelize(model: nn.Module, config: ParallelConfig, world: World, dtype: torch.dtype) -> ShardedModel:
    """Distribute the model over the ranks of `config.mesh`; `dtype` is the compute dtype. Collective.

    A model on the meta device gets uninitialized memory on the rank's device, for this rank's part only. Raises
    UserError if the mesh does not fit.
    """
    mesh = mesh_shape(config.mesh, world.size, model.config)
    groups = build_groups(mesh, world.device)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    if mesh.expert > 1:
        for experts in (block.ffn.experts for block in model.blocks if hasattr(block.ffn, "experts")):
            split_experts(experts, groups.expert)
    if mesh.shard > 1:
        _fully_shard(model, groups, dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=world.device)
    sharded = ShardedModel(model, world, mesh, groups, shapes)
    if config.recompute != "none":
        sharded.set_activation_checkpointing(config.recompute)
    return sharded


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
