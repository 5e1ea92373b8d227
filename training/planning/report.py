"""The plan of a run: its memory, time, data and disk space, computed from its options, as lines of text."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from training import device as devices
from training.config import Config
from training.data.corpus import Corpus
from training.data.file_hashes import FileHashes
from training.data.shards import Manifest, read_manifest
from training.data.tokenizer import build_tokenizer
from training.errors import UserError
from training.model.stats import ModelStats, model_stats
from training.optim.batch_schedule import BatchSchedule
from training.optim.groups import frozen_names, match_groups
from training.optim.optimizer import state_bytes
from training.planning.horizon import epoch_samples, length_notices, resolve_steps
from training.planning.memory import (
    HEADROOM,
    MemoryEstimate,
    MemoryEstimator,
    equal_parts,
    max_samples_per_rank,
)

DEFAULT_MFU = 0.4
MAX_HASHED_BYTES = 2**28  # of text that no earlier start has hashed: about a second
NO_BF16 = {"V100", "T4"}  # no bf16 matrix units
MAX_EPOCHS = 4  # up to here repeated text is nearly as good as new text (arXiv:2305.16264)
# About 20 is best for a given amount of compute (arXiv:2203.15556); up to 500 is usual for models that serve a lot.
MIN_TOKENS_PER_PARAMETER, MAX_TOKENS_PER_PARAMETER = 5, 500
# Vocabulary sizes, with the end-of-text token.
VOCAB_SIZES = dict.fromkeys(("gpt2", "openai-community/gpt2", "r50k_base"), 50257)
VOCAB_SIZES |= {"p50k_base": 50281, "cl100k_base": 100277, "o200k_base": 200019}


class TargetDevice(NamedTuple):
    """A device that a run is planned for."""

    name: str
    type: str  # cuda, mps, cpu
    n_bytes: int
    peak_flops: float | None  # FLOP/s of 16-bit matrix products
    has_bf16: bool  # has bf16 matrix units


class RunPlan(NamedTuple):
    """The values that the report shows."""

    config: Config  # resolved
    device: TargetDevice
    world_size: int
    n_tokens: int  # of all steps
    train_tokens: list[int]  # of each stream of the prepared data; [] if there are none
    data_problem: str  # why the data was not looked for; "" if it was
    stats: ModelStats
    micro_batch: int
    largest_micro_batch: int  # that fits; 0: not one sample does
    memory: MemoryEstimate
    notes: list[str]  # lines about lengths and stages that do not fit into the run


def find_device(name: str | None, config: Config) -> TargetDevice:
    """Return the device with that name; None: the one of this machine. Raises UserError for an unknown name."""
    if name is None or name.lower() == "cpu":
        here = devices.select_device(config.parallel.device if name is None else "cpu")
        memory, peak = devices.available_memory_bytes(here), devices.peak_flops(here, "bf16")
        return TargetDevice(devices.device_name(here), here.type, memory, peak, devices.has_bf16_units(here))
    for key, gpu in devices.GPUS.items():
        if _letters(key) == _letters(name):
            return TargetDevice(key, "cuda", round(gpu.memory_gib * 2**30), gpu.peak_flops, key not in NO_BF16)
    raise UserError(f"--device: {name!r} is none of cpu, {', '.join(devices.GPUS)}")


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def build_plan(config: Config, device: TargetDevice, world_size: int) -> RunPlan:
    """Look for prepared data and estimate memory. Raises UserError for options that the run would reject."""
    manifest, data_problem = _prepared_data(config)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.has_bf16 else "fp32"
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or _vocab_size(config, manifest)})
    config = config.model_copy(update={"precision": precision, "model": model})
    train_tokens = manifest.train_tokens if manifest else []
    config = resolve_steps(config, _samples_per_epoch(config, train_tokens))
    batches = BatchSchedule.of(config)
    notes, config = length_notices(config), config.resolved()
    if (n_samples := (smallest := min(batches.sizes())) // model.n_positions) < world_size:
        problem = f"{world_size} ranks are more than the {n_samples} samples of batch_tokens {smallest}"
        raise UserError(f"--world: {problem}; raise batch_tokens")
    per_rank = max_samples_per_rank(config, world_size)
    estimator = MemoryEstimator(config, world_size, device.type)
    largest = estimator.largest_micro_batch(HEADROOM * device.n_bytes)
    if config.micro_batch == "auto":
        micro_batch = equal_parts(per_rank, max(1, largest), config, device.type)
    else:
        micro_batch = min(config.micro_batch, per_rank)
    memory = estimator.estimate(micro_batch)
    sizes = estimator.stats, micro_batch, largest, memory
    return RunPlan(config, device, world_size, batches.tokens(config.steps), train_tokens, data_problem, *sizes, notes)


def _samples_per_epoch(config: Config, train_tokens: list[int]) -> Fraction | None:
    """Return the number of samples in an epoch of the prepared data; None if there is none."""
    if not train_tokens:
        return None
    weights = [source.weight for source in config.data.sources if source.weight]
    return epoch_samples([max(1, (n - 1) // config.model.n_positions) for n in train_tokens], weights or None)


class _QuickHashes(FileHashes):
    """Hashes of files within a budget: a plan does not read a large corpus that was never prepared."""

    n_bytes = 0  # read by this object, at most

    def sha256(self, path: Path) -> str:
        if str(path.absolute()) not in self.entries and path.is_file():
            self.n_bytes += path.stat().st_size
            if self.n_bytes > MAX_HASHED_BYTES:
                raise UserError("its text was not read yet")
        return super().sha256(path)


def _prepared_data(config: Config) -> tuple[Manifest | None, str]:
    """Return the manifest of the prepared data, or None and the reason why there is none, which may be ""."""
    cache = Path(config.data.cache_dir)
    try:
        folder = Corpus(config.data).folder_in(cache, _QuickHashes(cache / "digests.json"))
        return (read_manifest(folder) if folder.is_dir() else None), ""
    except UserError as error:  # a run is planned before its text is there
        return None, str(error)


def _vocab_size(config: Config, manifest: Manifest | None) -> int:
    """Return the rows of the embedding for `vocab_size: null`. Raises UserError if the tokenizer's size is unknown."""
    tokenizer = config.data.tokenizer
    if manifest is not None:
        size = manifest.vocab_size
    elif tokenizer.type in ("byte", "file"):
        size = build_tokenizer(tokenizer, ()).vocab_size
    else:
        size = tokenizer.vocab_size if tokenizer.type == "bpe" else VOCAB_SIZES.get(tokenizer.name)
    if size is None:
        remedy = "run python -m training.prepare first, or set --model.vocab_size"
        raise UserError(f"model.vocab_size: unknown until the tokenizer {tokenizer.name} is loaded: {remedy}")
    return -(-size // 64) * 64


def describe_model(config: Config, stats: ModelStats) -> dict[str, str]:
    """Return the lines "model", "parameters" and, if there are any, "groups" of a plan and of a run's header."""
    model, total, active = config.model, stats.n_parameters, stats.n_active_parameters
    moe = [block.ffn for block in model.layers() if block.ffn.type == "moe"]
    kinds = dict.fromkeys(
        f"top {ffn.top_k} of {ffn.n_experts}" + (f" and {ffn.n_shared} shared" if ffn.n_shared else "") for ffn in moe
    )
    experts = f"{len(moe)} of them MoE, {' or '.join(kinds)} experts, " if moe else ""
    return {
        "model": f"{model.n_layer} layers, {experts}{model.n_head} heads, width {model.n_embd}, "
        f"context {model.n_positions}, vocabulary {model.vocab_size:,}",
        "parameters": f"{total:,}" + (f", {active:,} active per token" if active < total else ""),
        **({"groups": describe_groups(config, stats)} if config.optim.groups else {}),
    }


def describe_groups(config: Config, stats: ModelStats) -> str:
    """Return the line about `optim.groups`: the parameters of each, and what it changes."""
    n_of, texts = Counter(), []
    for name, group in match_groups(config.optim, stats.kinds).items():
        n_of[group] += stats.shapes[name].numel()
    for group, n in n_of.items():
        options = {"learning rate": group.learning_rate, "weight decay": group.weight_decay}
        changes = ["frozen"] * group.freeze
        changes += [f"{name} {value:g}" for name, value in options.items() if value is not None]
        texts.append(f"{group.match}: {n:,} parameters, {', '.join(changes) or 'as without groups'}")
    return "; ".join(texts)


def describe_batch(config: Config, micro_batch: int, n_ranks: int = 1) -> str:
    """Return the line "batch" of a plan and of a run's header."""
    stages = []
    for step, token, size, _ in BatchSchedule.of(config).stages:
        n_samples = size // config.model.n_positions
        per_rank = f", {-(-n_samples // n_ranks)} per rank" if n_ranks > 1 else ""
        start = f"from {token:,} tokens (step {step + 1:,}) " if step else ""
        stages.append(f"{start}{size:,} tokens = {n_samples:,} samples x {config.model.n_positions}{per_rank}")
    return f"{'; '.join(stages)}, micro-batch {micro_batch}"


def report_lines(plan: RunPlan, mfu: float | None, measured: float | None) -> list[str]:
    """Return the report. `mfu`: FLOPs utilization, None: unknown; `measured`: tokens/s of this run on this machine."""
    config, device, memory = plan.config, plan.device, plan.memory
    ranks = f"{plan.world_size} x {device.name}" if plan.world_size > 1 else device.name
    flops, active = plan.stats.flops_per_token, plan.stats.n_active_parameters
    gib = checkpoint_bytes(plan.stats, config) / 2**30
    url = config.checkpoint.copy_to
    copies = "" if url is None else f"; each is sent to {url} and read back"
    per_rank, largest = max_samples_per_rank(config, plan.world_size), plan.largest_micro_batch
    fits = {0: "not one sample fits", per_rank: "all samples fit at once"}
    problem = f" ({plan.data_problem})" if plan.data_problem else ""
    data = f"not prepared here{problem}, so epochs are unknown; python -m training.prepare counts them"
    if plan.train_tokens:
        source = " (the source that is read most)" if len(plan.train_tokens) > 1 else ""
        data = f"{sum(plan.train_tokens):,} training tokens, {epochs(plan):.3g} epochs{source}"
    figures = {
        "plan": f"{config.name} on {ranks}, {config.precision}",
        **describe_model(config, plan.stats),
        "FLOPs": f"{flops / 1e9:,.3g} G per token, forward and backward; {flops * plan.n_tokens:.3g} in all",
        "batch": describe_batch(config, plan.micro_batch, plan.world_size)
        + (" (chosen)" if config.micro_batch == "auto" else ""),
        "steps": f"{config.steps:,} = {plan.n_tokens:,} tokens, {_rounded(plan.n_tokens / active)} per "
        + ("active parameter" if active < plan.stats.n_parameters else "parameter"),
        "data": data,
        "checkpoints": f"{gib:,.2f} GiB each, at most {n_checkpoints(config)} on disk at a time{copies}",
        "time": _time(plan, mfu, measured),
        "memory": fits.get(largest, f"{largest} of a rank's {per_rank} samples fit at once"),
    }
    peak = "the optimizer step" if memory.in_step else "forward and backward"
    parts = {name.replace("_", " "): n_bytes for name, n_bytes in memory._asdict().items() if name != "in_step"}
    return [
        *(f"{label:<13}{text}" for label, text in figures.items()),
        "",
        f"peak memory per device, in {peak}, GiB",
        *(f"  {name:<14}{n_bytes / 2**30:>9.2f}" for name, n_bytes in parts.items() if n_bytes),
        f"  {'in all':<14}{memory.total / 2**30:>9.2f} of {device.n_bytes / 2**30:.1f}",
        *(f"warning: {text}" for text in warnings(plan)),
    ]


def epochs(plan: RunPlan) -> float:
    """Return the number of epochs; with weighted sources, of the source that is read most."""
    weights = [source.weight for source in plan.config.data.sources if source.weight] or [1.0]
    return max(plan.n_tokens * weight / sum(weights) / n for n, weight in zip(plan.train_tokens, weights, strict=True))


def _time(plan: RunPlan, mfu: float | None, measured: float | None) -> str:
    """Return the duration and how it was computed. Raises UserError if `mfu` is set and the device's peak unknown."""
    if mfu is None and measured:
        return f"{duration_text(plan.n_tokens / measured)}, at {measured:,.0f} tokens/s as this run was measured here"
    peak = plan.device.peak_flops if plan.config.precision != "fp32" else None
    if peak is None and mfu is None:
        return "unknown: no peak is known of this device; train some steps here, then plan again"
    if peak is None:
        raise UserError(f"--mfu: no peak is known of {plan.device.name} in {plan.config.precision}; leave it out")
    speed = (mfu or DEFAULT_MFU) * peak * plan.world_size / plan.stats.flops_per_token
    how = f"{mfu or DEFAULT_MFU:.0%} of {peak / 1e12:,.0f} TFLOP/s" + ("" if mfu else ", assumed; set it with --mfu")
    how += "; communication is not counted" if plan.world_size > 1 else ""
    return f"{duration_text(plan.n_tokens / speed)}, at {speed:,.0f} tokens/s = {how}"


def duration_text(seconds: float) -> str:
    """Return a duration in days, hours, minutes or seconds."""
    units = (("days", 2 * 86400, 86400), ("hours", 3600, 3600), ("minutes", 60, 60), ("seconds", 0, 1))
    unit, size = next((unit, size) for unit, minimum, size in units if seconds >= minimum)
    return f"{seconds / size:,.1f} {unit}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def warnings(plan: RunPlan) -> Iterator[str]:
    """Yield likely mistakes, each with what to change."""
    config, device = plan.config, plan.device
    if not plan.largest_micro_batch:
        remedy = "parallel.recompute: full, parallel.mesh.shard over more devices, a smaller model.n_positions"
        yield f"not one sample fits into {device.n_bytes / 2**30:.1f} GiB: use {remedy}, or a smaller model"
    elif plan.micro_batch > plan.largest_micro_batch:
        yield f"micro_batch {plan.micro_batch} does not fit: use auto, or {plan.largest_micro_batch}"
    for n_samples in dict.fromkeys(size // config.model.n_positions for size in BatchSchedule.of(config).sizes()):
        if n_samples % plan.world_size:
            yield f"{n_samples} samples do not divide among {plan.world_size} ranks: some wait at each step"
        elif (per_rank := n_samples // plan.world_size) > plan.micro_batch and per_rank % plan.micro_batch:
            multiple = f"no multiple of micro_batch {plan.micro_batch}"
            yield f"a rank's {per_rank} samples are {multiple}: the last micro-batch of a step is smaller"
    if config.precision == "bf16" and not device.has_bf16:
        other = "fp16" if device.type == "cuda" else "fp32"
        yield f"{device.name} has no matrix units for bf16: use precision {other}"
    if plan.train_tokens and (n_epochs := epochs(plan)) > MAX_EPOCHS:
        yield f"{n_epochs:.3g} epochs: beyond {MAX_EPOCHS} the model learns little; use more text or fewer steps"
    ratio = plan.n_tokens / plan.stats.n_active_parameters
    best = f"{_rounded(ratio)} tokens per parameter; about 20 are best"
    if ratio < MIN_TOKENS_PER_PARAMETER:
        yield f"{best}: a smaller model learns more in that time; or raise steps"
    elif ratio > MAX_TOKENS_PER_PARAMETER:
        yield f"{best}: a larger model learns more in that time"
    if problem := disk_shortage(plan.stats, config):
        yield problem


def checkpoint_bytes(stats: ModelStats, config: Config) -> int:
    """Return the size of a checkpoint: float32 weights and optimizer state."""
    return 4 * stats.n_parameters + state_bytes(config.optim, stats.shapes, stats.kinds)


def n_checkpoints(config: Config) -> int:
    """Return the largest number of checkpoints on disk at once, which is reached while one is written."""
    n_kept = config.steps // config.checkpoint.keep_every if config.checkpoint.keep_every is not None else 0
    n_copied = config.checkpoint.copy_to is not None  # one stays while it is copied
    return config.checkpoint.keep + config.checkpoint.keep_best + n_kept + n_copied + 1


def check_memory(config: Config, world_size: int, available: int) -> None:
    """Raise UserError if a run cannot fit into `available` bytes per rank, whatever its micro-batch. Allocates nothing.

    Counts what every rank must hold: its share of weights, gradients and optimizer state, and its tokens of a batch.
    """
    stats = model_stats(config.model.model_copy(update={"vocab_size": config.model.vocab_size or 2}))
    n_shards = max(config.parallel.mesh.shard, config.parallel.mesh.expert)
    frozen = frozen_names(match_groups(config.optim, stats.kinds))
    n_trained = stats.n_parameters - sum(stats.shapes[name].numel() for name in frozen)
    state = 4 * (stats.n_parameters + n_trained) + state_bytes(config.optim, stats.shapes, stats.kinds)
    batch_tokens = max(BatchSchedule.of(config).sizes())
    tokens = 16 * batch_tokens // world_size  # inputs and targets, int64
    for needed, what, remedy in (
        (
            state // n_shards,
            f"the {stats.n_parameters:,} parameters of model, their gradients and optimizer",
            "a smaller model",
        ),
        (tokens, f"batch_tokens {batch_tokens:,}", "fewer"),
    ):
        if needed > available:
            sizes = f"{needed / 2**30:,.1f} GiB per rank, and {available / 2**30:,.1f} GiB are here"
            raise UserError(f"{what} take {sizes}; use {remedy}, or more ranks (parallel.mesh)")


def disk_shortage(stats: ModelStats, config: Config, *, fresh: bool = False) -> str | None:
    """Return an error line if checkpoints and the final model do not fit on the disk, else None.

    A resumed run replaces its checkpoints: their space counts as free. A `fresh` run moves them aside and keeps them.
    """
    folder = (config.run_dir / "checkpoints").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    needed = n_checkpoints(config) * checkpoint_bytes(stats, config) + 4 * stats.n_parameters
    needed -= 0 if fresh else sum(path.lstat().st_size for path in folder.glob("step-*/*"))
    if (free := shutil.disk_usage(existing).free) >= needed:
        return None
    has, need = (f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB" for n in (free, needed))
    problem = f"{existing} has {has} free, and checkpoints and the model need {need}"
    return f"{problem}: lower checkpoint.keep, or choose another out_dir"
