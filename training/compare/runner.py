"""Train the runs of a comparison in this process, which imports the libraries and checks the data once."""

import gc
import json
import os
import re
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from training.compare.results import read_summary, to_positive
from training.compare.variants import Variant, check_stored, store_variants
from training.config import Config, ConstantSchedule, EvalConfig
from training.errors import RestartNeeded, UserError
from training.files import read_bytes, remove, write_atomically
from training.logging.format import duration_text, number
from training.optim.batch_schedule import BatchSchedule
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
        variants = [variant.with_steps(steps_of_config(variant.config)) for variant in variants]
        check_stored([variant for variant in variants if variant.is_trained], self.folder, with_steps=False)
        print_line(f"comparison in {self.folder}, seeds {', '.join(map(str, self.seeds))}")
        with each_note_once():
            variants = self.equalize(variants)
            trained = [variant for variant in variants if variant.is_trained]
            store_variants(trained, self.folder)
            for index, seed in enumerate(self.seeds):
                pending = [
                    variant
                    for variant in trained
                    if not is_finished(variant, seed, self.folder) and (variant.label, seed) not in self.failures
                ]
                self.train_seed(pending[:: -1 if index % 2 else 1], seed)
        return variants

    def train_seed(self, variants: Sequence[Variant], seed: int) -> None:
        """Train a run of each variant: one after the other, or for equal times in turns."""
        pending = deque(variants)
        while pending:
            variant = pending.popleft()
            print_line(f"{variant.label}, seed {seed}: training")
            # A turn compiles the model again, which takes long and counts as training.
            has_turns = self.equal == "time" and pending and not variant.config.parallel.compile
            try:
                status = train_again(self.run_config(variant, seed), TURN_S if has_turns else None)
            except UserError as error:  # such as a learning rate at which the loss becomes NaN
                self.fail(variant, [seed], error)
                continue
            if status == PAUSED:
                pending.append(variant)
            elif status:
                raise Stopped(status)
            else:
                summary = read_summary(variant.folder(self.folder, seed))
                loss, time = number(summary["val_loss"]), duration_text(summary["time_s"])
                print_line(f"{variant.label}, seed {seed}: val loss {loss} after {time}")

    def fail(self, variant: Variant, seeds: Sequence[int], error: UserError) -> None:
        """Leave the runs of these seeds out."""
        self.failures |= dict.fromkeys([(variant.label, seed) for seed in seeds], str(error))
        runs = f"seed {seeds[0]}" if len(seeds) == 1 else "all seeds"
        print_note(f"{variant.label}, {runs}: {error}; the comparison continues without it")

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
                "checkpoint": config.checkpoint.model_copy(update={"keep": 1, "keep_best": keep_best, "copy_to": None}),
                "logging": config.logging.model_copy(update={"console": "brief", "wandb": wandb}),
            }
        )

    def equalize(self, variants: Sequence[Variant]) -> list[Variant]:
        """Return the variants with as many steps as give them what the first one has: tokens, time or FLOPs."""
        if self.equal == "none":
            return list(variants)
        baseline = variants[0]
        to_train = [variant for variant in variants if variant.is_trained and not variant.finished]
        costs = self.costs_of_a_token([baseline, *(variant for variant in to_train if variant is not baseline)])
        n_tokens = BatchSchedule.of(baseline.config).tokens(steps_of(baseline))
        total, equal = n_tokens * costs.get(baseline.label, 0.0), []
        for variant in variants:
            steps = variant.config.steps
            if total and variant in to_train and variant.label in costs:
                steps = BatchSchedule.of(variant.config).nearest_steps(total / costs[variant.label])
            if steps != variant.config.steps:
                print_note(
                    f"{variant.label}: {steps:,} steps instead of {variant.config.steps:,}, for the {self.equal} of "
                    f"{baseline.label}"
                )
            equal.append(variant.with_steps(steps))
        return equal

    def costs_of_a_token(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Return the tokens (1), seconds or FLOPs of a token by the variant's label, without those that fail."""
        if self.equal == "tokens":
            return {variant.label: 1 for variant in variants}
        if self.equal == "flops":
            return {variant.label: flops_of_a_token(variant.config) for variant in variants}
        times = self.times_of_a_step(variants)
        timed = [variant for variant in variants if variant.label in times]
        return {variant.label: times[variant.label] / first_batch(variant.config) for variant in timed}

    def times_of_a_step(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Return the seconds of a step with the first batch by the variant's label, without those that fail."""
        path = self.folder / "step_times.json"  # measured once: a comparison that is resumed must keep its steps
        stored = read_step_times(path)
        missing = [variant for variant in variants if variant.label not in stored]
        if missing:
            baseline = variants[0]
            measured = self.measure_steps([baseline, *(variant for variant in missing if variant is not baseline)])
            if baseline.label in measured:
                scale = stored.get(baseline.label, measured[baseline.label]) / measured[baseline.label]
                stored |= {label: seconds * scale for label, seconds in measured.items() if label not in stored}
                write_atomically(path, json.dumps(stored, indent=2) + "\n")
        return stored

    def measure_steps(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Return the median seconds of a step by label, without variants that fail. The variants take turns."""
        times: dict[str, list[float]] = {variant.label: [] for variant in variants}
        folder = self.folder / f"timing-{os.getpid()}"
        for path in [*self.folder.glob("timing-*"), *self.folder.glob(".timing-*.lock")]:  # of a killed process
            if re.fullmatch(r"\.?timing-\d+(\.lock)?", path.name):
                remove(path)
        for variant in list(variants) * TIMED_ROUNDS:
            if variant.label not in times:
                continue
            print_line(f"{variant.label}: measuring the time of a step")
            try:
                if status := train_again(timing_config(self.run_config(variant, variant.config.seed), folder), None):
                    raise Stopped(status)
                rows = (folder / "metrics.jsonl").read_text().splitlines()
                times[variant.label] += [json.loads(row)["step_s"] for row in rows[TIMED_STEPS // 2 :]]
            except UserError as error:
                del times[variant.label]
                self.fail(variant, self.seeds, error)
            finally:
                remove(folder)
                remove(folder.with_name(f".{folder.name}.lock"))
        return {label: statistics.median(seconds) for label, seconds in times.items()}


def read_step_times(path: Path) -> dict[str, float]:
    """Return the measured seconds of a step by label, {} before they are measured. Raises UserError if damaged."""
    try:
        stored = json.loads(read_bytes(path))
        return {label: to_positive(seconds) for label, seconds in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{path}: damaged, and the steps of this comparison follow from it; choose another --out"
        ) from None


def train_again(config: Config, turn_s: float | None) -> int:
    """Train one run, for a turn or to its end, again after out-of-memory errors; return the status of `train`.

    Raises UserError.
    """
    for attempt in range(1, MAX_RESTARTS + 1):
        try:
            return train(config, turn_s=turn_s)
        except RestartNeeded as error:
            if attempt == MAX_RESTARTS:
                raise
            print_note(f"{error}; starting it again")
        finally:
            free_memory(config.parallel.device)
    raise AssertionError


def free_memory(device: str) -> None:
    """Free the model of the last run, which cycles of references keep, and forget its peak."""
    import torch

    from training.device import reset_peak_memory, select_device

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak_memory(select_device(device))


def steps_of(variant: Variant) -> int:
    """Return the steps of a variant; if a run of it is finished, those that it did: it may have stopped early."""
    folder = next(iter(variant.finished.values()), None)
    return variant.config.steps if folder is None else read_summary(folder)["steps"]


def is_finished(variant: Variant, seed: int, folder: Path) -> bool:
    """Return True if a run has its summary, for this number of steps."""
    if seed in variant.finished:
        return True
    try:
        summary = read_summary(variant.folder(folder, seed))
    except UserError:
        return False
    return summary["steps"] == variant.config.steps or bool(summary.get("stopped_early"))


def timing_config(config: Config, folder: Path) -> Config:
    """Return a run of a few steps, whose log has the time of each one."""
    return config.model_copy(
        update={
            "name": folder.name,
            "out_dir": str(folder.parent),
            "steps": TIMED_STEPS,
            "batch_tokens": first_batch(config),
            "batch_schedule": (),
            "schedule": ConstantSchedule(warmup_steps=0),
            "eval": EvalConfig(every=None, tokens=1),
            "checkpoint": config.checkpoint.model_copy(update={"every": None, "every_minutes": None, "final": "last"}),
            "logging": config.logging.model_copy(update={"every": 1, "tensorboard": False, "wandb": None}),
        }
    )


def first_batch(config: Config) -> int:
    """Return the tokens of the first step."""
    return BatchSchedule.of(config).batch_tokens(0)


def flops_of_a_token(config: Config) -> float:
    """Return its FLOPs, forward and backward. Prepares the data, whose tokenizer sets the vocabulary."""
    from training.model.stats import model_stats

    return model_stats(resolve_run(config).model).flops_per_token


def steps_of_config(config: Config) -> int:
    """Return the length of a run in steps. Prepares the data if the length depends on it, or on the vocabulary."""
    return config.steps if config.steps is not None else resolve_run(config).steps


def resolve_run(config: Config) -> Config:
    """Return the config with its sizes and steps. Prepares the data."""
    from training.data import prepare
    from training.engine.build import resolve_sizes
    from training.weights.init_from import resolve_init_from

    config = resolve_init_from(config, fresh=True)
    return resolve_sizes(config, prepare(config.data))[0]
