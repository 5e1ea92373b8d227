"""Build a run's parts: the resolved configuration, model, optimizer, loader and state, new or from a checkpoint."""

import gc
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from training import device as devices
from training.checkpoint import RemoteRun, copy_to_errors, step_path
from training.config import AVERAGE, Config
from training.data import Dataset, Loader, Samples, build_samples
from training.distributed.consistency import check_same
from training.distributed.parallelize import parallelize
from training.distributed.sharded_model import ShardedModel
from training.distributed.world import World
from training.engine.branch import is_branch_of, run_of, start_branch
from training.engine.fetch import fetch_newest
from training.engine.longer import is_plateau, n_common_steps, parse_options
from training.engine.micro_batch import MicroBatch
from training.engine.resume import Location, ResumePoint, check_same_run, find_resume_point, prepare_run_dir
from training.engine.state import TrainState, load_tensors
from training.engine.tasks import Task, fingerprint, load_tasks
from training.errors import UserError
from training.kernels.choose import KernelChoice, choose_kernels
from training.kernels.table import TABLES
from training.model import GPT, kernel_requirements
from training.model.stats import ModelStats, initial_value, model_stats
from training.optim.batch_schedule import BatchSchedule
from training.optim.groups import freeze, match_groups
from training.optim.optimizer import LossScale, Optimizer
from training.planning.horizon import epoch_samples, length_notices, resolve_steps
from training.planning.report import disk_shortage
from training.terminal import print_note
from training.weights.init_from import check_pretrained, load_weights, weights_sha256


class Setup(NamedTuple):
    """The parts of a run."""

    config: Config  # resolved
    model: ShardedModel
    stats: ModelStats
    optimizer: Optimizer
    loader: Loader
    val_samples: Samples
    tasks: list[Task]
    micro_batch: MicroBatch
    state: TrainState
    kernels: KernelChoice
    parent: Path | None  # folder of the run that this one branches off from, at the start of a branch
    remote: RemoteRun | None  # the run's copy, on the main rank


def build(config: Config, dataset: Dataset, world: World, resume: str, branch: str | None = None) -> Setup:
    """Build the parts of a run, from scratch or from the checkpoint that `resume` or `branch` selects. Collective.

    Raises UserError if the folder holds another run, the checkpoint does not fit, or memory or disk are too small.
    """
    world.set_activity("the start of the run", "untimed")
    prepare_process(config, world)
    check_same(world, {"data": dataset.fingerprint[:12]})
    config, train = resolve_sizes(config, dataset)
    remote = open_copy(config, dataset, world, resume, branch)
    point = find_resume_point(config, resume, world, branch)
    state = TrainState.new() if point is None else point.state
    config = resolve_precision(config, world, state)
    check_same_run(config, dataset, resume, point)
    parent = run_of(point.path) if point is not None and point.is_branch else None
    if parent is not None:
        start_branch(config, dataset, point.path, state)
    config = choose_best(config, dataset, world, state)
    tasks = load_tasks(config.eval.tasks, dataset.tokenizer, config.model.n_positions, quiet=not world.is_main)
    check_same(world, {"eval.tasks": fingerprint(tasks)})
    state.n_vocab = count_tokens(config, dataset, point)
    kernels = agree_on_kernels(config, world, state.kernels)
    state.data, state.kernels = dataset.fingerprint, kernels.names
    if config.precision != "fp16":
        state.loss_scale = None
    elif state.loss_scale is None:
        state.loss_scale = LossScale(scale=2.0**16, good_steps=0)

    stats, dtype = model_stats(config.model), devices.DTYPES[config.precision]
    with torch.device("meta"):
        network = GPT(config.model, kernels.kernels, dtype, state.n_vocab)
    groups = match_groups(config.optim, stats.kinds)
    freeze(network, groups)
    model = parallelize(network, config.parallel, world, dtype)
    full_shapes = model.full_shapes() if world.size > 1 else None
    optimizer = Optimizer(config.optim, model.local_parameters(), stats.kinds, dtype, full_shapes, groups)
    val = build_samples(dataset.val, config.model, dataset.tokenizer, too_long=config.data.too_long)
    if world.is_main:
        for line in [*train.describe(), *val.describe()]:
            print_note(f"data: {line}", once=True)
    loader = Loader(train, BatchSchedule.of(config), world.local_range)

    if point is not None:
        load_tensors(point.path, model, optimizer)
    elif config.init_from is not None:
        load_weights(model, config, dataset, world)
        state.init_from_sha256 = world.broadcast(weights_sha256(config) if world.is_main else None)
    else:
        model.load_full(lambda name, shape: initial_value(name, shape, config.model, config.seed))
    if world.is_main:
        if state.step < config.steps and (problem := disk_shortage(stats, config, fresh=resume == "never")):
            raise UserError(problem)
        prepare_run_dir(config, resume, point, remote)
    micro_batch = MicroBatch(config, model, state, dataset.tokenizer)
    micro_batch.choose(optimizer)
    chosen = {"device": world.device.type, "recompute": model.activation_checkpointing, **kernels.names}
    parallel = config.parallel.model_copy(update=chosen)
    config = config.model_copy(update={"micro_batch": micro_batch.size, "parallel": parallel})
    state.config = config.model_dump(mode="json")
    return Setup(config, model, stats, optimizer, loader, val, tasks, micro_batch, state, kernels, parent, remote)


def open_copy(
    config: Config, dataset: Dataset, world: World, resume: str, branch: str | None = None
) -> RemoteRun | None:
    """Return the run's copy at `checkpoint.copy_to` on the main rank, whose newest checkpoint may now be in the folder.

    None on other ranks, and without a copy. Raises UserError, on the main rank only, if it is of another run.
    """
    url = config.checkpoint.copy_to
    if url is None or not world.is_main:
        return None

    def check(state: TrainState) -> int:
        """Raise UserError if a state is another run's; return how many of its steps this run has in common with it."""
        if branch is not None and not is_branch_of(state.lineage, branch):
            raise UserError(f"{url} holds another run than this branch; name a --checkpoint.copy_to of its own")
        if (name := state.config.get("name")) not in (None, config.name) and branch is None:
            raise UserError(
                f"{url} holds the run {name}; name a --checkpoint.copy_to of its own, or go on with --name {name}"
            )
        resolved = resolve_precision(config, world, state)
        old = parse_options(state.config)
        n_common = n_common_steps(old, resolved) if old is not None else 0
        may_go_back = old is not None and is_plateau(old, n_common)  # the run may go on from before its decay
        location = Location(url, "own", state.step if may_go_back else n_common)
        check_same_run(resolved, dataset, "auto", ResumePoint(Path(url), location, state), place=url)
        return n_common

    with copy_to_errors():
        return fetch_newest(config, resume, check)


def prepare_process(config: Config, world: World) -> None:
    """Set what holds for the whole process: memory that is kept, garbage collection, warnings."""
    if not gc.get_freeze_count():  # in a second run of this process it would keep the first one's garbage
        gc.freeze()  # each full collection would walk through the libraries' million objects, for 0.4 s
    if config.parallel.recompute == "none":
        devices.keep_freed_memory(world.device)
    else:  # memory matters more than time
        devices.release_freed_memory(world.device)
    # torch.compile suggests TF32 for the router's float32 matmuls; we want full precision.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")


def resolve_sizes(config: Config, dataset: Dataset) -> tuple[Config, Samples]:
    """Replace every null that stands for a size, and the option that sets the length of the run by `steps`.

    Also returns the training samples, on whose number `epochs` depends. Raises UserError if model.vocab_size is too
    small for the tokenizer, or if there is less text than a sample.
    """
    size, vocab_size = dataset.tokenizer.vocab_size, config.model.vocab_size
    if vocab_size is not None and vocab_size < size:
        use = f"null or {size}" if config.init_from is None else f"{size} for more rows"
        if config.init_from not in (None, getattr(config.data.tokenizer, "path", None)):
            use += ", or the tokenizer of init_from"
        raise UserError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {size}; use {use}")
    changes = {"vocab_size": vocab_size or -(-size // 64) * 64, "isolate_documents": config.isolates_documents}
    model = config.model.model_copy(update=changes)
    too_long = config.data.too_long
    train = build_samples(dataset.train, model, dataset.tokenizer, seed=config.seed, too_long=too_long)
    samples_per_epoch = epoch_samples(train.windows.tolist(), dataset.train.weights)
    return resolve_steps(config.model_copy(update={"model": model}), samples_per_epoch), train


def resolve_precision(config: Config, world: World, state: TrainState) -> Config:
    """Replace `precision: auto`, and lengths of the schedule that do not fit; the main rank prints which.

    A run keeps the precision it started with.
    """
    precision = devices.resolve_precision(config.precision, world.device)
    if config.precision == "auto":
        precision = state.config.get("precision", precision)
    if world.is_main:
        for line in length_notices(config):
            print_note(line, once=True)
    return config.model_copy(update={"precision": precision}).resolved()


def choose_best(config: Config, dataset: Dataset, world: World, state: TrainState) -> Config:
    """Check `eval.best` against the data and a resumed run's best step. The name of the only source becomes null.

    Prints a line if that step no longer counts. Raises UserError if no source has the name. Collective.
    """
    best, names = config.eval.best, [stream.name for stream in dataset.val.streams]
    if best == AVERAGE and config.optim.average is None:
        raise UserError("eval.best: average needs optim.average, such as {decay: 0.999}")
    if best not in (None, AVERAGE, *names):
        remedy = f"there is {', '.join(names)}"
        if not any(names):
            remedy = f"an earlier version prepared it without names; remove {dataset.report['folder']}"
        raise UserError(f"eval.best: no validation text has the name {best!r}; {remedy}")
    if len(names) == 1 and best != AVERAGE:
        best = None
    if state.best is not None and (config.checkpoint.final == "best" or config.eval.patience is not None):
        path = step_path(config.run_dir / "checkpoints", state.best["step"])
        (is_missing,) = world.max_int(world.is_main and not path.exists())
        if is_missing:  # it was never saved, or removed since
            if world.is_main:
                print_note(f"{path}: the best checkpoint is not there: the best step so far no longer counts")
            state.best = None
    if world.is_main and state.best is not None and state.best.get("of") != best:
        old, new = (name or "all validation text" for name in (state.best.get("of"), best))
        print_note(f"eval.best: {new}, no longer {old}: the best step so far no longer counts")
    return config.model_copy(update={"eval": config.eval.model_copy(update={"best": best})})


def count_tokens(config: Config, dataset: Dataset, point: ResumePoint | None) -> int | None:
    """Return the number of tokens that the model predicts: the tokenizer's, or more if it started with more.

    Rows of the embedding beyond them are padding. None: all rows are tokens, as in runs of older versions.
    """
    n_vocab = dataset.tokenizer.vocab_size
    if point is not None:
        return point.state.n_vocab and max(n_vocab, point.state.n_vocab)
    return n_vocab if config.init_from is None else max(n_vocab, check_pretrained(config).vocab_size)


def agree_on_kernels(config: Config, world: World, previous: dict[str, str]) -> KernelChoice:
    """Choose the same kernels on all ranks: if ranks choose differently, the latest choice in its table. Collective.

    A resumed run keeps its `previous` kernels. Raises UserError on a rank where the agreed kernel does not work.
    """
    where = {"device": world.device, "dtype": devices.DTYPES[config.precision]}
    requirements = kernel_requirements(config.model)
    choice = choose_kernels(config.parallel, requirements, **where, previous=previous)
    orders = {option: list(table) for option, table in TABLES.items()}
    last = world.max_int(*(order.index(choice.names[option]) for option, order in orders.items()))
    agreed = {option: order[index] for (option, order), index in zip(orders.items(), last, strict=True)}
    if agreed != choice.names:
        choice = choose_kernels(config.parallel.model_copy(update=agreed), requirements, **where)
    return choice
