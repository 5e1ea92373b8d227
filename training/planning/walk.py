"""Walk a training step on fake tensors, which have shapes but no numbers, and measure the memory of each of its parts.

The tensors are CPU tensors, because autograd rejects CUDA ones on a machine without a GPU. So attention runs the CPU's
flash kernel, which keeps the same tensors for backward as the GPU's; for a GPU it runs without masks.

Equal layers take equal memory. A walk therefore has one layer of each kind, and `training/planning/memory.py` repeats
their parts for the layers of the model. For the same reason the loss runs on two chunks of tokens, one block of each.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.batch import Batch
from training.config import BlockConfig, Config, MeshConfig, ParameterGroup
from training.device import DTYPES
from training.distributed.mesh import MeshShape
from training.distributed.parallelize import parallelize
from training.distributed.world import World
from training.kernels import loss
from training.kernels.attention import sdpa
from training.kernels.attention.masks import Documents
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.experts import TORCH_EXPERTS, Dispatch, permute, sort_by_expert, unpermute
from training.kernels.interface import AttentionBackend, Kernels
from training.model import GPT, layers
from training.model.moe import Experts
from training.optim.optimizer import Optimizer
from training.optim.parameters import FullShapes, ParameterKind

Change = tuple[str, int]  # kind of memory, and the bytes by which it grows or (negative) shrinks


class StorageTracker(TorchDispatchMode):
    """Notes the bytes of all storages that operations create, by kind, from their creation until they are freed."""

    def __init__(self, is_sharded: bool = False):
        super().__init__()
        self.kind = "activations"  # of new storages
        self.is_sharded = is_sharded  # by FSDP2
        self.live: dict[int, tuple[str, int]] = {}  # by id of a storage: kind, and bytes on this rank
        self.parts: dict[str, list[Change]] = {}  # of the step, by name
        self.begin("")

    def begin(self, part: str) -> None:
        """Begin a part of the step: the changes from now on belong to it."""
        self.changes = self.parts.setdefault(part, [])

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
        self.changes.append((kind, n_bytes))

    def _drop(self, key: int) -> None:
        kind, n_bytes = self.live.pop(key)
        self.changes.append((kind, -n_bytes))

    def _kind_and_share(self, func: Any, args: tuple) -> tuple[str, float]:
        """Return (kind, share) for an operation's result. If all its inputs are weights, the result is a cast of them.

        Under FSDP2 a cast of weights takes no memory of its own: it gathers them in the compute dtype.
        """
        if self.kind != "activations":
            return self.kind, 1.0
        inputs = [self.live.get(id(x.untyped_storage())) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = {storage and storage[0] for storage in inputs}
        if not kinds or not kinds <= {"weights", "casts"}:
            return self.kind, 1.0
        is_gathered = self.is_sharded and kinds == {"weights"} and func is torch.ops.aten._to_copy.default
        return "casts", 0.0 if is_gathered else 1.0


class Peak:
    """The largest sum of memory in a sequence of changes, by kind."""

    def __init__(self, start: Counter[str]):
        self.now, self.n_bytes = start.copy(), start.total()
        self.kinds, self.max_bytes = start.copy(), start.total()

    def add(self, changes: Iterable[Change], ignored: str = "") -> None:
        """Apply changes in their order, but those of the `ignored` kind."""
        for kind, n_bytes in changes:
            if kind == ignored:
                continue
            self.now[kind] += n_bytes
            self.n_bytes += n_bytes
            if n_bytes > 0 and self.n_bytes > self.max_bytes:
                self.kinds, self.max_bytes = self.now.copy(), self.n_bytes


def walk(
    config: Config,
    blocks: list[BlockConfig],
    micro_batch: int,
    mesh: MeshShape,
    device_type: str,
    n_senders: int,
    frozen: Collection[str] = (),
    stream_has_gradient: bool = True,
) -> dict[str, list[Change]]:
    """Return the parts of forward and backward of a model with these blocks, in the order of time.

    "inputs" has embeddings, "inputs i" the masks that block i is the first to use; "forward i", "backward i" are those
    of block i; "head" has the last norm and the loss with their backward; "embedding" is its backward. `n_senders`: the
    number of ranks that send all their rows to this rank's experts. `frozen`: names of parameters of this model. Parts
    of backward that do not run for them are missing. `stream_has_gradient`: the last norm's input has a gradient.
    """
    model_config = config.model.model_copy(update={"blocks": blocks, "n_layer": len(blocks)})
    dtype = DTYPES[config.precision]
    with FakeTensorMode(), _without_cpu_paths(device_type), StorageTracker(mesh.shard > 1) as tracker:
        model = GPT(model_config, _kernels(config, device_type), dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for module in model.modules():
            if mesh.expert > 1 and isinstance(module, Experts):
                _split_experts(module, mesh.expert, n_senders)
        one_device = config.parallel.model_copy(update={"mesh": MeshConfig()})
        parallelize(model, one_device, World(0, 1, torch.device("cpu")), dtype)
        for tensor in model.buffers():
            tracker.count(tensor, "weights")
        for name, parameter in model.named_parameters():
            is_expert = mesh.expert > 1 and ".ffn.experts." in name
            n_rows = len(parameter) * (mesh.expert if is_expert else 1)
            share = len(mesh.local_rows(n_rows, 0, is_expert)) / len(parameter)
            _count_parameter(parameter, share, tracker)
        if stream_has_gradient:  # also in a walk without the blocks that give it one
            model.norm_f.register_forward_pre_hook(_require_gradient)
        _mark_parts(model, tracker)
        tracker.begin("inputs")
        tokens_BT = torch.zeros(micro_batch, model_config.n_positions, dtype=torch.int64)
        documents = Documents(tokens_BT, tokens_BT) if model_config.isolate_documents else None
        key_B = torch.zeros(micro_batch, dtype=torch.int64)
        model(Batch(tokens_BT, tokens_BT, key_B, tokens_BT.numel(), documents=documents))[0].backward()
        tracker.begin("")
        _count_releases_with_blocks(tracker.parts, len(blocks))
        return tracker.parts


def _count_releases_with_blocks(parts: dict[str, list[Change]], n_blocks: int) -> None:
    """Move what a block releases right after its hooks, such as its input if no backward needs it, to its own part."""
    for i in range(n_blocks):
        changes = parts[f"inputs {i + 1}"]
        n_releases = next((n for n, (_, n_bytes) in enumerate(changes) if n_bytes > 0), len(changes))
        parts[f"forward {i}"] += changes[:n_releases]
        del changes[:n_releases]


def _require_gradient(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].requires_grad_()


def _count_parameter(parameter: nn.Parameter, share: float, tracker: StorageTracker) -> None:
    tracker.count(parameter, "weights", share)
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.count(p.grad, "gradients", share))


def _mark_parts(model: GPT, tracker: StorageTracker) -> None:
    """Let hooks on blocks, and on the gradients of their outputs, begin the tracker's parts."""

    def begin(part: str) -> Callable:
        return lambda *_: tracker.begin(part)

    def begin_at_gradient(part: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple, out: tuple | None = None) -> None:
            tensor = (inputs if out is None else out)[0]
            if tensor.requires_grad:  # else all before it is frozen
                tensor.register_hook(begin(part))

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(begin(f"forward {i}"))
        block.register_forward_hook(begin(f"inputs {i + 1}"))
        block.register_forward_hook(begin_at_gradient(f"backward {i}"))
    first = model.blocks[0] if model.blocks else model.norm_f
    first.register_forward_pre_hook(begin_at_gradient("embedding"))
    model.norm_f.register_forward_pre_hook(begin("head"))
    model.loss.register_forward_pre_hook(lambda *_: setattr(tracker, "kind", "logits"))
    model.loss.register_forward_hook(lambda *_: setattr(tracker, "kind", "activations"))


class LocalShape(NamedTuple):
    """The shape of a parameter, in full and of this rank's rows; the kind and group that its optimizer is chosen by."""

    full: torch.Size
    local: torch.Size
    kind: ParameterKind
    group: ParameterGroup | None


def walk_optimizer(config: Config, shapes: Counter[LocalShape], n_ranks: int) -> tuple[int, int]:
    """Return (bytes of the optimizer state, peak bytes of temporary tensors) of a step on one of `n_ranks`.

    `shapes` counts the parameters that are trained. Equal parameters are one stack of them here: they take the same
    memory, and less time.
    """
    with FakeTensorMode(), StorageTracker() as tracker:
        full_shapes, named, kinds, groups = {}, {}, {}, {}
        for shape, n in shapes.items():
            name = str(len(named))
            named[name] = parameter = nn.Parameter(torch.empty(n, *shape.local))
            kinds[name] = shape.kind
            groups |= {} if shape.group is None else {name: shape.group}
            parameter.grad = torch.empty_like(parameter)
            full_shapes[parameter] = torch.Size((n, *shape.full))
        gather = FullShapes(full_shapes, partial(_gather_matrices, full_shapes, n_ranks)) if n_ranks > 1 else None
        optimizer = Optimizer(config.optim, named.items(), kinds, DTYPES[config.precision], gather, groups)
        optimizer.step(1.0, is_averaged=True)  # creates the state
        tracker.begin("step")
        optimizer.step(1.0, is_averaged=True)
        peak = Peak(Counter())
        peak.add(tracker.parts["step"])
        return sum(tensor.nbytes for tensor in optimizer.state_dict().values()), peak.max_bytes


def _gather_matrices(
    full_shapes: Mapping[Tensor, torch.Size],
    n_ranks: int,
    parameters: list[Tensor],
    tensors: list[Tensor],
    function: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Take as much memory as `MatrixGather`: this rank processes its part of the matrices in full."""
    *_, n_rows, n_columns = full_shapes[parameters[0]]
    n_matrices = sum(full_shapes[p].numel() for p in parameters) // (n_rows * n_columns)
    rows = torch.cat([tensor.reshape(-1, n_columns) for tensor in tensors])
    sent = rows.clone()
    received = rows.new_empty(-(-n_matrices // n_ranks), n_rows, n_columns)
    result = function(received.clone())
    del received, sent
    returned = result.clone(), torch.empty_like(rows)
    del returned
    return [result.new_empty(tensor.shape) for tensor in tensors]


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
    if name == "reference":
        return Kernels(attention, experts, loss.reference_loss)
    in_torch = on_cpu or name == "chunked"
    # Triton's kernel needs no memory beside the logits.
    logits_backward = _one_block if in_torch else lambda _, targets_N, *_args, gradient: targets_N.float()  # noqa: ARG005
    return Kernels(attention, experts, partial(_two_chunks, partial(loss.chunked_cross_entropy, logits_backward)))


def _one_block(logits_NV: Tensor, targets_N: Tensor, *args: Any, gradient: bool) -> Tensor:
    """Compute one of the blocks of `torch_logits_backward`, which have the same memory one after the other."""
    on_cpu = logits_NV.device.type in loss.CHUNK_BYTES
    size = max(1, loss.BLOCK_ELEMENTS // logits_NV.shape[1]) if on_cpu else len(logits_NV)
    loss.torch_logits_backward(logits_NV[:size], targets_N[:size], *args, gradient=gradient)
    return targets_N.float()


def _two_chunks(kernel: Callable, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, *args: Any) -> Tensor:
    """Compute two of the chunks of the loss, which have the same memory one after the other, and keep all gradients."""
    n = 2 * loss.chunk_tokens(x_NC, len(w_VC))
    if n >= len(x_NC):
        return kernel(x_NC, w_VC, targets_N, *args)
    return kernel(_First.apply(x_NC, n), w_VC, targets_N[:n], *args)


class _First(torch.autograd.Function):
    """The first rows of a tensor, with memory for the gradient of all of them from the start."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, n: int) -> Tensor:
        ctx.grad_NC = torch.empty_like(x_NC)
        return x_NC[:n]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_NC, None


def _split_experts(experts: Experts, n_ranks: int, n_senders: int) -> None:
    """Keep one rank's experts; rows of `n_senders` ranks arrive. Copies take as much memory as the all-to-all."""
    compute = experts.forward
    for name, parameter in experts.named_parameters():
        local = parameter.detach().chunk(n_ranks)[0].clone()
        setattr(experts, name, nn.Parameter(local, requires_grad=parameter.requires_grad))

    def forward(x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:  # noqa: ARG001
        x_RC = permute(x_NC, dispatch)
        x_SC = x_RC.repeat(n_senders, 1)
        expert_S1 = torch.zeros(len(x_SC), 1, dtype=torch.int64)
        y_SC = compute(x_SC, expert_S1, weight_NK.new_ones(len(x_SC), 1), sort_by_expert(expert_S1, len(experts.up)))
        return unpermute(y_SC.narrow(0, 0, len(x_RC)).clone(), weight_NK, dispatch)

    experts.forward = forward  # as expert parallelism does, so that the router runs unchanged
