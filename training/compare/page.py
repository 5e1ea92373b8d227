"""compare.html: the whole comparison on one page that opens from disk and needs no network."""

import os
import statistics
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.compare.results import Comparison, RunResult
from training.compare.text import table, verdict_lines
from training.files import write_atomically
from training.logging.charts import COLUMNS, Curve, chart
from training.logging.jsonl import read_history
from training.logging.metrics import Chart
from training.logging.template import render_page

SCALES = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1.0, "FLOPs"))


class Evaluation(NamedTuple):
    """A point of a run's curve: the value, and what training took up to it."""

    tokens: float
    seconds: float
    flops: float
    value: float


Track = dict[int, Evaluation]  # of a run, by step


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
        metric=comparison.figure.label,
        equal=comparison.equal,
        charts=comparison_charts(comparison),
        titles=titles,
        rows=rows,
        labels=[result.label for result in comparison.results],
        options=comparison.options,
        runs=runs,
    )
    write_atomically(folder / "compare.html", page)


def _link(run: RunResult, folder: Path) -> str:
    """Return the relative path of a run's report, as a URL."""
    return Path(os.path.relpath(run.folder / "report.html", folder)).as_posix()


def comparison_charts(comparison: Comparison) -> list[dict]:
    """Return the curves of the figure against tokens, time and FLOPs, each with the range of its seeds."""
    figure = comparison.figure
    tracks = [[read_track(run, figure.curve) for run in result.runs] for result in comparison.results]
    flops = [result.average("flops") for result in comparison.results]
    axes: dict[str, Callable[[Evaluation], float]] = {"tokens": attrgetter("tokens"), "seconds": attrgetter("seconds")}
    if None not in flops:
        size, unit = next(scale for scale in SCALES if max(flops) >= scale[0])
        axes[unit] = lambda evaluation: evaluation.flops / size
    charts = []
    for x_name, x in axes.items():
        shades = [100 * i // max(len(tracks) - 1, 1) for i in range(len(tracks))]
        curves = [
            seed_curve(result.label, of_seeds, x, shade)
            for result, of_seeds, shade in zip(comparison.results, tracks, shades, strict=True)
        ]
        if curves := [curve for curve in curves if curve.points]:
            ends = [curve.points[end][0] for curve in curves for end in (0, -1)]
            spec = Chart(f"{figure.label.capitalize()} by {x_name}", figure.unit)
            charts.append(chart(spec, max(ends), curves, first=min(ends), x_name=x_name))
    return charts


def read_track(run: RunResult, metric: str) -> Track:
    """Return a run's evaluations; of a long run those that end a span of its history, the same ones for each seed."""
    history = read_history(run.folder / "metrics.jsonl")
    series, times = history.series(metric), history.points("time_s")
    if not series or not times:
        return {}
    points = dict([series[0].first, *(part.last for part in series)])
    seconds = np.interp(list(points), *zip(*times, strict=True)).tolist()
    tokens = np.interp(list(points), *zip((0, 0), *history.points("tokens"), strict=True)).tolist()
    flops_per_token = (run.flops or 0.0) / run.tokens
    return {
        step: Evaluation(n_tokens, time, n_tokens * flops_per_token, value)
        for (step, value), n_tokens, time in zip(points.items(), tokens, seconds, strict=True)
    }


def seed_curve(label: str, tracks: Sequence[Track], x: Callable[[Evaluation], float], shade: int) -> Curve:
    """Return the mean over the seeds at the steps that all of them evaluated, and the range of the seeds."""
    steps = sorted(set.intersection(*map(set, tracks)))
    stride = max(1, len(steps) // COLUMNS)
    points, band = [], []
    for step in steps[(len(steps) - 1) % stride :: stride]:
        evaluations = [track[step] for track in tracks]
        at, values = statistics.fmean(map(x, evaluations)), [evaluation.value for evaluation in evaluations]
        points.append((at, statistics.fmean(values)))
        band.append((at, min(values), max(values)))
    return Curve(label, "layer", points, shade, band if len(tracks) > 1 else ())
