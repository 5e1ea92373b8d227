"""Estimate the memory of a run on one device, without allocating it (docs/planning.md).

    estimate(config, micro_batch=8, world_size=4, device_type="cuda").total   # bytes at the peak

The real model and optimizer take two steps on fake tensors, which have shapes but no numbers. These are CPU tensors,
because autograd rejects CUDA ones on a machine without a GPU. So attention runs the CPU's flash kernel, which keeps the
same tensors for backward as the GPU's; for a GPU it runs without masks.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterator
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

HEADROOM = 0.9  # share of the memory that a step may use; fragmentation and other programs need the rest
CPU_TOKENS = 8192  # per micro-batch on a CPU: more is slower (docs/log.md) and takes memory from other programs
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

    @property
    def total(self) -> int:
        """Bytes of all purposes together."""
        return sum(self[:-1])


def max_samples_per_rank(config: Config, world_size: int) -> int:
    """Return the samples of one step on the rank that has the most of them."""
    return math.ceil(config.batch_tokens // config.model.n_positions / world_size)


def equal_parts(n_samples: int, fits: int, config: Config, device_type: str) -> int:
    """Return the micro-batch, at most `fits`, that splits a rank's samples into the fewest equal parts."""
    if device_type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // config.model.n_positions))
    return math.ceil(n_samples / math.ceil(n_samples / fits))


def estimate(config: Config, micro_batch: int, world_size: int = 1, device_type: str = "cpu") -> MemoryEstimate:
    """Estimate the memory of one of `world_size` devices. Takes a second or two for 12 layers.

    `precision` and `model.vocab_size` must be resolved. Raises UserError if the mesh does not fit `world_size`.
    """
    mesh = mesh_shape(config.parallel.mesh, world_size, config.model)
    even, in_step = _peak(config, micro_batch, mesh, device_type, n_senders=1)
    peak = even
    if mesh.expert > 1:  # the worst routing
        peak, in_step = _peak(config, micro_batch, mesh, device_type, n_senders=mesh.expert)
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
    config: Config, micro_batch: int, mesh: MeshShape, device_type: str, n_senders: int
) -> tuple[Counter[str], bool]:
    """Return bytes by kind at the peak of the second step, and whether the peak was in the optimizer step."""
    per_rank = max_samples_per_rank(config, mesh.replicate * mesh.shard)
    with FakeTensorMode(), _without_cpu_paths(device_type), StorageTracker(mesh.shard > 1) as tracker:
        step = _FakeStep(config, mesh, device_type, n_senders, tracker)
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
    """Disable the kernels' CPU code paths, through constants of their modules, if the device is not a CPU."""
    before = loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES
    if device_type != "cpu":
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = {}, 0, ()
    try:
        yield
    finally:
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = before


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, by kind, until they are freed."""

    def __init__(self, is_sharded: bool = False):
        super().__init__()
        self.kind = "activations"  # of new storages
        self.is_sharded = is_sharded  # by FSDP2
        self.live: dict[int, tuple[str, int]] = {}  # by id of a storage: kind, and bytes on this rank
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
        else:
            weakref.finalize(storage, self._drop, key)
        self.live[key] = kind, n_bytes
        self.now[kind] += n_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        kind, n_bytes = self.live.pop(key)
        self.now[kind] -= n_bytes

    def _kind_and_share(self, func: Any, args: tuple) -> tuple[str, float]:
        """Return (kind, share) for an operation's result. If all its inputs are weights, the result is a cast of them.

        Under FSDP2 a cast of weights takes no memory of its own: it gathers them in the compute dtype.
        """
        inputs = [self.live.get(id(x.untyped_storage())) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = {storage and storage[0] for storage in inputs}
        if self.kind != "activations" or not kinds or not kinds <= {"weights", "casts"}:
            return self.kind, 1.0
        is_gathered = self.is_sharded and kinds == {"weights"} and func is torch.ops.aten._to_copy.default
        return "casts", 0.0 if is_gathered else 1.0


class _FakeStep:
    """A training step of one rank on fake tensors. Sharded tensors count by this rank's share."""

    def __init__(self, config: Config, mesh: MeshShape, device_type: str, n_senders: int, tracker: StorageTracker):
        dtype = DTYPES[config.precision]
        self.tracker, self.is_replicated = tracker, mesh.shard == 1 and mesh.replicate > 1
        self.model = model = GPT(config.model, _kernels(config, device_type), dtype)
        for module in model.modules():
            if mesh.expert > 1 and isinstance(module, Experts):
                _split_experts(module, mesh.expert, n_senders)
        one_device = config.parallel.model_copy(update={"mesh": MeshConfig()})
        self.sharded = parallelize(model, one_device, World(0, 1, torch.device("cpu")), dtype)
        expert_share = 1 / max(1, mesh.shard // mesh.expert)  # experts are already split over `expert` ranks
        self.shares = {
            parameter: expert_share if ".experts." in name else 1 / mesh.shard
            for name, parameter in model.named_parameters()
        }
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor, "weights", self.shares.get(tensor, 1.0))
        if mesh.shard > 1:
            # FSDP2 gathers weights. Embeddings, head and last norm: float32, from forward to backward. Blocks: the
            # weights of two and the gradients of one in the compute dtype, and two reduce-scatters in float32.
            blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
            rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
            tracker.now["casts"] += 4 * rest + max(blocks) * (3 * dtype.itemsize + 2 * 4)
        self.optimizer = Optimizer(config.optim, self.sharded.local_parameters(), parameter_kinds(model), dtype)
        model.loss.register_forward_pre_hook(lambda *_: setattr(tracker, "kind", "logits"))
        model.loss.register_forward_hook(lambda *_: setattr(tracker, "kind", "activations"))
        for parameter in self.shares:
            parameter.register_post_accumulate_grad_hook(self._count_gradient)

    def _count_gradient(self, parameter: nn.Parameter) -> None:
        self.tracker.count(parameter.grad, "gradients", self.shares[parameter])

    def create_gradients(self) -> None:
        for parameter in self.shares:
            parameter.grad = torch.empty_like(parameter)
            self._count_gradient(parameter)

    def forward_backward(self, micro_batch: int) -> None:
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
    in_place = partial(loss.chunked_cross_entropy, lambda _, targets_N, *_args, gradient: targets_N.float())  # noqa: ARG005
    return Kernels(attention, experts, in_place)  # as Triton's, which needs no memory beside the logits


def _split_experts(experts: Experts, n_ranks: int, n_senders: int) -> None:
    """Keep one rank's experts; rows of `n_senders` ranks arrive. Copies take as much memory as the all-to-all."""
    compute = experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(n_ranks)[0].clone()))

    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        x_RC = permute(x_NC, dispatch)
        x_SC = x_RC.repeat(n_senders, 1)
        expert_S1 = torch.zeros(len(x_SC), 1, dtype=torch.int64)
        y_SC = compute(x_SC, expert_S1, weight_NK.new_ones(len(x_SC), 1), sort_by_expert(expert_S1, len(experts.up)))
        return unpermute(y_SC.narrow(0, 0, len(x_RC)).clone(), weight_NK, dispatch)

    experts.forward = forward  # as expert parallelism does, so that the router runs unchanged
