"""Estimate the memory of a run on one device, without allocating it.

    estimate(config, micro_batch=8, world_size=4, device_type="cuda").total   # bytes at the peak

The real model and the real optimizer take two steps on fake tensors, which have shapes but no numbers. `StorageTracker`
counts every storage from its creation to its end; the peak is the moment with the most bytes. One process cannot show
everything, so mesh shares are scaled, weights gathered by FSDP2 come from a formula, and a stand-in for the exchange
between ranks creates the rows that arrive from other ranks.

Fake tensors are CPU tensors, because autograd rejects CUDA ones on a machine without a GPU. So attention counts as the
CPU's flash kernel (for a GPU without masks), which keeps the same tensors for backward as the GPU's. Workspaces of
libraries are not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.batch import Batch
from training.config import Config, MeshConfig
from training.device import DTYPES
from training.distributed.mesh import MeshShape, mesh_shape
from training.distributed.parallelize import ShardedModel, parallelize
from training.distributed.world import BUCKET, World
from training.kernels import loss
from training.kernels.attention import sdpa
from training.kernels.attention.masks import Documents
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.experts import TORCH_EXPERTS, Dispatch, permute, sort_by_expert, unpermute
from training.kernels.interface import AttentionBackend, Kernels
from training.model import GPT, layers
from training.model.moe import Experts
from training.model.stats import parameter_kinds
from training.optim.optimizer import Optimizer
from training.planning.batch_split import max_samples_per_rank

PROCESS_BYTES = 430 * 2**20  # Python, torch and other libraries: resident size of a run with a tiny model on a CPU
# glibc keeps freed memory (`device.keep_freed_memory`) in pieces that the next tensor may not fit. This share of
# activations and logits is fitted to the runs of benchmarks/plan_memory.py.
FRAGMENTATION = 0.5


class MemoryEstimate(NamedTuple):
    """Bytes on one device at the peak, by purpose."""

    weights: int  # and buffers
    casts: int  # weights cast to the compute dtype, or gathered from other ranks
    gradients: int
    optimizer: int  # its state, and temporary tensors of its step
    activations: int  # kept for backward, and temporary tensors of a layer
    logits: int  # of a chunk of tokens, and the gradients of the head
    routing: int  # additional activations if all tokens of all ranks go to this rank's experts
    fragmentation: int  # of the C library; 0 on a GPU
    save_copy: int  # that checkpoints are written from; 0 on a GPU, where it is in host memory
    process: int  # interpreter and libraries; 0 on a GPU
    in_step: bool  # True: the peak is in the optimizer step; False: in forward and backward

    def parts(self) -> dict[str, int]:
        """Return the bytes by purpose."""
        return dict(zip(self._fields[:-1], self[:-1], strict=True))

    @property
    def total(self) -> int:
        """The bytes of all purposes together."""
        return sum(self[:-1])


def estimate(config: Config, micro_batch: int, world_size: int = 1, device_type: str = "cpu") -> MemoryEstimate:
    """Estimate the memory of one of `world_size` devices. Takes a second or two for 12 layers.

    `precision` and `model.vocab_size` must be resolved. Raises UserError if the mesh does not fit `world_size`.
    """
    mesh = mesh_shape(config.parallel.mesh, world_size, config.model)
    even, in_step = _peak(config, micro_batch, world_size, device_type, mesh, worst_routing=False)
    peak = even
    if mesh.expert > 1:
        peak, in_step = _peak(config, micro_batch, world_size, device_type, mesh, worst_routing=True)
    on_cpu = device_type == "cpu"
    return MemoryEstimate(
        weights=peak["weights"],
        casts=peak["casts"],
        gradients=peak["gradients"],
        optimizer=peak["state"] + peak["optimizer"],
        activations=min(even["activations"], peak["activations"]),
        logits=peak["logits"],
        routing=max(0, peak["activations"] - even["activations"]),
        fragmentation=round(FRAGMENTATION * (peak["activations"] + peak["logits"])) if on_cpu else 0,
        save_copy=peak["weights"] + peak["state"] if on_cpu else 0,
        process=PROCESS_BYTES if on_cpu else 0,
        in_step=in_step,
    )


def largest_micro_batch(config: Config, limit: float, world_size: int = 1, device_type: str = "cpu") -> int:
    """Return the largest micro-batch within `limit` bytes, at most a rank's samples per step; 0 if none fits."""

    def needed(n_samples: int) -> int:
        return estimate(config, n_samples, world_size, device_type).total

    fits, too_large = 1, max_samples_per_rank(config, world_size)
    if (most := needed(too_large)) <= limit:
        return too_large
    if too_large == 1 or (least := needed(1)) > limit:
        return 0
    while too_large - fits > 1:  # interpolate: memory is almost linear in the samples
        n = fits + int((too_large - fits) * (limit - least) / (most - least))
        n = min(max(n, fits + 1), too_large - 1)
        if (n_bytes := needed(n)) <= limit:
            fits, least = n, n_bytes
        else:
            too_large, most = n, n_bytes
    return fits


class LiveStorage(NamedTuple):
    """A storage that is still referenced."""

    reference: weakref.ref
    kind: str
    n_bytes: int  # on this rank


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, by kind, until they are freed."""

    def __init__(self, mesh: MeshShape):
        super().__init__()
        self.kind = "activations"  # of new storages
        self.is_sharded = mesh.shard > 1
        self.live: dict[int, LiveStorage] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.live:
                self.count(tensor, *self._kind_and_share(func, args))
        return out

    def count(self, tensor: Tensor, kind: str, share: float = 1.0) -> None:
        """Count a tensor's storage, of which this rank has a share, as `kind` from now on."""
        storage = tensor.untyped_storage()
        key, n_bytes = id(storage), round(storage.nbytes() * share)
        if key in self.live:
            self._drop(key)
        self.live[key] = LiveStorage(weakref.ref(storage, lambda _: self._drop(key)), kind, n_bytes)
        self.now[kind] += n_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        storage = self.live.pop(key)
        self.now[storage.kind] -= storage.n_bytes

    def _kind_and_share(self, func: Any, args: tuple) -> tuple[str, float]:
        """Return kind and share of an operation's result. A result of weights alone is a cast of them.

        FSDP2 gathers a block's weights in the compute dtype, so there the cast itself takes no memory.
        """
        if self.kind != "activations":
            return self.kind, 1.0
        inputs = [self.live.get(id(x.untyped_storage())) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = {None if storage is None else storage.kind for storage in inputs}
        if not kinds or not kinds <= {"weights", "casts"}:
            return self.kind, 1.0
        is_gathered = self.is_sharded and kinds == {"weights"} and func is torch.ops.aten._to_copy.default
        return "casts", 0.0 if is_gathered else 1.0


def _peak(
    config: Config, micro_batch: int, world_size: int, device_type: str, mesh: MeshShape, *, worst_routing: bool
) -> tuple[Counter[str], bool]:
    """Return bytes by kind at the peak of the second step, and whether the peak was in the optimizer step."""
    per_rank = max_samples_per_rank(config, world_size)
    micro_batch, accumulates = min(micro_batch, per_rank), per_rank > micro_batch
    is_replicated = world_size > 1 and mesh.shard == 1
    dtype, tracker = DTYPES[config.precision], StorageTracker(mesh)
    with FakeTensorMode(), _without_cpu_paths(device_type), tracker:
        model, sharded = _build_model(config, mesh, dtype, device_type, worst_routing)
        shares = {parameter: _share(name, mesh) for name, parameter in model.named_parameters()}
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor, "weights", shares.get(tensor, 1.0))
        gathered = torch.empty(_gathered_bytes(model, mesh, dtype), dtype=torch.int8)
        tracker.count(gathered, "casts")
        optimizer = Optimizer(config.optim, sharded.local_parameters(), parameter_kinds(model), dtype)
        _add_hooks(model, shares, tracker)
        _create_gradients(shares, tracker)
        _optimizer_step(sharded, optimizer, shares, tracker, is_replicated)  # creates the optimizer state
        tracker.peak.clear()
        if accumulates:
            _create_gradients(shares, tracker)
        _forward_backward(model, micro_batch)
        before = tracker.peak.copy()
        _optimizer_step(sharded, optimizer, shares, tracker, is_replicated)
        return tracker.peak, tracker.peak != before


def _create_gradients(shares: dict[nn.Parameter, float], tracker: StorageTracker) -> None:
    for parameter, share in shares.items():
        parameter.grad = torch.empty_like(parameter)
        tracker.count(parameter.grad, "gradients", share)


@contextmanager
def _without_cpu_paths(device_type: str) -> Iterator[None]:
    """For a device other than a CPU, disable code paths that kernels take for CPU tensors, as fake tensors are.

    Replaces constants of their modules: arguments would pass through every layer for the sake of this estimate.
    """
    before = loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES
    if device_type != "cpu":
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = {}, 0, ()
    try:
        yield
    finally:
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = before


def _build_model(
    config: Config, mesh: MeshShape, dtype: torch.dtype, device_type: str, worst_routing: bool
) -> tuple[GPT, ShardedModel]:
    """Build the model with this rank's experts and all other weights, which `_share` scales."""
    name = config.parallel.attention
    attention = ATTENTION_BACKENDS[name if name == "reference" else "flash"]
    if device_type == "cpu" and any(getattr(block.mixer, "softcap", None) for block in config.model.blocks):
        attention = ATTENTION_BACKENDS["reference"]
    elif device_type != "cpu" and name not in ("reference", "sdpa", "efficient"):
        attention = AttentionBackend(lambda _: None, _flash_without_softcap)
    experts = TORCH_EXPERTS["reference" if config.parallel.experts == "reference" else "loop"]
    model = GPT(config.model, Kernels(attention, experts, _loss_kernel(config.parallel.loss, device_type)), dtype)
    for module in model.modules():
        if mesh.expert > 1 and isinstance(module, Experts):
            _split_experts(module, mesh.expert, mesh.expert if worst_routing else 1)
    one_device = config.parallel.model_copy(update={"mesh": MeshConfig()})
    return model, parallelize(model, one_device, World(0, 1, torch.device("cpu")), dtype)


def _loss_kernel(name: str, device_type: str) -> Callable[..., Tensor]:
    """Return the loss kernel; for a GPU by default one that needs no memory beside the logits, as Triton's does."""
    if name in loss.TORCH_LOSS or device_type == "cpu":
        return loss.TORCH_LOSS["chunked" if name in ("auto", "triton") else name]
    return partial(loss.chunked_cross_entropy, lambda _, targets_N, softcap, gradient: targets_N.float())  # noqa: ARG005


def _flash_without_softcap(*inputs: Any, scale: float | None, softcap: float | None) -> Tensor:  # noqa: ARG001 (GPU kernels apply it inside)
    return ATTENTION_BACKENDS["flash"].attend(*inputs, scale=scale)


def _share(name: str, mesh: MeshShape) -> float:
    """Return this rank's share of a parameter; experts are already split over `expert` ranks."""
    return 1 / max(1, mesh.shard // mesh.expert if ".experts." in name else mesh.shard)


def _gathered_bytes(model: GPT, mesh: MeshShape, dtype: torch.dtype) -> int:
    """Return the bytes of weights and gradients that FSDP2 has gathered at a time.

    Embeddings, head and last norm: float32, from forward to backward. Blocks: the current and the next one's weights
    and one's gradients in the compute dtype, and two blocks' gradients in float32 on their way to their ranks.
    """
    if mesh.shard == 1:
        return 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    return 4 * rest + max(blocks) * (3 * dtype.itemsize + 2 * 4)


def _add_hooks(model: GPT, shares: dict[nn.Parameter, float], tracker: StorageTracker) -> None:
    """Count what the head creates as logits, and finished gradients as gradients."""

    def set_kind(kind: str) -> Callable[..., None]:
        return lambda *_: setattr(tracker, "kind", kind)

    model.loss.register_forward_pre_hook(set_kind("logits"))
    model.loss.register_forward_hook(set_kind("activations"))
    for parameter, share in shares.items():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, share=share: tracker.count(parameter.grad, "gradients", share)
        )


def _forward_backward(model: GPT, micro_batch: int) -> None:
    tokens_BT = torch.zeros(micro_batch, model.config.n_positions, dtype=torch.int64)
    documents = Documents(tokens_BT, tokens_BT) if model.config.isolate_documents else None
    key_B = torch.zeros(micro_batch, dtype=torch.int64)
    model(Batch(tokens_BT, tokens_BT, key_B, tokens_BT.numel(), documents=documents))[0].backward()


@torch.no_grad()
def _optimizer_step(
    sharded: ShardedModel,
    optimizer: Optimizer,
    shares: dict[nn.Parameter, float],
    tracker: StorageTracker,
    is_replicated: bool,
) -> None:
    """Sum gradients over ranks, clip, step, zero gradients."""
    gradients = [parameter.grad for parameter in shares if parameter.grad is not None]
    tracker.kind = "optimizer"
    if is_replicated:  # the buffer of the all-reduce
        torch.empty(min(sum(gradient.nbytes for gradient in gradients), BUCKET), dtype=torch.int8)
    sharded.grad_norm()
    torch._foreach_mul_(gradients, torch.ones(()))
    optimizer.step(1.0)
    tracker.kind = "activations"
    for part in optimizer.optimizers:
        for parameter, state in part.state.items():
            for tensor in state.values():
                tracker.count(tensor, "state", shares[parameter])
    sharded.zero_grad()


def _split_experts(experts: Experts, n_ranks: int, n_senders: int) -> None:
    """Keep one rank's experts; the tokens of `n_senders` ranks arrive, as in distributed/expert_parallel.py."""
    compute = experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(n_ranks)[0].clone()))

    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        x_RC = permute(x_NC, dispatch)
        x_SC = _Exchange.apply(x_RC, len(x_RC) * n_senders)
        expert_S1 = torch.zeros(len(x_SC), 1, dtype=torch.int64)
        y_SC = compute(x_SC, expert_S1, weight_NK.new_ones(len(x_SC), 1), sort_by_expert(expert_S1, len(experts.up)))
        return unpermute(_Exchange.apply(y_SC, len(x_RC)), weight_NK, dispatch)

    experts.forward = forward  # as expert parallelism does it, so that the router's code is the same


class _Exchange(torch.autograd.Function):
    """Stand-in for the all-to-all: R rows leave, n_rows arrive."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, n_rows: int) -> Tensor:
        ctx.n_rows = len(x_RC)
        return x_RC.new_empty(n_rows, x_RC.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None]:
        return grad_SC.new_empty(ctx.n_rows, grad_SC.shape[1]), None
