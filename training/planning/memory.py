"""Estimate the memory of a run on one device, without allocating it (docs/planning.md).

    MemoryEstimator(config, world_size=4, device_type="cuda").estimate(micro_batch=8).total  # bytes at the peak

`walk.py` measures each part of a step on fake tensors, with one layer of each kind. Here the parts follow one another
as in the whole model, on top of weights, gradients and optimizer state, whose sizes follow from the shapes.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch

from training.config import BlockConfig, Config
from training.device import DTYPES
from training.distributed.mesh import mesh_shape
from training.distributed.world import BUCKET
from training.model.gpt import EMBEDDINGS
from training.model.stats import model_stats
from training.optim.batch_schedule import BatchSchedule
from training.optim.groups import frozen_names, match_groups
from training.planning.walk import Change, LocalShape, Peak, walk, walk_optimizer

HEADROOM = 0.9  # share of the memory that a step may use; fragmentation and other programs need the rest
CPU_TOKENS = 8192  # per micro-batch on a CPU: more is slower (docs/log.md) and takes memory from other programs
PROCESS_BYTES = 510 * 2**20  # Python, torch and other libraries with their buffers: resident size beside the tensors
# On a CPU, glibc keeps freed memory (`device.keep_freed_memory`) in pieces that may be too small for the next tensor.
# The optimizer's temporary tensors, which may be stacks of matrices, do not fit in them; of those and of activations
# and logits, this share is added once more. It is fitted to the runs of benchmarks/plan_memory.py.
FRAGMENTATION = 0.3


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
    """Return the samples of one step on the rank that has the most of them, in the stage with the largest batch."""
    return samples_per_rank(config, world_size, max(BatchSchedule.of(config).sizes()))


def samples_per_rank(config: Config, world_size: int, batch_tokens: int) -> int:
    """Return the samples of a batch on the rank that has the most of them."""
    return math.ceil(batch_tokens // config.model.n_positions / world_size)


def equal_parts(n_samples: int, fits: int, config: Config, device_type: str) -> int:
    """Return the micro-batch, at most `fits`, that splits a rank's samples into the fewest equal parts."""
    if device_type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // config.model.n_positions))
    return math.ceil(n_samples / math.ceil(n_samples / fits))


class LayerKind(NamedTuple):
    """What the memory of a layer depends on."""

    block: BlockConfig  # with repeat 1
    frozen: frozenset[str]  # its frozen parameters, by their names in the layer
    input_has_gradient: bool  # False: all before it is frozen, and no gradient is computed there


class MemoryEstimator:
    """Estimates the memory of one of `world_size` devices, for any micro-batch.

    `precision` and `model.vocab_size` must be resolved. Raises UserError if the mesh does not fit `world_size`.
    """

    def __init__(self, config: Config, world_size: int = 1, device_type: str = "cpu"):
        self.config, self.device_type = config, device_type
        self.mesh = mesh = mesh_shape(config.parallel.mesh, world_size, config.model)
        self.max_samples = max_samples_per_rank(config, world_size)
        self.stats = stats = model_stats(config.model)
        groups = match_groups(config.optim, stats.kinds)
        self.frozen = frozen_names(groups)
        layers = self._layer_kinds()
        self.blocks = list(dict.fromkeys(layers))
        self.kind_of_layer = [self.blocks.index(layer) for layer in layers]
        local_shapes, n_weights = Counter(), 0
        for name, kind in stats.kinds.items():
            shape, is_expert = stats.shapes[name], mesh.expert > 1 and ".ffn.experts." in name
            n_rows = len(mesh.local_rows(shape[0], 0, is_expert))
            local = torch.Size((n_rows, *shape[1:]))
            n_weights += local.numel()
            if name not in self.frozen:
                local_shapes[LocalShape(shape, local, kind, groups.get(name))] += 1
        self.gradients = 4 * sum(n * shape.local.numel() for shape, n in local_shapes.items())
        state, self.optimizer = walk_optimizer(config, local_shapes, world_size)
        if mesh.shard == 1 and mesh.replicate > 1:  # the buffer of the all-reduce
            self.optimizer = max(self.optimizer, min(self.gradients, BUCKET))
        buffers = 4 * sum(shape.numel() for name, shape in stats.shapes.items() if name not in stats.kinds)
        self.resident = Counter(weights=4 * n_weights + buffers, state=state, casts=self._gathered_bytes())
        self._walks: dict[tuple, dict[str, list[Change]]] = {}

    def _layer_kinds(self) -> list[LayerKind]:
        """Return the kind of each layer. A layer has a gradient at its input if anything before it is trained."""
        of_layer: dict[str, list[str]] = {}  # parameters by "blocks.0", "blocks.1", ...; of the embeddings by ""
        for name in self.stats.kinds:
            before_blocks = name.startswith(EMBEDDINGS)
            key = "" if before_blocks else ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "after"
            of_layer.setdefault(key, []).append(name)
        has_gradient, layers = any(name not in self.frozen for name in of_layer[""]), []
        for i, block in enumerate(self.config.model.layers()):
            names = of_layer[f"blocks.{i}"]
            frozen = frozenset(name.removeprefix(f"blocks.{i}.") for name in names if name in self.frozen)
            layers.append(LayerKind(block.model_copy(update={"repeat": 1}), frozen, has_gradient))
            has_gradient = has_gradient or len(frozen) < len(names)
        self.stream_has_gradient = has_gradient
        return layers

    def _gathered_bytes(self) -> int:
        """Return the bytes of the weights and gradients that FSDP2 gathers beside this rank's rows.

        Embeddings, head and last norm: float32, from forward to backward. Blocks: the weights of two and the gradients
        of one in the compute dtype, and two reduce-scatters in float32. Frozen weights count as trained ones.
        """
        if self.mesh.shard == 1:
            return 0
        groups = Counter()  # parameters by "blocks.0", "blocks.1", ..., and of all else
        for name in self.stats.kinds:
            group = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
            groups[group] += self.stats.shapes[name].numel()
        rest = groups.pop("")
        return 4 * rest + max(groups.values()) * (3 * DTYPES[self.config.precision].itemsize + 2 * 4)

    def estimate(self, micro_batch: int) -> MemoryEstimate:
        """Estimate the memory of a step in micro-batches of this many samples."""
        even = self._forward_backward(micro_batch, n_senders=1)
        passes = even
        if self.mesh.expert > 1:  # the worst routing
            passes = self._forward_backward(micro_batch, n_senders=self.mesh.expert)
        step = self.resident + Counter(gradients=self.gradients, optimizer=self.optimizer)
        in_step = step.total() > passes.total()
        peak = step if in_step else passes
        on_cpu, fragmentation = self.device_type == "cpu", 0
        if on_cpu and self.config.parallel.recompute == "none":
            fragmentation = passes.total() + self.optimizer - peak.total()
            fragmentation += round(FRAGMENTATION * (passes["activations"] + passes["logits"] + self.optimizer))
        return MemoryEstimate(
            weights=peak["weights"],
            casts=peak["casts"],
            gradients=peak["gradients"],
            optimizer=peak["state"] + peak["optimizer"],
            activations=min(even["activations"], peak["activations"]),
            logits=peak["logits"],
            routing=max(0, peak["activations"] - even["activations"]),
            fragmentation=fragmentation,
            save_copy=peak["weights"] + peak["state"] if on_cpu else 0,
            process=PROCESS_BYTES if on_cpu else 0,
            in_step=in_step,
        )

    def largest_micro_batch(self, limit: float) -> int:
        """Return the largest micro-batch within `limit` bytes, at most a rank's samples per step; 0 if none fits."""

        def needed(n_samples: int) -> int:
            return self.estimate(n_samples).total

        fits, too_large = 1, self.max_samples
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

    def _forward_backward(self, micro_batch: int, n_senders: int) -> Counter[str]:
        """Return bytes by kind at the peak of forward and backward."""
        n_samples = min(micro_batch, self.max_samples)
        layers, ends = self._layers(n_samples, n_senders), self._walk([], n_samples, 1)
        inputs = [part for name, part in layers.items() if name.startswith("inputs")]
        forward = [layers[f"forward {kind}"] for kind in self.kind_of_layer]
        backward = [layers.get(f"backward {kind}", []) for kind in reversed(self.kind_of_layer)]
        accumulates = n_samples < self.max_samples  # gradients exist already; a micro-batch adds to them
        peak = Peak(self.resident + Counter(gradients=self.gradients if accumulates else 0))
        for part in [*inputs, *forward, ends["head"], *backward, ends.get("embedding", [])]:
            peak.add(part, ignored="gradients" if accumulates else "")
        return peak.kinds

    def _layers(self, n_samples: int, n_senders: int) -> dict[str, list[Change]]:
        """Return the parts of the blocks.

        Each change is linear in the samples from two on, so two walks show all sizes. A single sample is walked
        separately, because some operations copy a transposed tensor only if it has several samples.
        """
        if n_samples == 1:
            return self._walk(self.blocks, 1, n_senders)
        two, three = (self._walk(self.blocks, n, n_senders) for n in (2, 3))
        return {
            name: [
                (kind, second + (n_samples - 2) * (third - second))
                for (kind, second), (_, third) in zip(changes, three[name], strict=True)
            ]
            for name, changes in two.items()
            if name.startswith(("inputs", "forward", "backward"))
        }

    def _walk(self, layers: list[LayerKind], n_samples: int, n_senders: int) -> dict[str, list[Change]]:
        key = bool(layers), n_samples, n_senders
        if key not in self._walks:
            frozen = {name for name in self.frozen if not name.startswith("blocks.")}
            frozen |= {f"blocks.{i}.{name}" for i, layer in enumerate(layers) for name in layer.frozen}
            where = self.mesh, self.device_type, n_senders, frozen, self.stream_has_gradient
            self._walks[key] = walk(self.config, [layer.block for layer in layers], n_samples, *where)
        return self._walks[key]
