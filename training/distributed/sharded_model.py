"""A model distributed over ranks: local rows of each tensor, gradient sums, loading and gathering."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from training.distributed.mesh import MeshGroups, MeshShape
from training.distributed.muon_sharding import MatrixGather
from training.distributed.world import World
from training.kernels.table import saved_operators
from training.optim.parameters import FullShapes

# "selective" activation checkpointing saves the results of matmuls and kernels, which take most of the time.
SAVED_OPERATORS = {"aten::mm", "aten::addmm", "aten::bmm"} | saved_operators()


class ShardedTensor(NamedTuple):
    """A parameter or buffer of the model, and this rank's rows of it (indices of the first dimension)."""

    name: str
    parameter: Tensor  # as the model holds it: a DTensor after FSDP2, else the local rows; or a buffer
    local: nn.Parameter | None  # the optimizer's view of the same memory; None for a buffer
    shape: torch.Size  # of the full tensor
    rows: range  # of this rank
    rows_of_rank: list[range]
    is_expert: bool  # True if it belongs to experts that the mesh splits
    is_owner: bool  # True on the lowest rank that holds these rows: it saves them

    def local_rows(self) -> Tensor:
        """Return this rank's rows, sharing memory with the model."""
        return _local(self.parameter.detach())


class ShardedModel:
    """A model whose parameters, gradients and experts may be split over ranks."""

    def __init__(
        self, model: nn.Module, world: World, mesh: MeshShape, groups: MeshGroups, shapes: dict[str, torch.Size]
    ):
        """Wrap a model; `shapes` are the full shapes of parameters and buffers by name."""
        self.model, self.world, self.mesh, self.groups = model, world, mesh, groups
        self.tensors = {tensor.name: tensor for tensor in self._tensors(shapes)}
        self.activation_checkpointing = "none"
        self._block_forwards = [block.forward for block in model.blocks]
        self._parameters = [tensor for tensor in self.tensors.values() if tensor.local is not None]

    def _tensors(self, shapes: dict[str, torch.Size]) -> Iterator[ShardedTensor]:
        n_ranks = self.world.size
        for name, parameter in self.model.named_parameters():
            is_expert = self.mesh.expert > 1 and ".ffn.experts." in name
            rows_of_rank = [self.mesh.local_rows(shapes[name][0], rank, is_expert) for rank in range(n_ranks)]
            rows = rows_of_rank[self.world.rank]
            is_owner = rows_of_rank.index(rows) == self.world.rank
            local = parameter
            if hasattr(parameter, "to_local"):
                local = nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
            yield ShardedTensor(name, parameter, local, shapes[name], rows, rows_of_rank, is_expert, is_owner)
        for name, buffer in self.model.named_buffers():
            rows = range(len(buffer))
            yield ShardedTensor(name, buffer, None, shapes[name], rows, [rows] * n_ranks, False, self.world.is_main)

    def local_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, this rank's rows) of each parameter, for the optimizer."""
        return [(tensor.name, tensor.local) for tensor in self._parameters]

    def full_shapes(self) -> FullShapes:
        """Return the full shape of each local parameter, and the function that gathers full matrices for Muon."""
        shapes = {tensor.local: tensor.shape for tensor in self._parameters}
        rows = {tensor.local: tensor.rows_of_rank for tensor in self._parameters}
        return FullShapes(shapes, MatrixGather(shapes, rows, self.world, self.mesh.shard))

    def sum_gradients(self, metrics: Iterable[Tensor]) -> None:
        """Sum gradients and `metrics` over all ranks, in place; set `grad` of the local parameters. Collective."""
        if self.mesh.has_collectives:
            self.world.all_reduce_(metrics, name="the all-reduce of metrics")
            metrics = []
        if self.mesh.shard > 1:
            for tensor in self._parameters:
                # FSDP2 averages instead of summing, and may have reallocated the rows since the last step.
                n_copies = self.mesh.replicate * self.mesh.shard // (self.mesh.expert if tensor.is_expert else 1)
                tensor.local.data = tensor.local_rows()
                grad = tensor.parameter.grad
                tensor.local.grad = None if grad is None else _local(grad).mul_(n_copies)
            return
        with_grad = [tensor for tensor in self._parameters if tensor.local.grad is not None]
        replicated = [tensor.local.grad for tensor in with_grad if not tensor.is_expert]
        self.world.all_reduce_([*replicated, *metrics], name="the all-reduce of gradients")
        if self.groups.same_experts is not None:
            experts = [tensor.local.grad for tensor in with_grad if tensor.is_expert]
            self.world.all_reduce_(experts, self.groups.same_experts, "the all-reduce of experts' gradients")

    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the full gradient, a scalar on the device. Collective if parameters are split."""
        if not self.mesh.has_collectives:
            return _norms([p.grad for _, p in self.local_parameters() if p.grad is not None]).norm()
        owned = [t.local.grad for t in self._parameters if t.is_owner and t.local.grad is not None]
        sum_of_squares = _norms(owned).square().sum() if owned else torch.zeros((), device=self.world.device)
        self.world.all_reduce_([sum_of_squares], name="the all-reduce of the gradient norm")
        return sum_of_squares.sqrt()

    def norms_by_block(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the L2 norm over the tensors of each block, (n_layer,) on the device. Collective if they are split.

        `tensors` are this rank's rows, in the shapes of `local_parameters`, by the names of parameters of blocks.
        """
        is_split = self.mesh.has_collectives
        names = [name for name, tensor in tensors.items() if tensor.numel() and not (is_split and self._is_copy(name))]
        squares = [[torch.zeros((), device=self.world.device)] for _ in self.model.blocks]
        if names:
            for name, norm in zip(names, _norms([tensors[name] for name in names]), strict=True):
                squares[int(name.split(".")[1])].append(norm.square())
        sum_L = torch.stack([torch.stack(of_block).sum() for of_block in squares])
        if is_split:
            self.world.all_reduce_([sum_L], name="the all-reduce of norms by block")
        return sum_L.sqrt()

    def _is_copy(self, name: str) -> bool:
        """Return True if a lower rank holds the same rows."""
        return not self.tensors[name].is_owner

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in self._parameters:
            tensor.parameter.grad = tensor.local.grad = None

    @torch.no_grad()
    def load_full(self, full_value: Callable[[str, torch.Size], Tensor]) -> None:
        """Copy this rank's rows of `full_value(name, shape)` into each tensor, one tensor at a time."""
        for tensor in self.tensors.values():
            rows = slice(tensor.rows.start, tensor.rows.stop)
            tensor.local_rows().copy_(full_value(tensor.name, tensor.shape)[rows])

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other `weights` of local parameters, by name; afterwards both are bit for bit as before.

        Frozen parameters keep theirs: they have no average.
        """
        self.reshard()
        self._exchange(weights)
        try:
            yield
        finally:
            self.reshard()
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, Tensor]) -> None:
        for name, other in weights.items():
            rows = self.tensors[name].local_rows()
            kept = rows.clone()
            rows.copy_(other)
            other.copy_(kept)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors in full, in the main rank's host memory; {} on the other ranks. Collective."""
        if not self.mesh.has_collectives:
            return dict(self.model.state_dict()) if self.world.is_main else {}
        gathered = {tensor.name: self._gather(tensor) for tensor in self.tensors.values()}
        return gathered if self.world.is_main else {}

    def _gather(self, tensor: ShardedTensor) -> Tensor:
        """Return the full tensor on the main rank, an empty one elsewhere. Collective."""
        local = tensor.local_rows().cpu()
        if not self.world.is_main:
            if tensor.is_owner and tensor.rows:
                dist.send(local.contiguous(), 0)
            return local.new_empty(0)
        full = torch.empty(tensor.shape, dtype=local.dtype)
        for rank, rows in enumerate(tensor.rows_of_rank):
            if rows and tensor.rows_of_rank.index(rows) == rank:
                part = full[rows.start : rows.stop]
                part.copy_(local) if rank == 0 else dist.recv(part, rank)
        return full

    def set_activation_checkpointing(self, mode: str) -> None:
        """Recompute each block's forward in its backward (arXiv:1604.06174).

        "full" saves only the block's inputs; "selective" also saves the results of SAVED_OPERATORS.
        """
        self.activation_checkpointing = mode
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no global random state
        if mode == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _recompute_policy)
        for block, forward in zip(self.model.blocks, self._block_forwards, strict=True):
            # Set on the instance: a wrapper module would rename parameters, and FSDP's hooks must stay outside.
            # A function, because torch.compile would silently skip a functools.partial.
            block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, **options)

    def compile(self) -> None:
        """Compile each block with torch.compile, in place."""
        # Types of blocks, training and evaluation, and smaller micro-batches are separate programs of one function.
        # Beyond this limit PyTorch silently runs uncompiled.
        torch._dynamo.config.cache_size_limit = 8 * len(self.model.blocks)
        # Backward rotates the gradients of query and key, then concatenates them. On an H100 the fused kernel takes six
        # times as long as its memory traffic needs; 0 disables this fusion (PyTorch 2.13 and later).
        if hasattr(torch._inductor.config, "max_complex_pointwise_cat_inputs"):
            torch._inductor.config.max_complex_pointwise_cat_inputs = 0
        for block in self.model.blocks:
            block.compile()

    def set_last_micro_batch(self, is_last: bool) -> None:
        """Mark the next backward as the last of this step or not: hybrid FSDP sums over replicas only in the last."""
        if self.mesh.shard > 1 and self.mesh.replicate > 1:
            self.model.set_requires_all_reduce(is_last)

    def reshard(self) -> None:
        """Free the parameters that FSDP2 gathered, after a forward without a backward."""
        if self.mesh.shard > 1:
            self.model.reshard()


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return norms whose root sum of squares is the total L2 norm."""
    if tensors[0].device.type == "cpu":  # by rows first: one float32 sum of 2e7 squares was wrong by 1e-3
        tensors = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _recompute_policy(_context: object, operator: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    is_saved = operator.name().partition(".")[0] in SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
