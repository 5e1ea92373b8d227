"""The device mesh, and the rows of each parameter that a rank holds.

rank = replica x shard + index within the shard group. It holds part rank % expert of each layer's experts.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from training.config import Config, MeshConfig, ModelConfig
from training.errors import UserError
from training.optim.batch_schedule import BatchSchedule


class MeshShape(NamedTuple):
    """Sizes of the mesh axes, named as in the options `parallel.mesh`."""

    replicate: int  # replicas of the sharded weights
    shard: int  # ranks that the weights are sharded over
    expert: int  # ranks that each layer's experts are split over

    def __str__(self) -> str:
        texts = (f"{self.replicate} copies", f"weights split over {self.shard}", f"experts split over {self.expert}")
        return ", ".join(text for size, text in zip(self, texts, strict=True) if size > 1)

    @property
    def has_collectives(self) -> bool:
        """True if forward and backward contain collectives, so that every rank must run the same number of them."""
        return self.shard > 1 or self.expert > 1

    def local_rows(self, n: int, rank: int, is_expert: bool) -> range:
        """Return the contiguous rows, of n, that a rank holds of a parameter. Same split as FSDP2."""
        rows, n_shards, index = range(n), self.shard, rank % self.shard
        if is_expert:
            size = n // self.expert
            rows = rows[rank % self.expert * size :][:size]
            n_shards, index = max(1, self.shard // self.expert), index // self.expert
        size = -(-len(rows) // n_shards)
        return rows[index * size : (index + 1) * size]


def check_mesh(config: Config, n_ranks: int) -> None:
    """Raise UserError if the options do not fit the number of ranks."""
    smallest = min(BatchSchedule.of(config).sizes())
    if (n_samples := smallest // config.model.n_positions) < n_ranks:
        option = "batch_schedule" if config.batch_tokens is None else "batch_tokens"
        problem = f"{smallest} are {n_samples} samples, fewer than {n_ranks} processes"
        raise UserError(f"{option}: {problem}; raise batch_tokens or start fewer processes")
    mesh_shape(config.parallel.mesh, n_ranks, config.model)


def mesh_shape(config: MeshConfig, n_ranks: int, model: ModelConfig) -> MeshShape:
    """Return the mesh for the number of ranks. Raises UserError if the axes do not fit it or the model's experts."""
    replicate = config.replicate or n_ranks // config.shard
    if (n_processes := max(1, replicate) * config.shard) != n_ranks:
        problem = f".shard: {config.shard} does not divide the {n_ranks} processes"
        if config.replicate:
            problem = f": replicate {config.replicate} x shard {config.shard} is not {n_ranks}, the number of processes"
        raise UserError(f"parallel.mesh{problem}; change the mesh, or start {n_processes} processes")
    if n_ranks % config.expert:
        raise UserError(f"parallel.mesh.expert: {config.expert} does not divide the {n_ranks} processes")
    counts = [block.ffn.n_experts for block in model.blocks if block.ffn.type == "moe"]
    if config.expert > 1 and not counts:
        raise UserError(f"parallel.mesh.expert: {config.expert}, but the model has no experts; remove the option")
    if uneven := [n_experts for n_experts in counts if n_experts % config.expert]:
        raise UserError(f"parallel.mesh.expert: {config.expert} does not divide n_experts {uneven[0]}")
    return MeshShape(replicate, config.shard, config.expert)


class MeshGroups(NamedTuple):
    """The process groups of a mesh; None for a group of one rank."""

    shard: DeviceMesh | None = None  # for FSDP2: (shard,), or (replicate, shard) for hybrid sharding
    expert_shard: DeviceMesh | None = None  # the same for experts: among the ranks that hold the same ones
    expert: dist.ProcessGroup | None = None  # the ranks that a layer's experts are split over
    same_experts: dist.ProcessGroup | None = None  # the ranks that hold the same experts, if these are not sharded


def build_groups(mesh: MeshShape, device: torch.device) -> MeshGroups:
    """Create the process groups. Collective."""
    replicate, shard, expert = mesh
    fsdp_axes = ("replicate", "shard") if replicate > 1 else "shard"
    fsdp = None
    if shard > 1:
        fsdp = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))[fsdp_axes]
    if expert == 1:
        return MeshGroups(fsdp, fsdp)
    if shard > 1:
        sizes, axes = (replicate, shard // expert, expert), ("replicate", "shard", "expert")
        split = init_device_mesh(device.type, sizes, mesh_dim_names=axes)
        return MeshGroups(fsdp, split[fsdp_axes], split.get_group("expert"))
    split = init_device_mesh(device.type, (replicate // expert, expert), mesh_dim_names=("same", "expert"))
    same = split.get_group("same") if replicate > expert else None
    return MeshGroups(expert=split.get_group("expert"), same_experts=same)
