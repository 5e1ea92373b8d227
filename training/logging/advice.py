"""The questions after a run, answered from what was measured: did memory suffice, where did the time go, did it learn?

Each is answered: by lines that state a figure and what to do about it, or by one that says that nothing is to be
gained. What counts as too much is in one table, `LIMITS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

from training import device as devices
from training.logging.charts import Point, points
from training.logging.jsonl import read_rows
from training.logging.phases import goodput
from training.planning.batch_split import max_samples_per_rank

if TYPE_CHECKING:
    from training.config import Config
    from training.engine.build import Run


class Limit(NamedTuple):
    """From where on something is worth a line."""

    value: float
    why: str


LIMITS = {
    # shares of all time
    "data": Limit(0.05, "batches come from memory maps: a disk that keeps up costs under 1 %"),
    "communication": Limit(0.20, "gradients travel once a step; well-chosen batches hide or outweigh it"),
    "evaluation": Limit(0.10, "a curve of validation loss is as readable from half as many evaluations"),
    "checkpoint": Limit(0.05, "a save in the background stops the loop for a copy in memory only"),
    "idle": Limit(0.10, "rows and logs are milliseconds: they weigh where steps are as short"),
    "redone": Limit(0.05, "a save costs the loop so little that more of them cost less than this"),
    "start": Limit(0.30, "it is paid once a start: what weighs as much is a run too short to judge speed by"),
    # the device
    "mfu": Limit(0.30, "large dense models reach 0.4 to 0.55, small ones and experts 0.3"),
    "memory_full": Limit(0.92, "auto leaves a tenth to fragments; less is an out-of-memory error waiting"),
    "memory_empty": Limit(0.50, "where half is free, twice the samples at a time fit"),
    # learning
    "clipped": Limit(0.50, "clipping is for outliers; of half the steps, it is what sets the learning rate"),
    "overfit": Limit(0.01, "validation loss over its best; noise between evaluations is a few thousandths"),
    "hardly": Limit(0.75, "of ln(vocabulary): how often each token occurs, and nothing else, gives about 0.7"),
    "falling": Limit(0.03, "a fall over a fifth of the run, at its end; the schedule's end alone gives 1 to 2 %"),
}


class Facts(NamedTuple):
    """What was measured, and the options that matter to what can be done."""

    seconds: dict[str, float]  # by phase
    config: Config
    on_gpu: bool
    mfu: float | None
    memory: float  # peak, as a share of the device's
    memory_gib: float
    micro_batch: int
    most: int  # samples of a rank's share of a batch
    back_offs: int  # how often memory was out
    clipped: float  # share of steps
    skipped: int  # steps
    losses: list[Point]  # training's
    val_losses: list[Point]
    dead_experts: int
    n_experts: int  # in all layers
    vocabulary: int


def facts_of_run(run: Run) -> Facts:
    """The facts of a run at its end. The timer is settled."""
    config, device, row = run.config, run.world.device, run.last_row
    rows = read_rows(run.folder / "metrics.jsonl")
    norms, mfu = [norm for _, norm in points(rows, "grad_norm")], [share for _, share in points(rows, "mfu")]
    peak = max((gib for _, gib in points(rows, "memory_gib")), default=devices.peak_memory_gib(device))
    n_clipped = sum(norm > config.optim.grad_clip for norm in norms) if config.optim.grad_clip is not None else 0
    return Facts(
        seconds=run.timer.seconds,
        config=config,
        on_gpu=device.type != "cpu",
        mfu=median(mfu) if mfu else None,
        memory=peak * 2**30 / devices.available_memory_bytes(device),
        memory_gib=peak,
        micro_batch=run.micro_batch,
        most=max_samples_per_rank(config, run.world.size),
        back_offs=run.back_offs,
        clipped=n_clipped / len(norms) if norms else 0.0,
        skipped=run.skips.total,
        losses=points(rows, "loss"),
        val_losses=points(rows, "val_loss"),
        dead_experts=row.get("dead_experts", 0),
        n_experts=sum(map(len, row.get("expert_load", ()))),
        vocabulary=run.dataset.tokenizer.vocab_size,
    )


def advice(facts: Facts) -> list[str]:
    """A line or more on each of memory, speed and learning."""
    parts: dict[str, tuple[Callable[[Facts], Iterator[str]], str]] = {
        "memory": (memory, f"{facts.memory_gib:.1f} GiB at the peak, {facts.memory:.0%} of what there is"),
        "speed": (speed, f"{goodput(facts.seconds) or 0:.0%} of the time went into steps"),
        "learning": (learning, f"validation loss ended near its lowest, {facts.clipped:.0%} of the steps were clipped"),
    }
    lines = []
    for issue, (answers, fine) in parts.items():
        found = list(answers(facts)) or [f"{fine}: nothing to be gained here"]
        lines += [f"{issue}: {line}".replace("%", " %") for line in found]
    return lines


def memory(facts: Facts) -> Iterator[str]:
    """Out of memory, nearly so, or far from it."""
    parallel, n = facts.config.parallel, facts.micro_batch
    less = "parallel.recompute: full" if parallel.recompute != "full" else "parallel.mesh.shard over more processes"
    if facts.back_offs:
        times = "once" if facts.back_offs == 1 else f"{facts.back_offs} times"
        yield f"it ran out {times}; --micro_batch {n} begins with what fitted, and {less} makes room for more"
    elif facts.memory > LIMITS["memory_full"].value:
        smaller = f"--micro_batch {n // 2}" if n > 1 else less
        yield f"{facts.memory:.0%} of it was in use at the peak; {smaller} leaves a margin"
    elif facts.on_gpu and facts.memory < LIMITS["memory_empty"].value and facts.config.micro_batch != "auto":
        fits = min(facts.most, int(n * LIMITS["memory_full"].value / facts.memory))
        if fits > n:
            yield f"{facts.memory:.0%} of it was in use at the peak; micro_batch: auto finds {fits} samples or more"


def speed(facts: Facts) -> Iterator[str]:
    """Where the time went that a step does not need."""
    total, config = sum(facts.seconds.values()), facts.config
    several = "batch_tokens: more of them a step" if config.parallel.mesh.shard == 1 else "a larger micro_batch"
    saves = "raise checkpoint.every" if config.checkpoint.background else "use checkpoint.background"
    pays = "parallel.compile pays in longer runs" if config.parallel.compile else "a longer run pays no more of it"
    answers = {
        "data": "waits for data; put data.cache_dir on a faster disk",
        "communication": f"waits for other ranks; {several}, or fewer processes",
        "evaluation": "is evaluation; raise eval.every or lower eval.tokens",
        "checkpoint": f"waits for saves; {saves}",
        "idle": "is rows and logs; raise logging.every",
        "redone": "was lost to kills or going back, and done again; lower checkpoint.every",
        "start": "is start-up, with data and the first step; " + pays,
    }
    for phase, answer in answers.items():
        share = facts.seconds[phase] / total if total else 0.0
        if share > LIMITS[phase].value:
            yield f"{share:.0%} of the time {answer}"
    if facts.mfu is not None and facts.mfu < LIMITS["mfu"].value:
        tries = [] if config.parallel.compile else ["parallel.compile"]
        if facts.micro_batch < facts.most:
            tries.append("a larger micro_batch")
        yield f"MFU is {facts.mfu:.0%}; " + (f"try {' or '.join(tries)}" if tries else "a wider model uses more of it")


def learning(facts: Facts) -> Iterator[str]:
    """Why the loss may be higher than it could be."""
    optim, curve = facts.config.optim, facts.val_losses
    if facts.clipped > LIMITS["clipped"].value:
        yield (
            f"{facts.clipped:.0%} of the steps were clipped to optim.grad_clip {optim.grad_clip:g}; lower "
            "optim.learning_rate or raise schedule.warmup_steps"
        )
    if facts.skipped:
        yield (
            f"{facts.skipped} step{'s were' if facts.skipped > 1 else ' was'} skipped, of a loss or gradient that was "
            "not finite or a spike; lower optim.learning_rate, or look at the text there"
        )
    if facts.dead_experts:
        yield (
            f"{facts.dead_experts} of {facts.n_experts} experts are dead; raise bias_rate or switch_weight of "
            "their layers, or use fewer experts"
        )
    if not curve:
        return
    (best_step, best), (last_step, last) = min(curve, key=lambda point: point[1]), curve[-1]
    share = last / math.log(facts.vocabulary)
    if share > LIMITS["hardly"].value:
        yield (
            f"validation loss {last:.2f} is {share:.0%} of ln(vocabulary), which is knowing nothing; train longer, "
            "raise optim.learning_rate, or look at the text"
        )
    elif last > best * (1 + LIMITS["overfit"].value):
        rose = f"validation loss was lowest at step {best_step}, {best:.2f}, and rose to {last:.2f} while training loss"
        if falls(facts.losses, best_step):
            yield f"{rose} fell: it overfits; more text, fewer steps or more optim.weight_decay"
        else:
            yield f"{rose} rose too: it is unstable; lower optim.learning_rate"
    elif before := [point for point in curve if point[0] <= 0.8 * last_step]:
        step, loss = before[-1]
        fall = 1 - last / loss
        if fall * 0.2 * last_step / (last_step - step) > LIMITS["falling"].value:
            yield f"validation loss fell by another {fall:.1%} after step {step}; more steps would lower it further"


def falls(losses: list[Point], since: int) -> bool:
    """Whether the mean loss of the steps after one is below that of as many before it."""
    after = [loss for step, loss in losses if step > since]
    before = [loss for step, loss in losses if step <= since][-len(after) :]
    return bool(after and before) and fmean(after) < fmean(before)
