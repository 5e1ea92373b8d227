"""A comparison in words: the table and a sentence about each difference."""

from training.compare.results import CONFIDENCE, TEST, Comparison, VariantResult
from training.logging.format import count, duration_text

MIN_P = 0.0001  # smaller ones are shown as a bound


def table(comparison: Comparison) -> list[list[str]]:
    """Return the cells of the table with its titles, the best variant first."""
    titles = ["seeds", "mean", "sd", "difference", "95 % interval", "p", "tokens", "time", "FLOPs"]
    rows = [_cells(result, is_baseline=result is comparison.baseline) for result in comparison.ranked]
    return [[comparison.figure.label, *titles], *rows]


def _cells(result: VariantResult, *, is_baseline: bool) -> list[str]:
    difference, interval, p = result.difference, "", ""
    if difference is not None and difference.p is not None:
        interval, p = f"{difference.low:+.4f} to {difference.high:+.4f}", p_text(difference.p)
    mean_difference = "no shared seed" if difference is None else f"{difference.mean:+.4f}"
    flops = result.average("flops")
    return [
        result.label,
        str(len(result.runs)),
        f"{result.mean:.4f}",
        "" if result.deviation is None else f"{result.deviation:.4f}",
        "baseline" if is_baseline else mean_difference,
        interval,
        p,
        count(result.average("tokens")),
        duration_text(result.average("time_s")),
        "" if flops is None else f"{flops:.3g}",
    ]


def p_text(p: float) -> str:
    """Return a p-value in two figures; a small one as a bound."""
    return f"< {MIN_P}" if p < MIN_P else f"{p:.2g}"


def verdict_lines(comparison: Comparison) -> list[str]:
    """Return a sentence about each difference, then the notes and the runs that failed."""
    results = comparison.results[1:]
    lines = [_verdict(result, comparison) for result in results]
    n_tests = sum(result.difference is not None and result.difference.p is not None for result in results)
    if n_tests > 1:
        lines.append(f"The p-values are not corrected for the {n_tests} differences that are tested.")
    failed = [f"{label}, seed {seed}, failed: {error}" for (label, seed), error in comparison.failures.items()]
    return [*lines, *comparison.notes, *failed]


def _verdict(result: VariantResult, comparison: Comparison) -> str:
    difference, baseline, figure = result.difference, comparison.baseline, comparison.figure
    if difference is None:
        return f"{result.label} and {baseline.label} share no seed, so they are not compared."
    n = difference.n_seeds
    if difference.mean == 0 and difference.p is None:
        return f"{result.label} and {baseline.label} are equal with {n} seed{'s' * (n > 1)}."
    word = "better" if (difference.mean < 0) == figure.lower_is_better else "worse"
    sentence = f"{result.label} is {abs(difference.mean):.4f} {figure.unit} {word} than {baseline.label}"
    if n == 1:
        return f"{sentence} with one seed: it may be noise (--seeds 5)."
    if difference.p is None:
        return f"{sentence} with each of {n} seeds: without any spread there is nothing to test."
    spread = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}; {TEST} over {n} seeds"
    p = f"p {'' if difference.p < MIN_P else '= '}{p_text(difference.p)}"
    if difference.p > 1 - CONFIDENCE:
        return f"{result.label} and {baseline.label}: no difference beyond noise ({spread}, {p})."
    return f"{sentence} ({spread}, {p})."
