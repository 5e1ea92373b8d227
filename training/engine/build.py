"""A run: its parts, how it begins or goes on, how it is saved, and what it leaves behind."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from training import checkpoint
from training import device as devices
from training.checkpoint import CheckpointWriter, TensorShard, WriterGroup
from training.config import Config
from training.data import Dataset
from training.data.loader import Samples
from training.distributed.parallelize import ShardedModel, parallelize
from training.distributed.world import World
from training.engine import micro_batch as fit
from training.engine import resume as restart
from training.engine.expert_tokens import measure_expert_tokens
from training.engine.guard import Skips
from training.errors import UserError
from training.files import atomic_folder, mkdir_durable, write_atomically
from training.kernels.choose import (
    ATTENTION_BACKENDS,
    EXPERT_KERNELS,
    LOSS_KERNELS,
    KernelChoice,
    choose_kernels,
)
from training.logging import jsonl
from training.logging import sinks as logging
from training.logging.advice import Facts, advice, facts_from_rows
from training.logging.metrics import summary_values
from training.logging.phase_timer import PhaseTimer
from training.logging.report import update_report
from training.logging.rows import RunLog
from training.model import GPT, kernel_requirements
from training.optim.optimizer import FullShapes, Optimizer
from training.options import cli
from training.planning.batch_split import max_samples_per_rank
from training.planning.disk import check_disk_space
from training.weights import hf, init_from


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 (arXiv:1710.03740): halved on overflow, doubled after 2000 good steps."""

    scale: float = 2.0**16
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % 2000 == 0:
            self.scale *= 2


@dataclass
class Run:
    """Everything that a step, an evaluation or a save works on."""

    config: Config  # resolved: precision and vocab_size are what they came to be
    folder: Path
    dataset: Dataset
    world: World
    model: GPT
    layout: ShardedModel  # of the model's tensors on the ranks
    whole: GPT  # the model in one piece, on the meta device: sizes and words, no numbers
    optimizer: Optimizer
    batches: Samples
    val_batches: Samples
    metrics: RunLog
    timer: PhaseTimer
    saver: CheckpointWriter
    kernels: dict[str, str]  # their names
    kernels_why: dict[str, str]  # for each its name and the reason
    skips: Skips
    loss_scale: LossScale | None = None  # fp16 only
    micro_batch: int = 1  # samples at a time
    place: str = ""  # what that was found for
    fits: dict[str, dict] = field(default_factory=dict)  # by place: "micro_batch", "recompute"; found once
    back_offs: int = 0  # how often memory was out since the start
    step: int = 0  # steps that are done
    ahead: dict[int, tuple] = field(default_factory=dict)  # by step: its batch, read while the one before it computes
    best: dict | None = None  # {"step", "val_loss"} of the lowest validation loss
    last_row: dict = field(default_factory=dict)

    def close(self, summary: dict | None = None) -> None:
        """Close the logs, once nothing is being saved. `summary` is None where the run did not come to its end."""
        self.saver.close()
        self.metrics.close(summary)


def begin(config: Config, dataset: Dataset, world: World, resume: str) -> Run:
    """Build the run's parts, new or as the checkpoint that `restart.find` names, and open its logs. Collective."""
    if config.parallel.recompute == "none":  # else memory counts for more than time
        devices.keep_freed_memory(world.device)
    # Of every program with a router, PyTorch's compiler advises to round its float32 products.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    fresh, found = resume == "never", restart.agreed(config, resume, world)
    config = resolve(config, found, dataset, world.device)
    if found is not None and found.own:
        restart.refuse_changes(config, dataset.fingerprint, found.state)
    elif found is None and not fresh:
        restart.refuse_another(config, dataset.fingerprint)
    dtype = devices.DTYPES[config.precision]
    before = found.state.get("kernels", {}) if found is not None and found.own else {}
    choice = agreed_kernels(config, world, dtype, before)
    kernels = choice.kernels
    with torch.device("meta"):
        model, whole = (GPT(config.model, kernels, dtype) for _ in range(2))
    layout = parallelize(model, config.parallel, world, dtype)
    together = FullShapes(layout.full_shapes(), layout.matrix_gather()) if world.size > 1 else None
    folder, timer = config.run_dir, PhaseTimer(world.device)
    run = Run(
        config=config,
        folder=folder,
        dataset=dataset,
        world=world,
        model=model,
        layout=layout,
        whole=whole,
        optimizer=Optimizer(config.optim, layout.local_parameters(), model.parameter_kinds(), dtype, together),
        batches=Samples(dataset.train, n_positions=config.model.n_positions, seed=config.seed),
        val_batches=Samples(dataset.val, n_positions=config.model.n_positions, seed=None),
        metrics=RunLog(config, world, whole.step_metrics, whole.flops_per_token(), timer),
        timer=timer,
        saver=CheckpointWriter(folder / "checkpoints", peers(world), config.checkpoint),
        kernels=choice.names,
        kernels_why=choice.as_text(),
        skips=Skips(config.skip_spikes),
        loss_scale=LossScale() if config.precision == "fp16" else None,
    )
    if found is not None:
        restore(run, found)
    else:
        layout.load_full(lambda name, shape: whole.initial_value(name, shape, config.seed))
        if config.init_from is not None:
            init_from.initialize(run)
    if world.is_main:
        if run.step < config.steps:
            check_disk_space(whole, config, fresh=fresh)
        restart.make_way(config, resume, found)
    fit.choose(run, found.state.get("micro_batch", {}) if found is not None else {})
    if world.is_main:
        open_logs(run)
    if config.parallel.compile:
        layout.compile()
    return run


def peers(world: World) -> WriterGroup:
    """The threads of all ranks that write a checkpoint together."""
    return WriterGroup(world.rank, world.size, partial(world.gather_bytes, background=True))


def agreed_kernels(config: Config, world: World, dtype: torch.dtype, before: dict[str, str]) -> KernelChoice:
    """The same kernels on all ranks: the last in order of those that they chose. Collective.

    `before` are those of the checkpoint. Raises UserError on a rank where that one does not work.
    """
    asked = config.parallel
    choice = choose_kernels(asked, kernel_requirements(config.model), device=world.device, dtype=dtype, previous=before)
    orders = {"attention": list(ATTENTION_BACKENDS), "experts": list(EXPERT_KERNELS), "loss": list(LOSS_KERNELS)}
    chosen = choice.names
    places = world.max_int(*(order.index(chosen[option]) for option, order in orders.items()))
    last = {option: order[place] for (option, order), place in zip(orders.items(), places, strict=True)}
    if last != chosen:
        asked = asked.model_copy(update=last)
        choice = choose_kernels(asked, kernel_requirements(config.model), device=world.device, dtype=dtype)
    return choice


def resolve(config: Config, found: restart.Found | None, dataset: Dataset, device: torch.device) -> Config:
    """The options with `precision: auto` and `vocab_size: null` replaced by what they mean here.

    A run keeps the precision it began with, on any device. Raises UserError for a vocabulary that is too small.
    """
    size, asked = dataset.tokenizer.vocab_size, config.model.vocab_size
    if asked is not None and asked < size:
        use = f"null or {size}" if config.init_from is None else f"{size} for more rows, or the tokenizer of init_from"
        raise UserError(f"model.vocab_size: {asked} is less than the tokenizer's {size}; use {use}")
    precision = devices.resolve_precision(config.precision, device)
    if config.precision == "auto" and found is not None:
        precision = found.state["config"]["precision"]
    model = config.model.model_copy(update={"vocab_size": asked or -(-size // 64) * 64})
    return config.model_copy(update={"precision": precision, "model": model})


def restore(run: Run, found: restart.Found) -> None:
    """Put the run where the checkpoint left it; another run's best is none of its own. Each rank reads its rows.

    Raises UserError where the model or the optimizer is another one.
    """
    shards, state = run.layout.tensors, found.state
    try:
        if strange := sorted(
            checkpoint.tensor_shapes(found.path, "model").items() ^ {(n, s.shape) for n, s in shards.items()}
        ):
            raise KeyError(f"{strange[0][0]} {tuple(strange[0][1])}")
        wanted = {name: (shard.rows.start, shard.rows.stop) for name, shard in shards.items()}
        for name, rows in checkpoint.read_tensors(found.path, "model", wanted).items():
            shards[name].local_rows().copy_(rows)
        kept = checkpoint.tensor_shapes(found.path, "optimizer")
        wanted = {key: wanted[key.rpartition("/")[0]] if shape else None for key, shape in kept.items()}
        run.optimizer.load_state_dict(checkpoint.read_tensors(found.path, "optimizer", wanted))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error
    run.step, run.best, run.last_row = state["step"], state["best"] if found.own else None, state["last_row"]
    run.metrics.time_s = state["time_s"]
    try:
        run.timer.load_state_dict(state.get("ledger", {}))
        run.skips.load_state_dict(state["skips"])
        if run.loss_scale is not None and state["loss_scale"] is not None:
            run.loss_scale = LossScale(**state["loss_scale"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{found.path / 'state.json'}: not the state of a run: {error}") from error


def parts(run: Run) -> dict[str, dict[str, TensorShard]]:
    """What this rank has of all that is saved as tensors."""
    shards = run.layout.tensors
    model = {
        name: TensorShard(shard.local_rows(), shard.rows.start, shard.shape, shard.is_owner)
        for name, shard in shards.items()
    }
    optimizer = {}
    for key, tensor in run.optimizer.state_dict().items():
        shard = shards[key.rpartition("/")[0]]
        rows = (shard.rows.start, shard.shape, shard.is_owner) if tensor.ndim else (0, tensor.shape, run.world.is_main)
        optimizer[key] = TensorShard(tensor, *rows)
    return {"model": model, "optimizer": optimizer}


def preallocate_save_buffers(run: Run) -> None:
    """After the first step, when there is all that will be saved: have memory for its copy taken beside the loop."""
    if not run.saver.is_preallocated:
        run.saver.preallocate(parts(run))


def save(run: Run) -> None:
    """Save a checkpoint, then remove those that are no longer kept: begun here, done beside the loop. Collective."""
    state = {
        "step": run.step,
        "time_s": run.metrics.time_s,
        "ledger": run.timer.state_dict(),
        "best": run.best,
        "last_row": run.last_row,
        "loss_scale": run.loss_scale and asdict(run.loss_scale),
        "skips": run.skips.state_dict(),
        "data": run.dataset.fingerprint,
        "kernels": run.kernels,
        "micro_batch": dict(run.fits),
        "config": run.config.model_dump(mode="json"),
    }
    best = run.best["step"] if run.best and run.config.checkpoint.keep_best else None
    run.saver.save(parts(run), state, best)


def open_logs(run: Run) -> None:
    """Write the configuration and the tokenizer, and open the logs that are asked for."""
    config, text = run.config, cli.dump_config(run.config)
    try:
        mkdir_durable(run.folder)
    except OSError as error:
        raise UserError(f"{run.folder}: {error.strerror}; choose another --out_dir or --name") from error
    write_atomically(run.folder / "config.yaml", text)
    run.dataset.tokenizer.save(run.folder / "tokenizer")
    run.timer.add_lost_time(jsonl.read_rows(run.folder / "metrics.jsonl"), run.step)
    facts = logging.RunInfo(
        dir=run.folder,
        name=config.name,
        config=config.model_dump(mode="json"),
        config_yaml=text,
        header=header(run),
        start_step=run.step,
        steps=config.steps,
        tokens_per_step=config.batch_tokens,
        moe_layers=[i for i, block in enumerate(config.model.layers()) if block.ffn.type == "moe"],
    )
    run.metrics.sinks = logging.open_sinks(config.logging, facts)
    if run.step == 0 and not run.layout.mesh.has_collectives:
        tokens, targets = (torch.from_numpy(a[:, :32]).to(run.world.device) for a in run.batches.at([0]))
        chosen, run.model.attention = (
            run.model.attention,
            run.model.portable_attention,
        )  # a kernel cannot be looked into
        for sink in run.metrics.sinks:
            sink.write_graph(run.model, tokens, targets, targets.numel())
        run.model.attention = chosen


def header(run: Run) -> dict[str, str]:
    """The facts that open the console's log and the report."""
    config, model = run.config, run.config.model
    total, active = run.whole.n_parameters()
    samples = config.batch_tokens // model.n_positions
    ranks = f", {run.world.size} processes: {run.layout.mesh}" if run.world.size > 1 else ""
    moe = [block.ffn for block in model.layers() if block.ffn.type == "moe"]
    capacities = dict.fromkeys(f"{ffn.capacity_factor:g}" for ffn in moe if ffn.capacity_factor is not None)
    kinds = dict.fromkeys(
        f"top {ffn.top_k} of {ffn.n_experts}" + (f" and {ffn.n_shared} shared" if ffn.n_shared else "") for ffn in moe
    )
    experts = f"{len(moe)} of them MoE, {' or '.join(kinds)} experts, " if moe else ""
    facts = {
        "run": str(run.folder),
        "device": f"{devices.device_name(run.world.device)}{ranks}, {config.precision}",
        "attention": run.kernels_why["attention"],
        "experts": run.kernels_why["experts"] if moe else "",
        "loss": run.kernels_why["loss"],
        "capacity": f"{', '.join(capacities)}: drops tokens, so micro-batch and ranks change what is computed"
        if capacities
        else "",
        "model": f"{model.n_layer} layers, {experts}{model.n_head} heads, width {model.n_embd}, "
        f"context {model.n_positions}, vocabulary {model.vocab_size:,}",
        "parameters": f"{total:,}" + (f", {active:,} active for a token" if active < total else ""),
        "data": "; ".join(
            f"{name} {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_bytes / 1e6:.1f} MB"
            for name, split in (("train", run.dataset.train), ("val", run.dataset.val))
        ),
        "batch": f"{config.batch_tokens:,} tokens = {samples} samples x {model.n_positions}, "
        f"{run.micro_batch} at a time",
        "steps": f"{config.steps:,}, {config.steps * config.batch_tokens:,} tokens",
        "begins with": "" if run.step or config.init_from is None else config.init_from,
        "goes on": f"after step {run.step:,}" if run.step else "",
    }
    return {label: text for label, text in facts.items() if text}


def write_model(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    """The final model and its tokenizer, whole or not at all. Raises UserError where the disk refuses."""
    tokenizer = run.dataset.tokenizer
    try:
        with atomic_folder(folder) as partial:
            hf.write_model(partial, weights, run.config.model, tokenizer.end_of_text, n_vocab=tokenizer.vocab_size)
            tokenizer.save(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error


def command(name: str) -> str:
    """How to call a program of this environment from here: as .venv/bin/NAME where it is below this folder."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def facts_of_run(run: Run) -> Facts:
    """Return the facts of a finished run for `advice`."""
    device = run.world.device
    return facts_from_rows(
        jsonl.read_rows(run.folder / "metrics.jsonl"),
        run.config,
        memory_gib=devices.available_memory_bytes(device) / 2**30,
        peak_gib=devices.peak_memory_gib(device),
        seconds=run.timer.seconds,
        on_gpu=device.type != "cpu",
        micro_batch=run.micro_batch,
        max_samples_per_rank=max_samples_per_rank(run.config, run.world.size),
        n_out_of_memory=run.back_offs,
        n_skipped=run.skips.total,
        vocab_size=run.dataset.tokenizer.vocab_size,
    )


def finish(run: Run) -> None:
    """Leave the final model, experts.json, summary.json and report.html, and close the logs with the summary."""
    run.timer.enter("checkpoint")
    run.saver.wait()
    weights, liked = run.layout.full_state_dict(), None
    if run.model.top_ks and (run.world.is_main or run.layout.mesh.has_collectives):
        run.layout.reshard()
        run.timer.enter("evaluation")
        made = (run.val_batches, run.dataset.tokenizer, run.config.eval)
        liked = measure_expert_tokens(run.model, *made, micro_batch=run.micro_batch, step=run.step)
    if not run.world.is_main:
        return
    run.timer.enter("checkpoint")
    folder, row = run.folder, run.last_row
    total, active = run.whole.n_parameters()
    prompt = (*run.config.eval.prompts, "The ")[0].rstrip("\n")
    write_model(run, folder / "model", weights)
    if liked is not None:
        write_atomically(folder / "experts.json", json.dumps(liked) + "\n")
    summary = {
        "steps": run.step,
        "tokens": row["tokens"],
        "skipped_steps": run.skips.total,
        "train_loss": row["loss"],
        **summary_values(row),
        "best_val_loss": run.best["val_loss"],
        "best_step": run.best["step"],
        "time_s": run.metrics.time_s,
        "tokens_per_s": row["tokens"] / run.metrics.time_s,
        "goodput": run.timer.goodput,
        "time": {phase: round(seconds, 6) for phase, seconds in run.timer.seconds.items()},
        "advice": advice(facts_of_run(run)),
        "parameters": total,
        "active_parameters": active,
        "model_dir": str(folder / "model"),
        "next": [
            shlex.join([command("python"), "-m", "training.generate", "--run", str(folder), "--prompt", prompt]),
            shlex.join([command("python"), "-m", "training.evaluate", "--run", str(folder)]),
            shlex.join([command("tensorboard"), "--logdir", str(folder)]),
        ],
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    update_report(folder)
    run.close(summary)
