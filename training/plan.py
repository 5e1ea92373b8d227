"""What a run will take, before it takes it: memory, time, data, disk. Nothing is allocated, nothing prepared.

    python -m training.plan --config configs/gpt2_moe_8x124m.yaml --world 8 --device h200

docs/planning.md says what the figures stand on.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.config import Config
from training.errors import UserError
from training.options import cli

if TYPE_CHECKING:
    from training.data.shards import Manifest
    from training.model import GPT
    from training.planning.memory import MemoryEstimate

FLAGS = {
    "--world": "processes, a device each (default 1)",
    "--device": "the device, such as h200, a100, 'rtx 4090' or cpu (default: the one here)",
    "--mfu": "share of the device's peak that is reached, 0 to 1 (default: as this run was measured here, else 0.4)",
}
MFU = 0.4
NO_BF16 = {"V100", "T4"}  # which have no matrix units for it
# Text that is read again is worth nearly as much as new text up to here (arXiv:2305.16264).
MOST_EPOCHS = 4
# arXiv:2203.15556 finds 20 best for a given computation; more is usual for a model that is used much, up to here.
TOKENS_A_PARAMETER = (5, 500)
# Tokenizers that are known by name, with the end-of-text token.
VOCABULARIES = {
    "gpt2": 50257,
    "openai-community/gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "cl100k_base": 100277,
    "o200k_base": 200019,
}
WORDS = {
    "weights": "weights",
    "casts": "weights, cast or gathered",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits and the head's gradients",
    "routing": "worst routing, beyond an even one",
    "pieces": "between tensors (C library)",
    "copy": "copy that saves are written from",
    "process": "interpreter and libraries",
}


class Machine(NamedTuple):
    """A device that a run is planned for."""

    name: str
    type: str  # cuda, mps, cpu
    n_bytes: int
    peak: float | None  # FLOP/s for 16-bit products
    bf16: bool  # whether there are matrix units for it


class Plan(NamedTuple):
    """What the figures are made of."""

    config: Config  # resolved
    machine: Machine
    world: int
    manifest: Manifest | None  # of the prepared data
    model: GPT  # on the meta device
    micro_batch: int
    fits: int  # the largest micro-batch within the device's memory
    memory: MemoryEstimate


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status: 0 done, 2 wrong input."""
    arguments = sys.argv[1:] if argv is None else argv
    config, flags = cli.parse_command_line(arguments, prog="python -m training.plan", doc=__doc__, flags=FLAGS)
    try:
        world = int(_number("--world", flags["--world"] or "1", "a number of processes, 1 or more", "[1-9][0-9]{0,6}"))
        mfu = flags["--mfu"]
        if mfu is not None:
            mfu = _number("--mfu", mfu, "above 0 and at most 1", r"0?\.[0-9]*[1-9][0-9]*|1(\.0*)?")
        found = plan(config, machine(flags["--device"], config), world)
        print(*lines(found, mfu, here=flags["--device"] is None), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _number(flag: str, text: str, words: str, pattern: str) -> float:
    if not re.fullmatch(pattern, text):
        raise UserError(f"{flag}: {text!r} is not {words}")
    return float(text)


def machine(name: str | None, config: Config) -> Machine:
    """The device of that name, or the one here. Raises UserError for a name that is not known."""
    from training import device as devices

    if name is None or name.lower() == "cpu":
        here = devices.select_device(config.parallel.device if name is None else "cpu")
        peak = devices.peak_flops(here, "bf16")
        return Machine(
            devices.device_name(here),
            here.type,
            devices.available_memory_bytes(here),
            peak,
            devices.has_bf16_units(here),
        )
    known = {"".join(re.findall("[a-z0-9]+", key.lower())): key for key in devices.GPUS}
    key = known.get("".join(re.findall("[a-z0-9]+", name.lower())))
    if key is None:
        raise UserError(f"--device: {name!r} is none of cpu, {', '.join(devices.GPUS)}")
    gpu = devices.GPUS[key]
    return Machine(key, "cuda", round(gpu.memory_gib * 2**30), gpu.peak_flops, key not in NO_BF16)


def plan(config: Config, machine: Machine, world: int) -> Plan:
    """Look at what is prepared, and work out memory. Raises UserError for what the run would refuse."""
    import torch

    from training.model import GPT
    from training.planning.batch_split import HEADROOM, equal_parts, max_samples_per_rank
    from training.planning.memory import estimate, largest_micro_batch
    from training.weights.init_from import resolve_init_from

    config = resolve_init_from(config)
    manifest = prepared(config)
    precision = config.precision if config.precision != "auto" else "bf16" if machine.bf16 else "fp32"
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or _vocabulary(config, manifest)})
    config = config.model_copy(update={"precision": precision, "model": model})
    n_mine = max_samples_per_rank(config, world)
    if config.batch_tokens // model.n_positions < world:
        raise UserError(
            f"--world: {world} processes are more than the {config.batch_tokens // model.n_positions} samples of "
            f"batch_tokens {config.batch_tokens}; raise batch_tokens"
        )
    fits = largest_micro_batch(config, HEADROOM * machine.n_bytes, world, machine.type)
    micro_batch = config.micro_batch
    if micro_batch == "auto":
        micro_batch = equal_parts(n_mine, max(1, fits), config, machine.type)
    micro_batch = min(micro_batch, n_mine)
    with torch.device("meta"):
        network = GPT(model)
    memory = estimate(config, micro_batch, world, machine.type)
    return Plan(config, machine, world, manifest, network, micro_batch, fits, memory)


def prepared(config: Config) -> Manifest | None:
    """What is known of the data where they are prepared. Raises UserError where a source is missing."""
    from training.data.corpus import Corpus
    from training.data.file_hashes import FileHashes
    from training.data.shards import read_manifest

    cache = Path(config.data.cache_dir).expanduser()
    folder = cache / Corpus(config.data).cache_key(FileHashes(cache / "digests.json"))
    return read_manifest(folder) if folder.is_dir() else None


def _vocabulary(config: Config, manifest: Manifest | None) -> int:
    """Rows of the embedding where the model's section leaves them open. Raises UserError where nothing tells."""
    from training.data import tokenizer_choice

    asked = config.data.tokenizer
    if manifest is not None:
        size = manifest.vocab_size
    elif asked.type in ("byte", "file"):
        size = tokenizer_choice.build_tokenizer(asked, ()).vocab_size
    else:
        size = asked.vocab_size if asked.type == "bpe" else VOCABULARIES.get(asked.name)
    if size is None:
        raise UserError(
            f"model.vocab_size: unknown, as the data are not prepared; give --model.vocab_size, or first "
            f"python -m training.prepare, which loads the tokenizer {asked.name}"
        )
    return -(-size // 64) * 64


def lines(plan: Plan, mfu: float | None, *, here: bool) -> list[str]:
    """The plan in words and figures."""
    from training.planning.disk import checkpoint_bytes, n_checkpoints

    config, machine, world = plan.config, plan.machine, plan.world
    devices = f"{world} x {machine.name}" if world > 1 else machine.name
    total, active = plan.model.n_parameters()
    samples, tokens = config.batch_tokens // config.model.n_positions, config.steps * config.batch_tokens
    flops = plan.model.flops_per_token()
    n_mine = math.ceil(samples / world)
    n_bytes = checkpoint_bytes(plan.model, config)
    facts = {
        "plan": f"{config.name} on {devices}, {config.precision}",
        "parameters": f"{total:,}" + (f", {active:,} of them active for a token" if active < total else ""),
        "FLOPs": f"{flops / 1e9:,.3g} G a token, forward and backward; {flops * tokens:.3g} in all",
        "batch": f"{config.batch_tokens:,} tokens = {samples:,} samples x {config.model.n_positions}"
        + (f", {n_mine} a device" if world > 1 else "")
        + f", {plan.micro_batch} at a time"
        + (" (chosen)" if config.micro_batch == "auto" else ""),
        "steps": f"{config.steps:,} = {tokens:,} tokens, {_figure(tokens / active)} a parameter"
        + (" that is active" if active < total else ""),
        "data": _data(plan),
        "checkpoints": f"{n_bytes / 2**30:,.2f} GiB each, {n_checkpoints(config)} of them on disk while one is written",
        "time": _time(plan, mfu, here),
        "micro-batch": _micro_batch(plan, n_mine),
    }
    table = [f"{label:<13}{text}" for label, text in facts.items()]
    peak = "the optimizer's step" if plan.memory.in_step else "forward and backward"
    table += ["", f"memory of a device at the peak, in {peak}, GiB"]
    table += [
        f"  {words:<34}{getattr(plan.memory, part) / 2**30:>9.2f}"
        for part, words in WORDS.items()
        if getattr(plan.memory, part)
    ]
    table.append(f"  {'in all':<34}{plan.memory.total / 2**30:>9.2f} of {machine.n_bytes / 2**30:.1f}")
    return table + [f"warning: {text}" for text in warnings(plan)]


def _data(plan: Plan) -> str:
    if plan.manifest is None:
        return "not prepared here, so epochs are unknown; python -m training.prepare counts them"
    n_tokens = sum(record.n_tokens for record in plan.manifest.streams if record.split == "train")
    return f"{n_tokens:,} tokens to train on, each read {epochs(plan):.3g} times" + (
        " where that is most" if len(plan.manifest.streams) > 2 else ""
    )


def epochs(plan: Plan) -> float:
    """How often the run reads its text; of weighted sources, the one that is read the most."""
    tokens = plan.config.steps * plan.config.batch_tokens
    streams = [record.n_tokens for record in plan.manifest.streams if record.split == "train"]
    weights = [source.weight or 1.0 for source in plan.config.data.sources] if len(streams) > 1 else [1.0]
    return max(tokens * weight / sum(weights) / n for n, weight in zip(streams, weights, strict=True))


def _time(plan: Plan, mfu: float | None, here: bool) -> str:
    """Hours, and what they stand on."""
    config, peak = plan.config, plan.machine.peak if plan.config.precision != "fp32" else None
    tokens = config.steps * config.batch_tokens
    if mfu is None and here and (speed := measured(plan)):
        return f"{hours(tokens / speed)}, at {speed:,.0f} tokens/s as this run was measured here"
    if peak is None:
        if mfu is not None:
            raise UserError(f"--mfu: no peak is known of {plan.machine.name} in {config.precision}; leave it out")
        return "unknown: no peak is known; train some steps here, and ask again"
    speed = (mfu or MFU) * peak * plan.world / plan.model.flops_per_token()
    how = f"{mfu or MFU:.0%} of {peak / 1e12:,.0f} TFLOP/s" + ("" if mfu else ", assumed; --mfu says otherwise")
    how += "; what travels between devices is not counted" if plan.world > 1 else ""
    return f"{hours(tokens / speed)}, at {speed:,.0f} tokens/s = {how}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400 * 2), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def measured(plan: Plan) -> float | None:
    """Tokens a second of this run's own folder, where it has begun with the same model, batch and processes."""
    from training.logging.jsonl import read_rows

    folder = Path(plan.config.out_dir, plan.config.name)
    if not (folder / "config.yaml").is_file():
        return None
    kept = cli.load_config(folder / "config.yaml")
    same = ("model", "batch_tokens", "precision")
    said = (folder / "run.json").read_text() if (folder / "run.json").is_file() else ""
    ranks = re.search(r"(\d+) processes", said)
    if any(getattr(kept, name) != getattr(plan.config, name) for name in same):
        return None
    if plan.machine.name not in said or int(ranks[1] if ranks else 1) != plan.world:
        return None
    speeds = [row["tokens_per_s"] for row in read_rows(folder / "metrics.jsonl")[1:]]
    return statistics.median(speeds[-200:]) if speeds else None


def _micro_batch(plan: Plan, n_mine: int) -> str:
    if plan.fits == 0:
        return "not one sample fits"
    return (
        f"{plan.fits} of a device's {n_mine} samples fit at a time" if plan.fits < n_mine else "all samples fit at once"
    )


def warnings(plan: Plan) -> Iterator[str]:
    """What is likely to be regretted, each with what to do."""
    from training.planning.disk import disk_shortage

    config, machine = plan.config, plan.machine
    samples, tokens = config.batch_tokens // config.model.n_positions, config.steps * config.batch_tokens
    if not plan.fits:
        yield (
            f"not one sample fits into {machine.n_bytes / 2**30:.1f} GiB: use parallel.recompute: full, "
            "parallel.mesh.shard over more devices, a smaller model.n_positions, or a smaller model"
        )
    elif plan.micro_batch > plan.fits:
        yield f"micro_batch {plan.micro_batch} does not fit: use auto, or {plan.fits}"
    if samples % plan.world:
        yield f"{samples} samples do not divide among {plan.world} processes: some wait for others at each step"
    elif (samples // plan.world) % plan.micro_batch:
        yield (
            f"a device's {samples // plan.world} samples are no multiple of micro_batch {plan.micro_batch}: the last "
            "forward and backward of a step is a smaller one"
        )
    if config.precision == "bf16" and not machine.bf16:
        other = "fp16" if machine.type == "cuda" else "fp32"
        yield f"{machine.name} has no matrix units for bf16: use precision {other}"
    if plan.manifest is not None and (read := epochs(plan)) > MOST_EPOCHS:
        yield f"text is read {read:.3g} times: beyond {MOST_EPOCHS} it teaches little; use more text or fewer steps"
    _, active = plan.model.n_parameters()
    low, high = TOKENS_A_PARAMETER
    if not low <= tokens / active <= high:
        change = "a smaller model, or more steps," if tokens / active < low else "a larger model"
        each = _figure(tokens / active)
        yield f"{each} tokens a parameter, where about 20 are best: {change} learns more in that time"
    if problem := disk_shortage(plan.model, config):
        yield problem


if __name__ == "__main__":
    sys.exit(main())
