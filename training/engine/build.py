"""Build a run's parts: the resolved configuration, model, optimizer, loader and state, new or from a checkpoint."""

import warnings
from typing import NamedTuple

import torch

from training import device as devices
from training.config import Config
from training.data import Dataset, Loader, Samples
from training.distributed.consistency import check_same_data
from training.distributed.parallelize import parallelize
from training.distributed.sharded_model import ShardedModel
from training.distributed.world import World
from training.engine.guard import StepGuard
from training.engine.micro_batch import MicroBatch
from training.engine.resume import (
    ResumePoint,
    check_folder_is_free,
    check_unchanged,
    find_on_all_ranks,
    prepare_run_dir,
)
from training.engine.state import TrainState, load_tensors
from training.errors import UserError
from training.kernels.choose import KernelChoice, choose_kernels
from training.kernels.table import TABLES
from training.model import GPT, kernel_requirements
from training.model.stats import ModelStats, initial_value, model_stats
from training.optim.loss_scale import LossScale
from training.optim.optimizer import Optimizer
from training.optim.parameters import FullShapes
from training.planning.report import disk_shortage
from training.weights.init_from import load_weights


class Setup(NamedTuple):
    """The parts of a run."""

    config: Config  # resolved
    model: ShardedModel
    stats: ModelStats
    optimizer: Optimizer
    loader: Loader
    val_samples: Samples
    micro_batch: MicroBatch
    state: TrainState
    kernels: KernelChoice


def build(config: Config, dataset: Dataset, world: World, resume: str) -> Setup:
    """Build the parts of a run, from scratch or from the checkpoint that `resume` selects. Collective.

    Raises UserError if the folder holds another run, the checkpoint does not fit, or memory or disk are too small.
    """
    world.set_activity("the start of the run", "untimed")
    check_same_data(world, dataset.fingerprint)
    if config.parallel.recompute == "none":  # with recomputation, memory matters more than time
        devices.keep_freed_memory(world.device)
    # torch.compile suggests TF32 for the router's float32 matmuls; we want full precision.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    point = find_on_all_ranks(config, resume, world)
    config = resolve_precision_and_sizes(config, dataset, world, point)
    if point is not None and point.is_own:
        check_unchanged(config, dataset.fingerprint, point.state.config, point.state.data)
    elif point is None and resume != "never":
        check_folder_is_free(config, dataset.fingerprint)
    kernels = agree_on_kernels(config, world, point)

    stats, dtype = model_stats(config.model), devices.DTYPES[config.precision]
    with torch.device("meta"):
        network = GPT(config.model, kernels.kernels, dtype)
    model = parallelize(network, config.parallel, world, dtype)
    full_shapes = FullShapes(model.full_shapes(), model.matrix_gather()) if world.size > 1 else None
    optimizer = Optimizer(config.optim, model.local_parameters(), stats.kinds, dtype, full_shapes)
    train, val = _build_samples(config, dataset)
    n_samples = config.batch_tokens // config.model.n_positions
    loader = Loader(train, n_samples, world.local_range(n_samples))

    state = initial_state(config, dataset, kernels, point)
    if point is not None:
        load_tensors(point.path, model, optimizer)
    elif config.init_from is not None:
        load_weights(model, config, dataset, world)
    else:
        model.load_full(lambda name, shape: initial_value(name, shape, config.model, config.seed))
    if world.is_main:
        if state.step < config.steps and (problem := disk_shortage(stats, config, fresh=resume == "never")):
            raise UserError(problem)
        prepare_run_dir(config, resume, point)
    micro_batch = MicroBatch(config, model, state, dataset.tokenizer)
    micro_batch.choose(optimizer)
    config = resolve_parallel(config, kernels, model, micro_batch)
    state.config = config.model_dump(mode="json")
    return Setup(config, model, stats, optimizer, loader, val, micro_batch, state, kernels)


def resolve_precision_and_sizes(config: Config, dataset: Dataset, world: World, point: ResumePoint | None) -> Config:
    """Replace `precision: auto` and every null that stands for a size. A run keeps the precision it started with.

    Raises UserError if model.vocab_size is too small for the tokenizer.
    """
    size, vocab_size = dataset.tokenizer.vocab_size, config.model.vocab_size
    if vocab_size is not None and vocab_size < size:
        use = f"null or {size}" if config.init_from is None else f"{size} for more rows, or the tokenizer of init_from"
        raise UserError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {size}; use {use}")
    precision = devices.resolve_precision(config.precision, world.device)
    if config.precision == "auto" and point is not None:
        precision = point.state.config.get("precision", precision)
    model = config.model.model_copy(update={"vocab_size": vocab_size or -(-size // 64) * 64})
    return config.model_copy(update={"precision": precision, "model": model}).with_explicit_sizes()


def resolve_parallel(config: Config, kernels: KernelChoice, model: ShardedModel, micro_batch: MicroBatch) -> Config:
    """Replace the remaining `auto` values: micro-batch, device, recomputation and kernels."""
    changes = {"device": model.world.device.type, "recompute": model.activation_checkpointing, **kernels.names}
    parallel = config.parallel.model_copy(update=changes)
    return config.model_copy(update={"micro_batch": micro_batch.size, "parallel": parallel})


def agree_on_kernels(config: Config, world: World, point: ResumePoint | None) -> KernelChoice:
    """Choose the same kernels on all ranks: if ranks choose differently, the latest choice in its table. Collective.

    A resumed run keeps its kernels. Raises UserError on a rank where the agreed kernel does not work.
    """
    where = {"device": world.device, "dtype": devices.DTYPES[config.precision]}
    requirements = kernel_requirements(config.model)
    previous = point.state.kernels if point is not None and point.is_own else {}
    choice = choose_kernels(config.parallel, requirements, **where, previous=previous)
    orders = {option: list(table) for option, table in TABLES.items()}
    last = world.max_int(*(order.index(choice.names[option]) for option, order in orders.items()))
    agreed = {option: order[index] for (option, order), index in zip(orders.items(), last, strict=True)}
    if agreed != choice.names:
        choice = choose_kernels(config.parallel.model_copy(update=agreed), requirements, **where)
    return choice


def initial_state(config: Config, dataset: Dataset, kernels: KernelChoice, point: ResumePoint | None) -> TrainState:
    """Return the state to start from. `best` is kept only from the run's own checkpoint."""
    if point is None:
        state = TrainState({}, dataset.fingerprint, guard=StepGuard(config.skip_spikes))
    else:
        state = point.state
        state.data, state.best = dataset.fingerprint, state.best if point.is_own else None
    state.kernels = kernels.names
    if config.precision != "fp16":
        state.loss_scale = None
    elif state.loss_scale is None:
        state.loss_scale = LossScale()
    return state


def _build_samples(config: Config, dataset: Dataset) -> tuple[Samples, Samples]:
    """Return the training samples, shuffled by the seed, and the validation samples in order."""
    end_of_text = dataset.tokenizer.end_of_text if config.model.isolate_documents else None
    common = {"n_positions": config.model.n_positions, "end_of_text": end_of_text}
    return Samples(dataset.train, seed=config.seed, **common), Samples(dataset.val, seed=None, **common)
