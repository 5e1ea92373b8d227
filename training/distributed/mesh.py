"""How ranks are laid out: rank = copy x shard + place, and an expert's ranks are neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from training.config import Config, MeshConfig, ModelConfig
from training.errors import UserError


class MeshShape(NamedTuple):
    """Numbers of ranks. Rank = (copy x shard + place in the shard); its part of the experts is rank % expert."""

    replicate: int
    shard: int
    expert: int

    def __str__(self) -> str:
        split = f"weights split over {self.shard}" if self.shard > 1 else ""
        copies = f"{self.replicate} copies" if self.replicate > 1 else ""
        experts = f"experts split over {self.expert}" if self.expert > 1 else ""
        return ", ".join(filter(None, (copies, split, experts)))

    @property
    def has_collectives(self) -> bool:
        """Whether forward and backward need every rank: all have to make equally many."""
        return self.shard > 1 or self.expert > 1

    def local_rows(self, n: int, rank: int, is_expert: bool) -> range:
        """The rows, of n, of a parameter that lie on a rank: contiguous, as FSDP2 cuts them."""
        rows, n_shards, place = range(n), self.shard, rank % self.shard
        if is_expert and self.expert > 1:
            size = n // self.expert
            first = rank % self.expert * size
            rows, n_shards, place = range(first, first + size), max(1, self.shard // self.expert), place // self.expert
        size = -(-len(rows) // n_shards)
        return rows[min(place * size, len(rows)) : min((place + 1) * size, len(rows))]


def check_mesh(config: Config, size: int) -> None:
    """Raise UserError where the options cannot be carried out by so many ranks."""
    n_samples = config.batch_tokens // config.model.n_positions
    if n_samples < size:
        raise UserError(f"batch_tokens: {config.batch_tokens} are {n_samples} samples, fewer than {size} processes")
    mesh_shape(config.parallel.mesh, size, config.model)


def mesh_shape(section: MeshConfig, size: int, model: ModelConfig) -> MeshShape:
    """The section's numbers for so many ranks. Raises UserError where they do not multiply out."""
    replicate = section.replicate or size // section.shard
    if replicate * section.shard != size:
        wrong = f".shard: {section.shard} does not divide the {size} processes"
        if section.replicate:
            wrong = f": replicate {section.replicate} x shard {section.shard} is not {size}, the number of processes"
        raise UserError(f"parallel.mesh{wrong}; change the mesh, or start {max(1, replicate) * section.shard} of them")
    if size % section.expert:
        raise UserError(f"parallel.mesh.expert: {section.expert} does not divide the {size} processes")
    counts = [block.ffn.n_experts for block in model.blocks if block.ffn.type == "moe"]
    if section.expert > 1 and not counts:
        raise UserError(f"parallel.mesh.expert: {section.expert}, and the model has no experts; leave it out")
    for n_experts in counts:
        if n_experts % section.expert:
            raise UserError(f"parallel.mesh.expert: {section.expert} does not divide n_experts {n_experts}")
    return MeshShape(replicate, section.shard, section.expert)


class MeshGroups(NamedTuple):
    """The process groups of a grid with more than one rank; None where a group would be one rank."""

    shard: DeviceMesh | None  # for FSDP2: (shard,), or (replicate, shard)
    expert_shard: DeviceMesh | None  # the same among the ranks that hold the same experts
    expert: dist.ProcessGroup | None  # among which a layer's experts are split
    same_experts: dist.ProcessGroup | None  # the ranks that hold the same experts, where these are not sharded


def build_groups(mesh: MeshShape, device: torch.device) -> MeshGroups:
    """Make them. Collective."""
    replicate, shard, expert = mesh
    if not mesh.has_collectives:
        return MeshGroups(None, None, None, None)
    plain = None
    if shard > 1:
        root = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        plain = root if replicate > 1 else root["shard"]
    if expert == 1:
        return MeshGroups(plain, plain, None, None)
    if shard == 1:
        split = init_device_mesh(device.type, (replicate // expert, expert), mesh_dim_names=("same", "expert"))
        same = split.get_group("same") if replicate > expert else None
        return MeshGroups(None, None, split.get_group("expert"), same)
    sizes, names = (replicate, shard // expert, expert), ("replicate", "shard", "expert")
    split = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    of_experts = split["replicate", "shard"] if replicate > 1 else split["shard"]
    return MeshGroups(plain, of_experts, split.get_group("expert"), None)
