"""The result of a comparison: each variant's figures, and its paired difference to the baseline."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from training.compare.variants import Variant, differing_options
from training.errors import UserError
from training.files import read_bytes
from training.logging.format import count, duration_text
from training.terminal import aligned_table

TEST = "paired t test"
CONFIDENCE = 0.95
MIN_P = 0.0001  # smaller ones are shown as a bound


class MetricInfo(NamedTuple):
    """A figure of summary.json that runs are compared by, and the rows' metric whose curve is drawn."""

    label: str
    unit: str
    curve: str
    lower_is_better: bool = True


METRICS = {
    "val_loss": MetricInfo("validation loss", "nats per token", "val_loss"),
    "val_bits_per_byte": MetricInfo("validation bits per byte", "bits per byte", "val_bits_per_byte"),
    "averaged_val_loss": MetricInfo("validation loss, averaged weights", "nats per token", "averaged_val_loss"),
    "best_val_loss": MetricInfo("lowest validation loss", "nats per token", "val_loss"),
    "tasks_mean": MetricInfo("mean of the tasks", "centered accuracy", "tasks_mean", lower_is_better=False),
}
HIDDEN_OPTIONS = ("name", "out_dir", "seed", "logging", "checkpoint")  # they explain no difference


class Run(NamedTuple):
    """A finished run."""

    seed: int
    folder: Path
    value: float  # of the comparison's metric
    steps: int
    tokens: int
    time_s: float  # of training, without evaluations and saves
    flops: float | None  # None: a run of an older version
    data: str | None  # fingerprint of its text


class Difference(NamedTuple):
    """The mean difference to the baseline over the seeds that both have, with its confidence interval."""

    n_seeds: int
    mean: float
    low: float | None  # None: a single seed has no interval
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Result:
    """A variant's runs."""

    label: str
    runs: tuple[Run, ...]
    difference: Difference | None  # None for the baseline, or if no seed is shared

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
    """A whole comparison. `results` has the baseline first."""

    metric: str
    equal: str
    results: list[Result]
    options: dict[str, list[Any]]  # those that differ, with each result's value
    failures: Mapping[tuple[str, int], str]
    notes: list[str]

    @property
    def info(self) -> MetricInfo:
        return METRICS[self.metric]

    @property
    def ranked(self) -> list[Result]:
        """Return the results, the best one first."""
        return sorted(self.results, key=lambda result: result.mean, reverse=not self.info.lower_is_better)

    def as_json(self) -> str:
        """Return the content of compare.json."""
        content = {
            "metric": self.metric,
            "unit": self.info.unit,
            "lower_is_better": self.info.lower_is_better,
            "equal": self.equal,
            "test": TEST,
            "confidence": CONFIDENCE,
            "baseline": self.results[0].label,
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
    metric: str | None,
    failures: Mapping[tuple[str, int], str],
) -> Comparison:
    """Read the runs that are finished and compare them to the first variant that has one.

    Raises UserError if there are none, or if one lacks the metric.
    """
    summaries = {
        variant.label: {seed: summary for seed in seeds if (summary := _read_summary(variant.folder(folder, seed)))}
        for variant in variants
    }
    variants = [variant for variant in variants if summaries[variant.label]]  # others are in `failures`
    if not variants:
        raise UserError(f"{folder}: no run finished")
    every = [summary for found in summaries.values() for summary in found.values()]
    notes = []
    if metric is None:
        texts = {summary["data"] for summary in every}
        metric = "val_loss" if len(texts) == 1 else "val_bits_per_byte"
        if len(texts) > 1:
            notes.append("The runs have different text or tokenizers, so their bits per byte are compared.")
    for summary in every:
        if type(summary.get(metric)) not in (int, float):
            raise UserError(f"{summary['folder']}: its summary.json has no {metric}; choose another --metric")
    runs = {
        label: tuple(_run(seed, summary, metric) for seed, summary in found.items())
        for label, found in summaries.items()
        if found
    }
    baseline = {run.seed: run.value for run in runs[variants[0].label]}
    results = [
        Result(
            variant.label,
            runs[variant.label],
            None if variant is variants[0] else paired_difference(runs[variant.label], baseline),
        )
        for variant in variants
    ]
    notes += _unequal(results, equal)
    options = differing_options([variant.config for variant in variants], HIDDEN_OPTIONS)
    return Comparison(metric, equal, results, options, failures, notes)


def _read_summary(folder: Path) -> dict[str, Any] | None:
    """Return summary.json with the run's folder and, of run.json, its text and FLOPs; None if it has not finished."""
    try:
        summary, run = (json.loads(read_bytes(folder / name)) for name in ("summary.json", "run.json"))
        facts = run["facts"]
        return summary | {"folder": folder, "data": facts.get("data"), "flops_per_token": facts.get("flops_per_token")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run(seed: int, summary: dict[str, Any], metric: str) -> Run:
    flops = summary["flops_per_token"] and summary["flops_per_token"] * summary["tokens"]
    fields = (summary[name] for name in ("folder", metric, "steps", "tokens", "time_s"))
    return Run(seed, *fields, flops, summary["data"])


def paired_difference(runs: Sequence[Run], baseline: Mapping[int, float]) -> Difference | None:
    """Return the mean difference to the baseline's values by seed, with a t interval; None if no seed is shared."""
    differences = [run.value - baseline[run.seed] for run in runs if run.seed in baseline]
    if not differences:
        return None
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Difference(n, mean, None, None, None)
    if len(set(differences)) == 1:  # as of runs with equal bits: the t test divides by 0
        return Difference(n, mean, mean, mean, 1.0 if mean == 0 else 0.0)
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(n, mean, float(low), float(high), float(test.pvalue))


def _unequal(results: Sequence[Result], equal: str) -> list[str]:
    """Return a line for each result that has not as much as the baseline of what should be equal."""
    name = {"tokens": "tokens", "time": "time_s", "flops": "flops"}[equal]
    base, lines = results[0].average(name), []
    for result in results[1:]:
        value = result.average(name)
        if value is None or base is None:
            lines.append(f"{result.label}: its FLOPs or those of {results[0].label} are unknown")
        elif abs(value / base - 1) > 0.02:
            lines.append(f"{result.label} had {value / base:.2f} times the {equal} of {results[0].label}.")
    return lines


def table_lines(comparison: Comparison) -> list[str]:
    """Return the table of the console, the best variant first."""
    return aligned_table(table(comparison))


def table(comparison: Comparison) -> list[list[str]]:
    """Return the cells of the table with its titles, the best variant first."""
    titles = ["seeds", "mean", "sd", "difference", "95 % interval", "p", "tokens", "time", "FLOPs"]
    return [[comparison.info.label, *titles], *(_cells(result) for result in comparison.ranked)]


def _cells(result: Result) -> list[str]:
    difference, interval, p = result.difference, "", ""
    if difference is not None and difference.p is not None:
        interval, p = f"{difference.low:+.4f} to {difference.high:+.4f}", p_text(difference.p)
    flops = result.average("flops")
    return [
        result.label,
        str(len(result.runs)),
        f"{result.mean:.4f}",
        "" if result.deviation is None else f"{result.deviation:.4f}",
        "baseline" if difference is None else f"{difference.mean:+.4f}",
        interval,
        p,
        count(result.average("tokens")),
        duration_text(result.average("time_s")),
        "" if flops is None else f"{flops:.3g}",
    ]


def p_text(p: float) -> str:
    """Return a p-value in two figures; small ones as a bound."""
    return f"< {MIN_P}" if p < MIN_P else f"{p:.2g}"


def verdict_lines(comparison: Comparison) -> list[str]:
    """Return a sentence about each difference, then the notes."""
    baseline = comparison.results[0]
    lines = [_verdict(result, baseline, comparison.info) for result in comparison.results[1:]]
    n_tests = sum(result.difference is not None and result.difference.p is not None for result in comparison.results)
    if n_tests > 1:
        lines.append(f"The p-values are not corrected for the {n_tests} differences that are tested.")
    failed = [f"{label}, seed {seed}: {error}" for (label, seed), error in comparison.failures.items()]
    return [*lines, *comparison.notes, *failed]


def _verdict(result: Result, baseline: Result, info: MetricInfo) -> str:
    difference = result.difference
    if difference is None:
        return f"{result.label} and {baseline.label} share no seed, so nothing is compared."
    word = "better" if (difference.mean < 0) == info.lower_is_better else "worse"
    size = f"{abs(difference.mean):.4f} {info.unit}"
    if difference.p is None:
        return f"{result.label} is {size} {word} than {baseline.label} with one seed: it may be noise (--seeds 5)."
    spread = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}; {TEST} over {difference.n_seeds} seeds"
    p = f"p {'' if difference.p < MIN_P else '= '}{p_text(difference.p)}"
    if difference.p > 1 - CONFIDENCE:
        return f"{result.label} and {baseline.label}: no difference beyond noise ({spread}, {p})."
    return f"{result.label} is {size} {word} than {baseline.label} ({spread}, {p})."
