"""A model put on several ranks, in place and from outside: it does not know.

Experts are split over ranks, blocks sharded, computed again, compiled. All of these keep the names of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from training.config import ParallelConfig
from training.distributed.expert_parallel import split_experts
from training.distributed.mesh import MeshGroups, MeshShape, build_groups, mesh_shape
from training.distributed.muon_sharding import MatrixGather
from training.distributed.world import World
from training.errors import UserError

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    SHARDS_ON_CPU = True
except ImportError:  # before PyTorch 2.6
    SHARDS_ON_CPU = False
    from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

# The operators whose results selective recomputation keeps: products and attention, which cost the time.
SAVED_OPERATORS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_grouped_mm",
    "training_kernels_experts::loop_matmul",
    "training_kernels_triton_experts::gather_matmul",
    "training_kernels_triton_experts::matmul_scatter",
    "training_kernels_attention_deterministic::flash",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward",
    "flash_attn_3::fwd",
}


class ShardedTensor(NamedTuple):
    """A parameter, or a buffer, as it lies on this rank."""

    name: str
    parameter: Tensor  # the model's own: rows of the whole, or a DTensor of them
    local: nn.Parameter | None  # what the optimizer updates, in the same memory; None for a buffer
    shape: torch.Size  # of the whole
    rows_of_rank: list[range]  # what each rank holds of the first dimension
    rank: int
    is_expert: bool
    is_owner: bool  # whether this rank writes its rows, where several hold the same

    @property
    def rows(self) -> range:
        """Those of this rank."""
        return self.rows_of_rank[self.rank]

    def local_rows(self) -> Tensor:
        """This rank's rows."""
        return _local(self.parameter.detach())


class ShardedModel:
    """Where a model's tensors lie, and the sums of their gradients."""

    def __init__(
        self, model: nn.Module, world: World, mesh: MeshShape, groups: MeshGroups, shapes: dict[str, torch.Size]
    ):
        self.model, self.world, self.mesh, self.groups = model, world, mesh, groups
        self.tensors = {shard.name: shard for shard in self._tensors(shapes)}
        self.activation_checkpointing, self.forwards = "none", [block.forward for block in model.blocks]
        self.learned = [shard for shard in self.tensors.values() if shard.local is not None]

    def _tensors(self, shapes: dict[str, torch.Size]) -> Iterator[ShardedTensor]:
        parameters, rank = dict(self.model.named_parameters()), self.world.rank
        for name, held in (parameters | dict(self.model.named_buffers())).items():
            shape, leaf, of_experts = shapes[name], None, name in parameters and ".experts." in name
            rows_of_rank = [range(shape[0])] * self.world.size
            if name in parameters:
                rows_of_rank = [self.mesh.local_rows(shape[0], rank, of_experts) for rank in range(self.world.size)]
                leaf = nn.Parameter(held.detach().to_local()) if hasattr(held, "to_local") else held
            writes = rows_of_rank.index(rows_of_rank[rank]) == rank
            yield ShardedTensor(name, held, leaf, shape, rows_of_rank, rank, of_experts, writes)

    def local_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer updates, by name: this rank's rows of each."""
        return [(shard.name, shard.local) for shard in self.learned]

    def full_shapes(self) -> dict[nn.Parameter, torch.Size]:
        """Of the whole parameters, by the leaves."""
        return {shard.local: shard.shape for shard in self.learned}

    def matrix_gather(self) -> MatrixGather:
        """Works on whole matrices, once each, where they are split or on several ranks."""
        rows = {shard.local: shard.rows_of_rank for shard in self.learned}
        return MatrixGather(self.full_shapes(), rows, self.world, self.mesh.shard)

    def sum_gradients(self, others: Iterable[Tensor]) -> None:
        """Sum the gradients, and other tensors, over the ranks, and give each leaf its rows. Collective."""
        plain = [
            shard.parameter.grad
            for shard in self.learned
            if shard.parameter is shard.local and shard.local.grad is not None
        ]
        if not self.mesh.has_collectives:
            self.world.all_reduce_([*plain, *others], what="the sum of gradients")
            return
        self.world.all_reduce_(others, what="the sum of metrics")
        if self.mesh.shard == 1:
            experts = [s.local.grad for s in self.learned if s.is_expert and s.local.grad is not None]
            held = {id(grad) for grad in experts}
            self.world.all_reduce_([grad for grad in plain if id(grad) not in held], what="the sum of gradients")
            if self.groups.same_experts is not None:
                self.world.all_reduce_(experts, self.groups.same_experts, what="the sum of experts' gradients")
            return
        for shard in self.learned:
            # FSDP2 averages, and may have moved the rows since.
            copies = self.mesh.replicate * self.mesh.shard // (self.mesh.expert if shard.is_expert else 1)
            shard.local.data = shard.local_rows()
            shard.local.grad = None if shard.parameter.grad is None else _local(shard.parameter.grad).mul_(copies)

    def grad_norm(self) -> Tensor:
        """The norm of the whole gradient. Collective where the parameters are split."""
        if not self.mesh.has_collectives:
            return _norms([p.grad for _, p in self.local_parameters() if p.grad is not None]).norm()
        mine = [shard.local.grad for shard in self.learned if shard.is_owner and shard.local.grad is not None]
        squares = torch.zeros((), device=self.world.device)
        if mine:
            squares = _norms(mine).square().sum()
        self.world.all_reduce_([squares], what="the norm of the gradient")
        return squares.sqrt()

    def zero_grad(self) -> None:
        """After an update, or of a step that is begun anew."""
        for shard in self.learned:
            shard.parameter.grad = shard.local.grad = None

    @torch.no_grad()
    def load_full(self, value: Callable[[str, torch.Size], Tensor]) -> None:
        """Give every tensor its rows of a whole value, one at a time."""
        for shard in self.tensors.values():
            shard.local_rows().copy_(value(shard.name, shard.shape)[shard.rows.start : shard.rows.stop])

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights, in the main rank's host memory; nothing on the others. Collective."""
        if not self.mesh.has_collectives:
            return dict(self.model.state_dict()) if self.world.is_main else {}
        gathered = {shard.name: self._gathered(shard) for shard in self.tensors.values()}
        return gathered if self.world.is_main else {}

    def _gathered(self, shard: ShardedTensor) -> Tensor:
        """The whole of one tensor, on the main rank. Collective."""
        mine = shard.local_rows().cpu()
        if not self.world.is_main:
            if shard.is_owner and shard.rows:
                dist.send(mine.contiguous(), 0)
            return mine.new_empty(0)
        whole = torch.empty(shard.shape, dtype=mine.dtype)
        for rank, rows in enumerate(shard.rows_of_rank):
            if rows and shard.rows_of_rank.index(rows) == rank:
                part = whole[rows.start : rows.stop]
                part.copy_(mine) if rank == 0 else dist.recv(part, rank)
        return whole

    def compile(self) -> None:
        """Compile the blocks, in place."""
        # Blocks of different kinds are different programs of one function, and so are training, evaluation and their
        # last batches; past the limit, PyTorch would go on uncompiled.
        torch._dynamo.config.cache_size_limit = 8 * len(self.model.blocks)
        # Gradients of query and key are turned back and joined: in one pass that chooses for each number, an H100 takes
        # six times as long as its memory needs. So each is written to its place (PyTorch 2.13 and later).
        if hasattr(torch._inductor.config, "max_complex_pointwise_cat_inputs"):
            torch._inductor.config.max_complex_pointwise_cat_inputs = 0
        for block in self.model.blocks:
            block.compile()

    def set_last_micro_batch(self, is_last: bool) -> None:
        """Whether the backward that comes is the step's last: sums over copies of what is sharded wait for it."""
        if self.mesh.shard > 1 and self.mesh.replicate > 1:
            self.model.set_requires_all_reduce(is_last)

    def reshard(self) -> None:
        """After a forward without backward: nothing is left gathered."""
        if self.mesh.shard > 1:
            self.model.reshard()

    def set_activation_checkpointing(self, kind: str) -> None:
        """From now on compute blocks again in the backward: "selective" or "full"."""
        self.activation_checkpointing = kind
        for block, forward in zip(self.model.blocks, self.forwards, strict=True):
            block.forward = _recomputed(forward, kind)


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each. On a CPU of each row first: one sum of 2e7 squares in float32 was off by a thousandth there."""
    if tensors[0].device.type == "cpu":
        tensors = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors))


def parallelize(model: nn.Module, section: ParallelConfig, world: World, dtype: torch.dtype) -> ShardedModel:
    """Put the model on the ranks that the mesh says; `dtype` is what it computes in. Collective.

    A model that is split may be on the meta device: this rank's part of it then is empty memory.
    """
    cells = mesh_shape(section.mesh, world.size, model.config)
    if cells.shard > 1 and world.device.type == "cpu" and not SHARDS_ON_CPU:
        raise UserError(f"parallel.mesh.shard: PyTorch {torch.__version__} shards on CUDA only; use a newer one")
    made = build_groups(cells, world.device)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    moes = [block.ffn for block in model.blocks if hasattr(block.ffn, "experts")]
    if cells.expert > 1:
        for moe in moes:
            split_experts(moe.experts, made.expert)
    if cells.shard > 1:
        _fully_shard(model, made, dtype)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=world.device)
    layout = ShardedModel(model, world, cells, made, shapes)
    if section.recompute != "none":
        layout.set_activation_checkpointing(section.recompute)
    return layout


def _recomputed(forward: Callable, kind: str) -> Callable:
    """A block's forward under activation checkpointing (arXiv:1604.06174)."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    return lambda *inputs: checkpoint(forward, *inputs, **options)


def _kept(_context: object, op: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if op.name().partition(".")[0] in SAVED_OPERATORS
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


def _fully_shard(model: nn.Module, made: MeshGroups, dtype: torch.dtype) -> None:
    """FSDP2, a block at a time. What a block casts when it computes is cast before it travels, the same bits.

    Routers compute in float32, and so do embeddings, which are in the model's own group.
    """
    cast = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        moe = block.ffn if hasattr(block.ffn, "experts") else None
        if moe is not None and cast.param_dtype is not None:
            fully_shard(moe.router, mesh=made.shard)
        if moe is not None and made.expert is not None:
            fully_shard(moe.experts, mesh=made.expert_shard, mp_policy=cast)
        fully_shard(block, mesh=made.shard, mp_policy=cast)
    fully_shard(model, mesh=made.shard)
    for method in ("logits", "routed_experts"):
        register_fsdp_forward_method(model, method)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
