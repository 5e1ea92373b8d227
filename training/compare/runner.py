"""Train the runs of a comparison in this process, which imports the libraries and checks the data once."""

import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from training.compare.variants import Variant, store_variants
from training.config import Config, EvalConfig
from training.errors import RestartNeeded, UserError
from training.files import read_bytes, remove, write_atomically
from training.logging.format import duration_text, number
from training.terminal import each_note_once, print_line, print_note
from training.train import PAUSED, train

TURN_S = 120.0  # of a run, with --equal time; each turn begins with some seconds of loading
MAX_RESTARTS = 3  # of a run that is out of memory
TIMED_STEPS, TIMED_ROUNDS = 8, 3  # to measure the time of a step; the first half of the steps does not count


class Stopped(Exception):
    """A run was stopped by a signal and saved. The command ends with its status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Runner:
    """Trains all runs that are not finished yet. `failures` has the errors by (variant's label, seed)."""

    def __init__(self, folder: Path, seeds: Sequence[int], equal: str) -> None:
        self.folder, self.seeds, self.equal = folder, seeds, equal
        self.failures: dict[tuple[str, int], str] = {}

    def train_all(self, variants: Sequence[Variant]) -> list[Variant]:
        """Train all runs; return the variants with their numbers of steps.

        Every second seed trains the variants in reverse, so that a machine that slows down favors none of them. Raises
        Stopped after a signal.
        """
        print_line(f"comparison in {self.folder}")
        with each_note_once():
            variants = self.equalize(variants)
            store_variants([variant for variant in variants if not variant.finished], self.folder)
            for index, seed in enumerate(self.seeds):
                pending = [variant for variant in variants if not is_finished(variant, seed, self.folder)]
                self.train_seed(pending[:: -1 if index % 2 else 1], seed)
        return variants

    def train_seed(self, variants: Sequence[Variant], seed: int) -> None:
        """Train a run of each variant: one after the other, or for equal times in turns."""
        pending = deque(variants)
        while pending:
            variant = pending.popleft()
            print_line(f"{variant.label}, seed {seed}: training")
            try:
                status = self.train_run(variant, seed, TURN_S if self.equal == "time" and pending else None)
            except UserError as error:  # such as a learning rate at which the loss becomes NaN
                self.failures[variant.label, seed] = str(error)
                print_note(f"{variant.label}, seed {seed}: {error}; the comparison goes on without this run")
                continue
            if status == PAUSED:
                pending.append(variant)
            elif status:
                raise Stopped(status)
            else:
                summary = json.loads(read_bytes(variant.folder(self.folder, seed) / "summary.json"))
                loss, time = number(summary["val_loss"]), duration_text(summary["time_s"])
                print_line(f"{variant.label}, seed {seed}: val loss {loss} after {time}")

    def train_run(self, variant: Variant, seed: int, turn_s: float | None) -> int:
        """Train one run, for a turn or to its end; return the status of `train`. Raises UserError."""
        for attempt in range(1, MAX_RESTARTS + 1):
            try:
                return train(self.run_config(variant, seed), turn_s=turn_s)
            except RestartNeeded as error:
                if attempt == MAX_RESTARTS:
                    raise
                print_note(f"{error}; starting it again")
        raise AssertionError

    def run_config(self, variant: Variant, seed: int) -> Config:
        """Return the configuration of one run: it keeps one checkpoint, beside the best one if that is its model."""
        config, folder = variant.config, variant.folder(self.folder, seed)
        keep_best = config.checkpoint.final == "best" or config.eval.patience is not None
        wandb = config.logging.wandb
        if wandb is not None and wandb.group is None:
            wandb = wandb.model_copy(update={"group": self.folder.name})
        return config.model_copy(
            update={
                "seed": seed,
                "name": folder.name,
                "out_dir": str(folder.parent),
                "checkpoint": config.checkpoint.model_copy(update={"keep": 1, "keep_best": keep_best}),
                "logging": config.logging.model_copy(update={"console": "brief", "wandb": wandb}),
            }
        )

    def equalize(self, variants: Sequence[Variant]) -> list[Variant]:
        """Return the variants with as many steps as give them what the first one has: tokens, time or FLOPs."""
        to_train = [variant for variant in variants if not variant.finished]
        if not to_train:
            return list(variants)
        baseline = variants[0]
        costs = self.costs_of_a_step([baseline, *(variant for variant in to_train if variant is not baseline)])
        total, equal = baseline.config.steps * costs[baseline.label], []
        for variant in variants:
            steps = variant.config.steps
            if variant.label in costs:
                steps = max(1, round(total / costs[variant.label]))
            if steps != variant.config.steps:
                print_note(
                    f"{variant.label}: {steps:,} steps instead of {variant.config.steps:,}, for the {self.equal} of "
                    f"{baseline.label}"
                )
            equal.append(variant.with_steps(steps))
        return equal

    def costs_of_a_step(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Return the tokens, seconds or FLOPs of a step by the variant's label."""
        if self.equal == "tokens":
            return {variant.label: variant.config.batch_tokens for variant in variants}
        if self.equal == "flops":
            return {variant.label: flops_of_a_step(variant.config) for variant in variants}
        path = self.folder / "step_times.json"  # measured once: a comparison that goes on must not change its steps
        stored = json.loads(read_bytes(path)) if path.is_file() else {}
        missing = [variant for variant in variants if variant.label not in stored]
        if missing:
            baseline = variants[0]
            measured = self.measure_steps([baseline, *(variant for variant in missing if variant is not baseline)])
            scale = stored.get(baseline.label, measured[baseline.label]) / measured[baseline.label]
            stored |= {variant.label: measured[variant.label] * scale for variant in missing}
            write_atomically(path, json.dumps(stored, indent=2) + "\n")
        return stored

    def measure_steps(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Return the median seconds of a step by label. The variants take turns."""
        times: dict[str, list[float]] = {variant.label: [] for variant in variants}
        folder = self.folder / "timing"
        for _ in range(TIMED_ROUNDS):
            for variant in variants:
                print_line(f"{variant.label}: measuring the time of a step")
                remove(folder)
                if status := train(timing_config(self.run_config(variant, variant.config.seed), folder)):
                    raise Stopped(status)
                rows = (folder / "metrics.jsonl").read_text().splitlines()
                times[variant.label] += [json.loads(row)["step_s"] for row in rows[TIMED_STEPS // 2 :]]
        remove(folder)
        return {label: statistics.median(seconds) for label, seconds in times.items()}


def is_finished(variant: Variant, seed: int, folder: Path) -> bool:
    """Return True if a run has its summary, which is written last, for this number of steps."""
    try:
        summary = json.loads(read_bytes(variant.folder(folder, seed) / "summary.json"))
    except (OSError, ValueError):
        return False
    is_complete = summary.get("steps") == variant.config.steps or summary.get("stopped_early", False)
    return seed in variant.finished or is_complete


def timing_config(config: Config, folder: Path) -> Config:
    """Return a run of a few steps, whose log has the time of each one."""
    return config.model_copy(
        update={
            "name": folder.name,
            "out_dir": str(folder.parent),
            "steps": TIMED_STEPS,
            "eval": EvalConfig(every=None, tokens=1),
            "checkpoint": config.checkpoint.model_copy(update={"every": None, "every_minutes": None, "final": "last"}),
            "logging": config.logging.model_copy(update={"every": 1, "tensorboard": False, "wandb": None}),
        }
    )


def flops_of_a_step(config: Config) -> float:
    """Return the FLOPs of an update, forward and backward. Prepares the data, whose tokenizer sets the vocabulary."""
    from training.data import prepare
    from training.device import select_device
    from training.distributed.world import World
    from training.engine.build import resolve_precision_and_sizes
    from training.engine.state import TrainState
    from training.model.stats import model_stats
    from training.weights.init_from import resolve_init_from

    world = World(0, 1, select_device(config.parallel.device))
    config = resolve_init_from(config, fresh=True)
    config = resolve_precision_and_sizes(config, prepare(config.data), world, TrainState.new())
    return config.batch_tokens * model_stats(config.model).flops_per_token
