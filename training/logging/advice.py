"""Advice after a run, from its measurements: was memory enough, where did the time go, did the model learn?"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from training.config import Config
from training.logging.history import History, Point
from training.logging.phases import goodput

LIMITS = {  # thresholds beyond which a figure is worth a line, and their reasons
    # shares of all time
    "data": 0.05,  # batches come from memory maps: a disk that keeps up costs under 1 %
    "communication": 0.20,  # gradients travel once a step; a larger batch hides or outweighs it
    "evaluation": 0.10,  # a curve of validation loss is as readable from half as many evaluations
    "checkpoint": 0.05,  # a save in the background stops the loop for a copy in memory only
    "idle": 0.10,  # rows and logs take milliseconds: they matter only if steps are as short
    "redone": 0.05,  # a save costs the loop little: saving more often costs less than this
    "start": 0.30,  # start-up is paid once per start; more than this is a run too short to judge its speed
    # the device
    "mfu": 0.30,  # large dense models reach 0.4 to 0.55, small ones and experts 0.3
    "memory_full": 0.92,  # auto leaves a tenth for fragmentation; less risks running out of memory
    "memory_empty": 0.50,  # if half is free, a micro-batch of twice the size fits
    # learning
    "clipped": 0.50,  # clipping is for outliers; if it hits half the steps, it sets the learning rate
    "overfit": 0.01,  # validation loss over its best; noise between evaluations is a few thousandths
    "hardly": 0.75,  # of ln(vocabulary): token frequencies alone reach about 0.7
    "falling": 0.03,  # fall over the last fifth of the run; the end of the schedule alone gives 1 to 2 %
}


class Facts(NamedTuple):
    """Measurements of a run, and the options that limit what can be done."""

    seconds: dict[str, float]  # by phase
    config: Config
    on_gpu: bool
    mfu: float | None
    memory_share: float  # peak, as a share of the device's memory
    memory_gib: float  # peak
    micro_batch: int
    max_samples_per_rank: int  # of a global batch
    n_out_of_memory: int  # times that memory ran out
    clipped_share: float  # of the steps
    n_skipped: int  # steps
    losses: list[Point]
    val_losses: list[Point]
    dead_experts: int
    n_experts: int  # in all layers
    vocab_size: int


def facts_from_history(history: History, config: Config, *, memory_gib: float, peak_gib: float, **measured) -> Facts:
    """Return a run's facts. `memory_gib` is the device's, `peak_gib` replaces missing rows, `measured` has the rest.

    The shares of rows are estimates beyond `history.MAX_SPANS` rows: a span counts as its last row.
    """
    norms, mfu = ([(part.last[1], part.n) for part in history.series(key)] for key in ("grad_norm", "mfu"))
    clip, last = config.optim.grad_clip, history.recent[-1] if history.recent else {}
    n_clipped = sum(n for norm, n in norms if clip is not None and norm > clip)
    peak = max((part.high[1] for part in history.series("memory_gib")), default=peak_gib)
    return Facts(
        config=config,
        mfu=_median(mfu) if mfu else None,
        memory_share=peak / memory_gib,
        memory_gib=peak,
        clipped_share=n_clipped / sum(n for _, n in norms) if norms else 0.0,
        losses=[(part.last[0], part.total / part.n) for part in history.series("loss")],
        val_losses=history.points("val_loss"),
        dead_experts=last.get("dead_experts", 0),
        n_experts=sum(map(len, last.get("expert_load", ()))),
        **measured,
    )


def _median(values: list[tuple[float, int]]) -> float:
    """Return the median of numbers that stand for n rows each."""
    values = sorted(values)
    ranks = list(accumulate(n for _, n in values))
    return values[bisect_left(ranks, ranks[-1] / 2)][0]


def advice(facts: Facts) -> list[str]:
    """Return lines with a figure and a remedy on memory, speed and learning, or that there is nothing to improve."""
    clipped = f"{facts.clipped_share:.0%} of the steps were clipped"
    topics = {
        "memory": (memory, f"peak {facts.memory_gib:.1f} GiB, {facts.memory_share:.0%} of the device"),
        "speed": (speed, f"{goodput(facts.seconds) or 0:.0%} of the time went into steps"),
        "learning": (learning, f"validation loss ended near its lowest, {clipped}"),
    }
    lines = []
    for topic, (advise, figure) in topics.items():
        texts = list(advise(facts)) or [f"{figure}: nothing to improve"]
        lines += [f"{topic}: {text}".replace("%", " %") for text in texts]
    return lines


def memory(facts: Facts) -> Iterator[str]:
    """Yield advice if memory ran out, nearly did, or is far from full."""
    parallel, n, used = facts.config.parallel, facts.micro_batch, facts.memory_share
    less = "parallel.recompute: full" if parallel.recompute != "full" else "parallel.mesh.shard over more processes"
    if facts.n_out_of_memory:
        times = "once" if facts.n_out_of_memory == 1 else f"{facts.n_out_of_memory} times"
        yield f"ran out {times}; --micro_batch {n} starts with the size that fit, and {less} makes room for more"
    elif used > LIMITS["memory_full"]:
        smaller = f"--micro_batch {n // 2}" if n > 1 else less
        yield f"{used:.0%} was in use at the peak; {smaller} leaves a margin"
    elif facts.on_gpu and used < LIMITS["memory_empty"] and facts.config.micro_batch != "auto":
        fits = min(facts.max_samples_per_rank, int(n * LIMITS["memory_full"] / used))
        if fits > n:
            yield f"{used:.0%} was in use at the peak; micro_batch: auto finds {fits} samples or more"


def speed(facts: Facts) -> Iterator[str]:
    """Yield advice about time that did not go into steps, and about low MFU."""
    total, config = sum(facts.seconds.values()), facts.config
    batch = "raise batch_tokens" if config.parallel.mesh.shard == 1 else "raise micro_batch"
    saves = "raise checkpoint.every" if config.checkpoint.background else "use checkpoint.background"
    longer = "parallel.compile pays in longer runs" if config.parallel.compile else "it does not grow with longer runs"
    remedies = {
        "data": "was spent waiting for data; put data.cache_dir on a faster disk",
        "communication": f"was spent waiting for other ranks; {batch} or use fewer processes",
        "evaluation": "went into evaluation; raise eval.every or lower eval.tokens",
        "checkpoint": f"was spent waiting for saves; {saves}",
        "idle": "went into rows and logs; raise logging.every",
        "redone": "went into steps done again after kills; lower checkpoint.every",
        "start": f"was start-up, with data and the first step; {longer}",
    }
    for phase, remedy in remedies.items():
        share = facts.seconds[phase] / total if total else 0.0
        if share > LIMITS[phase]:
            yield f"{share:.0%} of the time {remedy}"
    if facts.mfu is not None and facts.mfu < LIMITS["mfu"]:
        options = [] if config.parallel.compile else ["parallel.compile"]
        options += ["a larger micro_batch"] * (facts.micro_batch < facts.max_samples_per_rank)
        yield f"MFU is {facts.mfu:.0%}; " + (f"try {' or '.join(options)}" if options else "a wider model raises it")


def learning(facts: Facts) -> Iterator[str]:
    """Yield advice about a loss that may be higher than it could be."""
    clipped, skipped, dead = facts.clipped_share, facts.n_skipped, facts.dead_experts
    if clipped > LIMITS["clipped"]:
        remedy = "lower optim.learning_rate or use a longer warm-up (schedule.warmup or warmup_steps)"
        yield f"{clipped:.0%} of the steps were clipped to optim.grad_clip {facts.config.optim.grad_clip:g}; {remedy}"
    if skipped:
        reason = "skipped because the loss or gradient was not finite or spiked"
        remedy = "lower optim.learning_rate, or check the text there"
        yield f"{skipped} step{'s were' if skipped > 1 else ' was'} {reason}; {remedy}"
    if dead:
        remedy = "raise bias_rate or switch_weight of their layers, or use fewer experts"
        yield f"{dead} of {facts.n_experts} experts are dead; {remedy}"
    if not (curve := facts.val_losses):
        return
    (best_step, best), (last_step, last) = min(curve, key=lambda point: point[1]), curve[-1]
    share = last / math.log(facts.vocab_size)
    if share > LIMITS["hardly"]:
        remedy = "train longer, raise optim.learning_rate, or check the text"
        yield f"validation loss {last:.2f} is {share:.0%} of ln(vocabulary), the loss of random guessing; {remedy}"
    elif last > best * (1 + LIMITS["overfit"]):
        after = [loss for step, loss in facts.losses if step > best_step]
        before = [loss for step, loss in facts.losses if step <= best_step][-len(after) :]
        rose = f"validation loss was lowest at step {best_step}, {best:.2f}, and rose to {last:.2f} while training loss"
        if after and before and fmean(after) < fmean(before):
            yield f"{rose} fell: it overfits; use more text, fewer steps or more optim.weight_decay"
        else:
            yield f"{rose} rose too: it is unstable; lower optim.learning_rate"
    elif before := [point for point in curve if point[0] <= 0.8 * last_step]:
        step, loss = before[-1]
        fall = 1 - last / loss
        if fall * 0.2 * last_step / (last_step - step) > LIMITS["falling"]:
            yield f"validation loss fell by another {fall:.1%} after step {step}; more steps would lower it further"
