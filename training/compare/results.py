"""The result of a comparison: each variant's figures, and its paired difference to the baseline."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from training.compare.variants import NEUTRAL, Variant, differing_options
from training.errors import UserError
from training.files import read_bytes

TEST = "paired t test"
CONFIDENCE = 0.95
ROUNDING = 1e-9  # differences of a smaller relative spread are equal: a t test of them would be certain
# They explain no difference.
HIDDEN_OPTIONS = ("name", "out_dir", "seed", "logging", *(name for name in NEUTRAL if name.startswith("checkpoint.")))


class Figure(NamedTuple):
    """A figure that runs are compared by, and the metric in `logging.metrics` whose curve is drawn."""

    label: str
    unit: str
    curve: str
    lower_is_better: bool = True


FIGURES = {
    "val_loss": Figure("validation loss", "nats per token", "val_loss"),
    "val_bits_per_byte": Figure("validation bits per byte", "bits per byte", "val_bits_per_byte"),
    "averaged_val_loss": Figure("validation loss, averaged weights", "nats per token", "averaged_val_loss"),
    "tasks_mean": Figure("mean of the tasks", "centered accuracy", "tasks_mean", lower_is_better=False),
}


class RunResult(NamedTuple):
    """A finished run."""

    seed: int
    folder: Path
    value: float  # of the comparison's figure
    steps: int
    tokens: int
    time_s: float  # of training, without evaluations and saves
    flops: float | None  # None: a run of an older version
    data: str | None  # fingerprint of its text and tokenizer; None: a run of an older version


class Difference(NamedTuple):
    """The mean difference to the baseline over the seeds that both have, with its confidence interval."""

    n_seeds: int
    mean: float
    low: float | None  # None: one seed, or equal differences
    high: float | None
    p: float | None


@dataclass(frozen=True)
class VariantResult:
    """A variant's finished runs, and its difference to the baseline: None if no seed is shared."""

    label: str
    runs: tuple[RunResult, ...]
    difference: Difference | None

    @property
    def mean(self) -> float:
        return statistics.fmean(run.value for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation over seeds; None for one seed."""
        return statistics.stdev(run.value for run in self.runs) if len(self.runs) > 1 else None

    def average(self, name: str) -> float | None:
        """Return the mean of a field of the runs, None if one lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else statistics.fmean(values)


@dataclass(frozen=True)
class Comparison:
    """A whole comparison. The first of `results` is the baseline."""

    name: str  # of its figure
    equal: str
    results: list[VariantResult]
    options: dict[str, list[Any]]  # those that differ, with each result's value
    failures: Mapping[tuple[str, int], str]
    notes: list[str]

    @property
    def figure(self) -> Figure:
        return FIGURES[self.name]

    @property
    def baseline(self) -> VariantResult:
        return self.results[0]

    @property
    def ranked(self) -> list[VariantResult]:
        """Return the results, the best one first: by the difference to the baseline, which is paired."""
        sign = 1 if self.figure.lower_is_better else -1

        def rank(result: VariantResult) -> tuple[bool, float]:
            if result is self.baseline:
                return False, 0.0
            return result.difference is None, sign * (result.difference.mean if result.difference else result.mean)

        return sorted(self.results, key=rank)

    def as_json(self) -> str:
        """Return the content of compare.json."""
        content = {
            "metric": self.name,
            "unit": self.figure.unit,
            "lower_is_better": self.figure.lower_is_better,
            "equal": self.equal,
            "test": TEST,
            "confidence": CONFIDENCE,
            "baseline": self.baseline.label,
            "variants": [
                {
                    "name": result.label,
                    "mean": result.mean,
                    "standard_deviation": result.deviation,
                    "difference": result.difference and result.difference._asdict(),
                    "runs": [run._asdict() | {"folder": str(run.folder)} for run in result.runs],
                }
                for result in self.ranked
            ],
            "options": {
                option: dict(zip([result.label for result in self.results], values, strict=True))
                for option, values in self.options.items()
            },
            "failures": [{"name": name, "seed": seed, "error": e} for (name, seed), e in self.failures.items()],
            "notes": self.notes,
        }
        return json.dumps(content, indent=2) + "\n"


def compare_runs(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    equal: str,
    name: str | None,
    failures: Mapping[tuple[str, int], str],
) -> Comparison:
    """Read the finished runs and compare them by a figure, by default the validation loss of their final models.

    The baseline is the first variant; if all of its runs failed, the next one. Raises UserError if no run finished, or
    if one lacks the figure.
    """
    summaries = {
        variant.label: {
            seed: read_summary(variant.folder(folder, seed))
            for seed in seeds
            if seed in variant.finished or (variant.is_trained and (variant.label, seed) not in failures)
        }
        for variant in variants
    }
    compared = [variant for variant in variants if summaries[variant.label]]
    if not compared:
        raise UserError(f"{folder}: no run finished")
    for label, by_seed in summaries.items():
        if len({summary["data"] for summary in by_seed.values()} - {None}) > 1:
            raise UserError(f"{label}: its runs have different text or tokenizers; choose another --out")
    notes = [] if compared[0] is variants[0] else [f"No run of {variants[0].label} finished: see {compared[0].label}."]
    texts = {summary["data"] for by_seed in summaries.values() for summary in by_seed.values()} - {None}
    if len(texts) > 1:
        name = name or "val_bits_per_byte"
        notes.append("The runs have different text or tokenizers: only bits per byte of equal validation text compare.")
        if (n := compared[0].config.eval.tokens) is not None:
            notes.append(
                f"eval.tokens: {n:,} tokens of each tokenizer are not the same text; null evaluates all of it."
            )
    name = name or "val_loss"
    runs = {
        label: tuple(run_result(seed, summary, name) for seed, summary in by_seed.items())
        for label, by_seed in summaries.items()
    }
    baseline = {run.seed: run.value for run in runs[compared[0].label]}
    results = [
        VariantResult(
            variant.label,
            runs[variant.label],
            None if variant is compared[0] else paired_difference(runs[variant.label], baseline),
        )
        for variant in compared
    ]
    options = differing_options([variant.config for variant in compared], HIDDEN_OPTIONS)
    return Comparison(name, equal, results, options, failures, [*notes, *unequal_amounts(results, equal)])


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a run's summary.json and, from its run.json, `data` and `flops_per_token`: None in older versions.

    Raises UserError if summary.json cannot be read.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(read_bytes(path))
        steps, tokens, time_s = (to_positive(summary[name]) for name in ("steps", "tokens", "time_s"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the summary of a finished run ({type(error).__name__})") from None
    try:
        facts = json.loads(read_bytes(folder / "run.json"))["facts"]
        data, flops = facts.get("data"), facts.get("flops_per_token")
        known = {"data": data if isinstance(data, str) else None, "flops_per_token": flops and to_positive(flops)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = {"data": None, "flops_per_token": None}
    return {**summary, "folder": folder, "steps": steps, "tokens": tokens, "time_s": time_s, **known}


def to_positive(value: Any) -> float:
    """Return a positive finite number. Raises ValueError for another value."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number")
    return value


def run_result(seed: int, summary: dict[str, Any], name: str) -> RunResult:
    """Return a run with its figure. Raises UserError if it lacks it."""
    value, last, final = (summary.get(key) for key in (name, "val_loss", "model_val_loss"))
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{summary['folder']}: its summary.json has no {name}; choose another --metric")
    if not all(type(each) in (int, float) and math.isfinite(each) for each in (last, final)):
        final = None  # of an older version
    if name in ("val_loss", "val_bits_per_byte") and final is not None and last:
        value *= final / last  # of the final model, which may be that of an earlier step, or an average
    flops = summary["flops_per_token"] and summary["flops_per_token"] * summary["tokens"]
    fields = (summary[key] for key in ("steps", "tokens", "time_s"))
    return RunResult(seed, summary["folder"], value, *fields, flops, summary["data"])


def paired_difference(runs: Sequence[RunResult], baseline: Mapping[int, float]) -> Difference | None:
    """Return the mean difference to the baseline's values by seed, with a t interval; None if no seed is shared."""
    pairs = [(run.value, baseline[run.seed]) for run in runs if run.seed in baseline]
    if not pairs:
        return None
    differences = [value - base for value, base in pairs]
    n, mean = len(pairs), statistics.fmean(differences)
    spread = max(differences) - min(differences)
    if n == 1 or spread <= ROUNDING * max(map(abs, sum(pairs, ()))):
        return Difference(n, mean, None, None, None)
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(n, mean, float(low), float(high), float(test.pvalue))


def unequal_amounts(results: Sequence[VariantResult], equal: str) -> list[str]:
    """Return a line for each variant whose tokens, time or FLOPs, as `equal` says, are not those of the baseline."""
    if equal == "none":
        return []
    name = {"tokens": "tokens", "time": "time_s", "flops": "flops"}[equal]
    baseline, lines = results[0].average(name), []
    for result in results[1:]:
        amount = result.average(name)
        if amount is None or baseline is None:
            lines.append(f"The FLOPs of {result.label} or {results[0].label} are unknown.")
        elif abs(amount / baseline - 1) > 0.02:
            lines.append(f"{result.label} had {amount / baseline:.2f} times the {equal} of {results[0].label}.")
    return lines
