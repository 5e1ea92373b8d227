"""compare.html: the whole comparison on one page that opens from disk and needs no network."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.compare.results import Comparison, Result, Run, table, verdict_lines
from training.files import write_atomically
from training.logging.charts import COLUMNS, Curve, chart
from training.logging.jsonl import read_history
from training.logging.metrics import Chart
from training.logging.template import render_page

SCALES = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1.0, "FLOPs"))

Track = list[tuple[float, float, float]]  # of a run, by evaluation: (tokens, seconds, metric)


def write_page(comparison: Comparison, folder: Path) -> None:
    """Write `folder / "compare.html"`. Raises UserError if that fails."""
    titles, *rows = table(comparison)
    runs = [
        {"label": result.label, "seed": run.seed, "value": f"{run.value:.4f}", "report": _link(run, folder)}
        for result in comparison.ranked
        for run in result.runs
    ]
    page = render_page(
        Path(__file__).with_name("compare.html.j2"),
        name=folder.name,
        verdicts=verdict_lines(comparison),
        metric=comparison.info.label,
        equal=comparison.equal,
        charts=comparison_charts(comparison),
        titles=titles,
        rows=rows,
        labels=[result.label for result in comparison.results],
        options=comparison.options,
        runs=runs,
    )
    write_atomically(folder / "compare.html", page)


def _link(run: Run, folder: Path) -> str:
    """Return the relative path of a run's report, as a URL."""
    return Path(os.path.relpath(run.folder / "report.html", folder)).as_posix()


def comparison_charts(comparison: Comparison) -> list[dict]:
    """Return the curves of the metric against tokens, time and FLOPs, each with the range of its seeds."""
    metric = comparison.info.curve
    tracks = [[read_track(run, metric) for run in result.runs] for result in comparison.results]
    flops = [result.average("flops") for result in comparison.results]
    axes = {"tokens": lambda _, at: at[0], "seconds": lambda _, at: at[1]}
    if None not in flops:
        size, unit = next(scale for scale in SCALES if max(flops) >= scale[0])
        axes[unit] = lambda result, at: at[0] * _flops_per_token(result) / size
    charts = []
    for x_name, x_of in axes.items():
        curves = [
            _curve(result, [[(x_of(result, at), at[2]) for at in track] for track in of_seeds], i, len(tracks))
            for i, (result, of_seeds) in enumerate(zip(comparison.results, tracks, strict=True))
        ]
        if curves := [curve for curve in curves if curve.points]:
            ends = [curve.points[end][0] for curve in curves for end in (0, -1)]
            spec = Chart(f"{comparison.info.label.capitalize()} by {x_name}", comparison.info.unit)
            charts.append(chart(spec, max(ends), curves, first=min(ends), x_name=x_name))
    return charts


def _flops_per_token(result: Result) -> float:
    return result.average("flops") / result.average("tokens")


def read_track(run: Run, metric: str) -> Track:
    """Return a run's evaluations."""
    history = read_history(run.folder / "metrics.jsonl")
    points, times = history.points(metric), history.points("time_s")
    if not points or not times:
        return []
    steps = [step for step, _ in points]
    seconds = np.interp(steps, *zip(*times, strict=True)).tolist()
    tokens_per_step = run.tokens / run.steps
    return [(step * tokens_per_step, time, value) for (step, value), time in zip(points, seconds, strict=True)]


def _curve(result: Result, of_seeds: Sequence[list[tuple[float, float]]], index: int, n: int) -> Curve:
    """Return the mean over the seeds of the evaluations that all have, and the range from the lowest to the highest."""
    n_points = min(len(points) for points in of_seeds)
    stride = max(1, n_points // COLUMNS)
    points, band = [], []
    for at in range((n_points - 1) % stride, n_points, stride) if n_points else ():
        x = statistics.fmean(each[at][0] for each in of_seeds)
        values = [each[at][1] for each in of_seeds]
        points.append((x, statistics.fmean(values)))
        band.append((x, min(values), max(values)))
    shade = 100 * index // max(n - 1, 1)
    return Curve(result.label, "layer", points, shade, band if len(of_seeds) > 1 else ())
