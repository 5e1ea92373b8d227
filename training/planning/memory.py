"""Estimate the memory of a run on one device, without allocating it.

    estimate(config, micro_batch=8, world_size=4, device_type="cuda").total   # bytes at the peak

The real model and the real optimizer take two steps on fake tensors, which have shapes but no numbers. `StorageTracker`
counts every storage from its creation to its end; the peak is the moment with the most bytes. For other ranks, sharded
tensors count by their share, a formula gives the weights that FSDP2 gathers, and a stand-in for the all-to-all creates
the rows that arrive.

Fake tensors are CPU tensors, because autograd rejects CUDA ones on a machine without a GPU. So attention runs the CPU's
flash kernel, which keeps the same tensors for backward as the GPU's; for a GPU it runs without masks. Workspaces of
libraries are not counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training.batch import Batch
from training.config import Config, MeshConfig
from training.device import DTYPES
from training.distributed.mesh import MeshShape, mesh_shape
from training.distributed.parallelize import parallelize
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
from training.planning.storage_tracker import StorageTracker

PROCESS_BYTES = 430 * 2**20  # Python, torch and other libraries: resident size of a run with a tiny model on a CPU
# glibc keeps freed memory (`device.keep_freed_memory`), in pieces that may be too small for the next tensor. `estimate`
# adds this share of activations and logits; it is fitted to the runs of benchmarks/plan_memory.py.
FRAGMENTATION = 0.5


class MemoryEstimate(NamedTuple):
    """Bytes on one device at the peak, by purpose."""

    weights: int  # and buffers
    casts: int  # weights cast to the compute dtype, or gathered from other ranks
    gradients: int
    optimizer: int  # its state, and temporary tensors of its step
    activations: int  # kept for backward, and temporary tensors of a layer
    logits: int  # of a chunk of tokens, and the gradients of the head
    routing: int  # additional activations if all tokens of the expert group go to this rank's experts
    fragmentation: int  # of the C library; 0 on a GPU
    save_copy: int  # the copy that a checkpoint is written from; 0 on a GPU, where it is in host memory
    process: int  # interpreter and libraries; 0 on a GPU
    in_step: bool  # True: the peak is in the optimizer step; False: in forward and backward

    def parts(self) -> dict[str, int]:
        """Return the bytes by purpose."""
        return dict(zip(self._fields[:-1], self[:-1], strict=True))

    @property
    def total(self) -> int:
        """Bytes of all purposes together."""
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
    if (upper_bytes := needed(too_large)) <= limit:
        return too_large
    if too_large == 1 or (lower_bytes := needed(1)) > limit:
        return 0
    while too_large - fits > 1:  # interpolate: memory is almost linear in the samples
        n = fits + int((too_large - fits) * (limit - lower_bytes) / (upper_bytes - lower_bytes))
        n = min(max(n, fits + 1), too_large - 1)
        if (n_bytes := needed(n)) <= limit:
            fits, lower_bytes = n, n_bytes
        else:
            too_large, upper_bytes = n, n_bytes
    return fits


def _peak(
    config: Config, micro_batch: int, world_size: int, device_type: str, mesh: MeshShape, *, worst_routing: bool
) -> tuple[Counter[str], bool]:
    """Return bytes by kind at the peak of the second step, and whether the peak was in the optimizer step."""
    per_rank = max_samples_per_rank(config, world_size)
    with FakeTensorMode(), _without_cpu_paths(device_type), StorageTracker(mesh.shard > 1) as tracker:
        step = _FakeStep(config, mesh, world_size > 1 and mesh.shard == 1, device_type, worst_routing, tracker)
        step.create_gradients()
        step.optimizer_step()  # creates the optimizer state
        tracker.peak.clear()
        if per_rank > micro_batch:  # gradients of earlier micro-batches
            step.create_gradients()
        step.forward_backward(min(micro_batch, per_rank))
        before = tracker.peak.copy()
        step.optimizer_step()
        return tracker.peak, tracker.peak != before


@contextmanager
def _without_cpu_paths(device_type: str) -> Iterator[None]:
    """Disable the kernels' CPU code paths if the device is not a CPU, because fake tensors are CPU tensors.

    Replaces constants of the kernels' modules, so that no layer needs an argument for this estimate.
    """
    before = loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES
    if device_type != "cpu":
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = {}, 0, ()
    try:
        yield
    finally:
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = before


class _FakeStep:
    """A training step of one rank on fake tensors. Sharded tensors count by this rank's share."""

    def __init__(
        self, config: Config, mesh: MeshShape, is_replicated: bool, device_type: str, worst_routing: bool, tracker
    ):
        dtype = DTYPES[config.precision]
        self.tracker, self.is_replicated = tracker, is_replicated
        self.model = model = GPT(config.model, _kernels(config, device_type), dtype)
        if mesh.expert > 1:
            for experts in (module for module in model.modules() if isinstance(module, Experts)):
                _split_experts(experts, mesh.expert, mesh.expert if worst_routing else 1)
        one_device = config.parallel.model_copy(update={"mesh": MeshConfig()})
        self.sharded = parallelize(model, one_device, World(0, 1, torch.device("cpu")), dtype)
        self.shares = {parameter: _share(name, mesh) for name, parameter in model.named_parameters()}
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor, "weights", self.shares.get(tensor, 1.0))
        self.gathered = torch.empty(_gathered_bytes(model, mesh, dtype), dtype=torch.int8)
        tracker.count(self.gathered, "casts")
        self.optimizer = Optimizer(config.optim, self.sharded.local_parameters(), parameter_kinds(model), dtype)
        model.loss.register_forward_pre_hook(lambda *_: setattr(tracker, "kind", "logits"))
        model.loss.register_forward_hook(lambda *_: setattr(tracker, "kind", "activations"))
        for parameter in self.shares:
            parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def _count_gradient(self, parameter: nn.Parameter) -> None:
        self.tracker.count(parameter.grad, "gradients", self.shares[parameter])

    def create_gradients(self) -> None:
        """Create the gradients that a backward pass leaves behind."""
        for parameter in self.shares:
            parameter.grad = torch.empty_like(parameter)
            self._count_gradient(parameter)

    def forward_backward(self, micro_batch: int) -> None:
        """Compute the gradients of a micro-batch."""
        tokens_BT = torch.zeros(micro_batch, self.model.config.n_positions, dtype=torch.int64)
        documents = Documents(tokens_BT, tokens_BT) if self.model.config.isolate_documents else None
        key_B = torch.zeros(micro_batch, dtype=torch.int64)
        self.model(Batch(tokens_BT, tokens_BT, key_B, tokens_BT.numel(), documents=documents))[0].backward()

    @torch.no_grad()
    def optimizer_step(self) -> None:
        """Sum gradients over ranks, clip, update and free the gradients."""
        gradients = [parameter.grad for parameter in self.shares if parameter.grad is not None]
        self.tracker.kind = "optimizer"
        if self.is_replicated:  # the buffer of the all-reduce
            torch.empty(min(sum(gradient.nbytes for gradient in gradients), BUCKET), dtype=torch.int8)
        self.sharded.grad_norm()
        torch._foreach_mul_(gradients, torch.ones(()))
        self.optimizer.step(1.0)
        self.tracker.kind = "activations"
        for part in self.optimizer.optimizers:
            for parameter, state in part.state.items():
                for tensor in state.values():
                    self.tracker.count(tensor, "state", self.shares[parameter])
        self.sharded.zero_grad()


def _kernels(config: Config, device_type: str) -> Kernels:
    """Return CPU kernels that keep as much memory for backward as those that the device will use."""
    name, on_cpu = config.parallel.attention, device_type == "cpu"
    attention = ATTENTION_BACKENDS[name if name == "reference" else "flash"]
    if on_cpu and any(getattr(block.mixer, "softcap", None) for block in config.model.blocks):
        attention = ATTENTION_BACKENDS["reference"]
    elif not on_cpu and name not in ("reference", "sdpa", "efficient"):  # no mask, and a soft-cap inside the kernel
        flash = ATTENTION_BACKENDS["flash"].attend
        attention = AttentionBackend(lambda _: None, lambda *qkv, scale, softcap: flash(*qkv, scale=scale))  # noqa: ARG005
    experts = TORCH_EXPERTS["reference" if config.parallel.experts == "reference" else "loop"]
    name = config.parallel.loss
    if name in loss.TORCH_LOSS or on_cpu:
        return Kernels(attention, experts, loss.TORCH_LOSS["chunked" if name in ("auto", "triton") else name])
    in_place = partial(loss.chunked_cross_entropy, lambda _, targets_N, softcap, gradient: targets_N.float())  # noqa: ARG005
    return Kernels(attention, experts, in_place)  # as Triton's, which needs no memory beside the logits


def _share(name: str, mesh: MeshShape) -> float:
    """Return this rank's share of a parameter; experts are already split over `expert` ranks."""
    return 1 / max(1, mesh.shard // mesh.expert if ".experts." in name else mesh.shard)


def _gathered_bytes(model: GPT, mesh: MeshShape, dtype: torch.dtype) -> int:
    """Return the bytes of unsharded weights and gradients that FSDP2 holds at once.

    Embeddings, head and last norm: float32, from forward to backward. Blocks: the weights of two and the gradients of
    one in the compute dtype, and the gradients of two in float32, during their reduce-scatter.
    """
    if mesh.shard == 1:
        return 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    return 4 * rest + max(blocks) * (3 * dtype.itemsize + 2 * 4)


def _split_experts(experts: Experts, n_ranks: int, n_senders: int) -> None:
    """Keep one rank's experts; the tokens of `n_senders` ranks arrive, as in distributed/parallelize.py."""
    compute = experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(n_ranks)[0].clone()))

    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        x_RC = permute(x_NC, dispatch)
        x_SC = _Exchange.apply(x_RC, len(x_RC) * n_senders)
        expert_S1 = torch.zeros(len(x_SC), 1, dtype=torch.int64)
        y_SC = compute(x_SC, expert_S1, weight_NK.new_ones(len(x_SC), 1), sort_by_expert(expert_S1, len(experts.up)))
        return unpermute(_Exchange.apply(y_SC, len(x_RC)), weight_NK, dispatch)

    experts.forward = forward  # as expert parallelism does, so that the router runs unchanged


class _Exchange(torch.autograd.Function):
    """Stand-in for the all-to-all: R rows leave, n_rows arrive."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, n_rows: int) -> Tensor:
        ctx.n_rows = len(x_RC)
        return x_RC.new_empty(n_rows, x_RC.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None]:
        return grad_SC.new_empty(ctx.n_rows, grad_SC.shape[1]), None
