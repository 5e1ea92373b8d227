"""Memory that a run will need on a device, without allocating it.

The real model and the real optimizer take two steps on fake tensors, which have shapes and no numbers; every storage
is counted from the operation that makes it to its end, and the moment with the most of them is the peak. What one
process cannot show is put in: shares of a mesh by their scale, blocks that FSDP2 gathers by a formula, and rows that
come from other ranks' tokens by a stand-in for the exchange.

Fake tensors are on a CPU, as autograd refuses others where there is no GPU. So attention is taken to be the CPU's
flash kernel (for a GPU: without masks), which keeps what the GPUs' do; workspaces of libraries are not seen.
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

from training.config import Config, MeshConfig
from training.device import DTYPES
from training.distributed.mesh import MeshShape, mesh_shape
from training.distributed.parallelize import ShardedModel, parallelize
from training.distributed.world import BUCKET, World
from training.kernels import loss
from training.kernels.attention import sdpa
from training.kernels.attention.table import Documents
from training.kernels.choose import ATTENTION_BACKENDS, EXPERT_KERNELS, TORCH_LOSS, AttentionBackend, Kernels
from training.kernels.experts import Dispatch, permute, sort_by_expert, unpermute
from training.model import GPT, layers
from training.model.moe import Experts
from training.optim.optimizer import Optimizer
from training.planning.batch_split import max_samples_per_rank

# On a CPU. Python, torch and the other libraries, as resident in a run of next to no model.
PROCESS = 430 * 2**20
# glibc keeps what is freed (`device.keep_freed_memory`), in pieces that the next tensor may not fit. With each tensor a
# mapping of its own, memory is that of the tensors. The share is fitted to the runs of benchmarks/plan_memory.py.
PIECES = 0.5


class MemoryEstimate(NamedTuple):
    """Bytes on one device at the peak, by what they are for."""

    weights: int  # and buffers
    casts: int  # weights in the type of the products, or gathered from other ranks
    gradients: int
    optimizer: int  # its state, and in its step what it works with
    activations: int  # kept for the backward, and what a layer works with
    logits: int  # of a chunk of tokens, and the gradients of the head that are made with them
    routing: int  # what more it takes where all tokens of all ranks go to this one's experts
    pieces: int  # between activations and logits, which the C library cannot use; 0 on a GPU
    copy: int  # that saves are written from; 0 on a GPU, where it is in the host's memory
    process: int  # interpreter and libraries; 0 on a GPU
    in_step: bool  # whether the peak is in the optimizer's step rather than in forward and backward

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[:-1])


def estimate(config: Config, micro_batch: int, world: int = 1, device: str = "cpu") -> MemoryEstimate:
    """Memory on one of `world` devices of a type, with `micro_batch` samples at a time.

    The config is resolved: `precision` and `model.vocab_size` say what they are. Takes a second or two for 12 layers.
    Raises UserError where the mesh does not fit.
    """
    cells = mesh_shape(config.parallel.mesh, world, config.model)
    parts, in_step = _peak(config, micro_batch, world, device, cells, worst=False)
    worst, worst_in_step = parts, in_step
    if cells.expert > 1:
        worst, worst_in_step = _peak(config, micro_batch, world, device, cells, worst=True)
    on_cpu, kept = device == "cpu", worst["weights"] + worst["state"]
    return MemoryEstimate(
        weights=worst["weights"],
        casts=worst["casts"],
        gradients=worst["gradients"],
        optimizer=worst["state"] + worst["optimizer"],
        activations=min(parts["activations"], worst["activations"]),
        logits=worst["logits"],
        routing=max(0, worst["activations"] - parts["activations"]),
        pieces=round(PIECES * (worst["activations"] + worst["logits"])) if on_cpu else 0,
        copy=kept if on_cpu else 0,
        process=PROCESS if on_cpu else 0,
        in_step=worst_in_step,
    )


def largest_micro_batch(config: Config, limit: float, world: int = 1, device: str = "cpu") -> int:
    """The most samples at a time whose memory is within a limit in bytes, up to a device's share of the batch.

    0 where not one's is.
    """

    def needed(n_samples: int) -> int:
        return estimate(config, n_samples, world, device).total

    fits, too_many = 1, max_samples_per_rank(config, world)
    if (most := needed(too_many)) <= limit:
        return too_many
    if too_many == 1 or (least := needed(1)) > limit:
        return 0
    while too_many - fits > 1:  # nearly a straight line
        n = fits + int((too_many - fits) * (limit - least) / (most - least))
        n = min(max(n, fits + 1), too_many - 1)
        if (found := needed(n)) <= limit:
            fits, least = n, found
        else:
            too_many, most = n, found
    return fits


class Held(NamedTuple):
    """A storage that is alive."""

    alive: weakref.ref
    kind: str
    n_bytes: int  # on this rank


class StorageTracker(TorchDispatchMode):
    """Counts the storages that operations make, by kind, from their making to their end."""

    def __init__(self, cells: MeshShape):
        super().__init__()
        self.kind = "activations"  # of what is made now
        self.sharded = cells.shard > 1
        self.held: dict[int, Held] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.held:
                self.put(tensor, *self._kind(func, args))
        return out

    def put(self, tensor: Tensor, kind: str, share: float = 1.0) -> None:
        """Count a tensor's storage, of which this rank has a share, as of a kind from now on."""
        storage = tensor.untyped_storage()
        key, n_bytes = id(storage), round(storage.nbytes() * share)
        if key in self.held:
            self._drop(key)
        self.held[key] = Held(weakref.ref(storage, lambda _: self._drop(key)), kind, n_bytes)
        self.now[kind] += n_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        held = self.held.pop(key)
        self.now[held.kind] -= held.n_bytes

    def _kind(self, func: Any, args: tuple) -> tuple[str, float]:
        """The kind of what an operation made: of weights alone, and not by the optimizer, it is a cast of them.

        FSDP2 gathers a block's weights in the type that they are cast to, so that there is no cast.
        """
        if self.kind != "activations":
            return self.kind, 1.0
        inputs = [self.held.get(id(x.untyped_storage())) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = {None if held is None else held.kind for held in inputs}
        if not kinds or not kinds <= {"weights", "casts"}:
            return self.kind, 1.0
        gathered = self.sharded and kinds == {"weights"} and func is torch.ops.aten._to_copy.default
        return "casts", 0.0 if gathered else 1.0


def _peak(
    config: Config, micro_batch: int, world: int, device: str, cells: MeshShape, *, worst: bool
) -> tuple[Counter[str], bool]:
    """Bytes by kind at the peak of a step that is not the first, and whether that was in the optimizer's."""
    n_mine = max_samples_per_rank(config, world)
    micro_batch, accumulates = min(micro_batch, n_mine), n_mine > micro_batch
    replicated = world > 1 and cells.shard == 1
    dtype, live = DTYPES[config.precision], StorageTracker(cells)
    with FakeTensorMode(), _as_on(device), live:
        model, layout = _model(config, cells, dtype, device, worst)
        shares = {parameter: _share(name, cells) for name, parameter in model.named_parameters()}
        for tensor in [*model.parameters(), *model.buffers()]:
            live.put(tensor, "weights", shares.get(tensor, 1.0))
        gathered = torch.empty(_gathered(model, cells, dtype), dtype=torch.int8)
        live.put(gathered, "casts")
        optimizer = Optimizer(config.optim, layout.local_parameters(), model.parameter_kinds(), dtype)
        _watch(model, shares, live)
        _put_gradients(shares, live)
        _update(layout, optimizer, shares, live, replicated)  # makes the state
        live.peak.clear()
        if accumulates:
            _put_gradients(shares, live)
        _forward_backward(model, micro_batch)
        before = live.peak.copy()
        _update(layout, optimizer, shares, live, replicated)
        return live.peak, live.peak != before


def _put_gradients(shares: dict[nn.Parameter, float], live: StorageTracker) -> None:
    """Gradients as they are after a micro-batch."""
    for parameter, share in shares.items():
        parameter.grad = torch.empty_like(parameter)
        live.put(parameter.grad, "gradients", share)


@contextmanager
def _as_on(device: str) -> Iterator[None]:
    """No way that a CPU alone takes is taken where the device is another, though tensors say that they are on a CPU."""
    before = loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES
    if device != "cpu":
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = {}, 0, ()
    try:
        yield
    finally:
        loss.CHUNK_BYTES, sdpa.FP32_MAX_KEYS, layers.RMSNORM_CPU_DTYPES = before


def _model(config: Config, cells: MeshShape, dtype: torch.dtype, device: str, worst: bool) -> tuple[GPT, ShardedModel]:
    """This rank's part of the experts, and all of the rest."""
    asked = config.parallel.attention
    backend = ATTENTION_BACKENDS[asked if asked == "reference" else "flash"]
    if device == "cpu" and any(block.mixer.type != "latent" and block.mixer.softcap for block in config.model.blocks):
        backend = ATTENTION_BACKENDS["reference"]
    elif device != "cpu" and asked not in ("reference", "sdpa", "efficient"):
        backend = AttentionBackend(lambda _: None, _attend)
    experts = EXPERT_KERNELS["reference" if config.parallel.experts == "reference" else "loop"]
    kernels = Kernels(backend, experts, _loss(config.parallel.loss, device))
    model = GPT(config.model, kernels, dtype)
    if cells.expert > 1:
        for module in model.modules():
            if isinstance(module, Experts):
                _split(module, cells.expert, cells.expert if worst else 1)
    alone = config.parallel.model_copy(update={"mesh": MeshConfig()})
    return model, parallelize(model, alone, World(0, 1, torch.device("cpu")), dtype)


def _loss(asked: str, device: str) -> Callable[..., Tensor]:
    """On a GPU that which works in the memory of the logits alone, unless another is asked for."""
    if asked in TORCH_LOSS or device == "cpu":
        return TORCH_LOSS["chunked" if asked in ("auto", "triton") else asked]
    return partial(loss.chunked_cross_entropy, lambda _, targets_N, softcap, gradient: targets_N.float())  # noqa: ARG005


def _attend(*inputs: Any, scale: float | None, softcap: float | None) -> Tensor:  # noqa: ARG001 (done within the kernel)
    return ATTENTION_BACKENDS["flash"].attend(*inputs, scale=scale)


def _share(name: str, cells: MeshShape) -> float:
    """What this rank has of a parameter; experts are split already over `expert` ranks."""
    return 1 / max(1, cells.shard // cells.expert if ".experts." in name else cells.shard)


def _gathered(model: GPT, cells: MeshShape, dtype: torch.dtype) -> int:
    """Bytes of what FSDP2 has gathered at a time, weights and gradients on the way.

    Embeddings, head and last norm in float32 from forward to backward; the block at work and the next in the type of
    the products; one block's gradients in that type, and two blocks' in float32, on their way to their ranks.
    """
    if cells.shard == 1:
        return 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    return 4 * rest + max(blocks) * (3 * dtype.itemsize + 2 * 4)


def _watch(model: GPT, shares: dict[nn.Parameter, float], live: StorageTracker) -> None:
    """Have what the head makes counted as logits, and finished gradients as such."""

    def enter(*_: Any) -> None:
        live.kind = "logits"

    def leave(*_: Any) -> None:
        live.kind = "activations"

    def finished(parameter: nn.Parameter) -> None:
        live.put(parameter.grad, "gradients", shares[parameter])

    model.loss.register_forward_pre_hook(enter)
    model.loss.register_forward_hook(leave)
    for parameter in shares:
        parameter.register_post_accumulate_grad_hook(finished)


def _forward_backward(model: GPT, micro_batch: int) -> None:
    tokens_BT = torch.zeros(micro_batch, model.config.n_positions, dtype=torch.int64)
    apart = Documents(tokens_BT, tokens_BT) if model.config.isolate_documents else None
    key_B = torch.zeros(micro_batch, dtype=torch.int64)
    model(tokens_BT, tokens_BT, tokens_BT.numel(), apart, key_B)[0].backward()


@torch.no_grad()
def _update(
    layout: ShardedModel,
    optimizer: Optimizer,
    shares: dict[nn.Parameter, float],
    live: StorageTracker,
    replicated: bool,
) -> None:
    """The optimizer's step, and before it the sum over ranks."""
    gradients = [parameter.grad for parameter in shares if parameter.grad is not None]
    live.kind = "optimizer"
    if replicated:
        n_bytes = sum(gradient.nbytes for gradient in gradients)
        torch.empty(min(n_bytes, BUCKET), dtype=torch.int8)
    layout.grad_norm()
    torch._foreach_mul_(gradients, torch.ones(()))
    optimizer.step(1.0)
    live.kind = "activations"
    for part in optimizer.optimizers:
        for parameter, state in part.state.items():
            for tensor in state.values():
                live.put(tensor, "state", shares[parameter])
    layout.zero_grad()


def _split(experts: Experts, size: int, n_senders: int) -> None:
    """Keep one rank's experts; `n_senders` ranks' tokens all go to it, as in `distributed/expert_parallel.py`."""
    compute = experts.forward
    for name, parameter in experts.named_parameters():
        setattr(experts, name, nn.Parameter(parameter.detach().chunk(size)[0].clone()))

    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        x_RC = permute(x_NC, dispatch)
        x_SC = _Exchange.apply(x_RC, len(x_RC) * n_senders)
        expert_S1 = torch.zeros(len(x_SC), 1, dtype=torch.int64)
        y_SC = compute(x_SC, expert_S1, weight_NK.new_ones(len(x_SC), 1), sort_by_expert(expert_S1, len(experts.up)))
        return unpermute(_Exchange.apply(y_SC, len(x_RC)), weight_NK, dispatch)

    experts.forward = forward


class _Exchange(torch.autograd.Function):
    """Rows leave for other ranks, and others come."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, n_rows: int) -> Tensor:
        ctx.n_rows = len(x_RC)
        return x_RC.new_empty(n_rows, x_RC.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None]:
        return grad_SC.new_empty(ctx.n_rows, grad_SC.shape[1]), None
