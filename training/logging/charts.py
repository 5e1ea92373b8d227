"""The geometry of the report's charts as plain data for SVG, so that the page needs no library."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from training.logging.metrics import METRICS, Chart, Metric

WIDTH, HEIGHT = 1000, 300  # units of the SVG's own coordinates; the page stretches them
COLUMNS = 400  # a path has at most two points in each: its lowest and its highest
READINGS = 200  # steps along each axis at which the pointer can show values
LAYER_POINTS = 400  # of a layer's curve, about; its first 400 are all kept, for the logarithmic axis

Point = tuple[int, float]  # step, value


@dataclass(frozen=True)
class Curve:
    """A line of a chart. Without a label it is in neither the legend nor the pointer's values."""

    label: str
    kind: str  # CSS class: raw, train, val or layer
    points: list[Point]
    shade: int = 0  # per cent between the first layer's color and the last's


def metric_charts(rows: list[dict], groups: Sequence[str], layer_names: Sequence[str] = ()) -> list[dict]:
    """Return the charts of these groups of METRICS, without those that have no numbers to show."""
    specs: dict[str, Chart] = {}
    curves: dict[str, list[Curve]] = {}
    for metric in METRICS:
        if metric.chart is not None and metric.group in groups:
            specs.setdefault(metric.chart.title, metric.chart)
            curves.setdefault(metric.chart.title, []).extend(_metric_curves(metric, rows, layer_names))
    last = rows[-1]["step"] if rows else 1
    charts = [chart(spec, last, curves[title]) for title, spec in specs.items()]
    return [each for each in charts if each is not None]


def _metric_curves(metric: Metric, rows: list[dict], layer_names: Sequence[str]) -> list[Curve]:
    if metric.of_layer is not None:
        return _layer_curves([(row["step"], metric.layers(row)) for row in rows], layer_names)
    raw, style = points(rows, metric.key), metric.chart.style
    if metric.chart.hide_zeros and not any(value for _, value in raw):
        return []
    if style != "noisy":
        return [Curve(metric.chart.label, style, raw)]
    return [Curve("", "raw", raw), Curve(metric.chart.label, "train", list(smooth(raw, len(rows) // 100)))]


def _layer_curves(values: list[tuple[int, list[float | None]]], names: Sequence[str]) -> list[Curve]:
    """Return a smoothed curve for each MoE layer."""
    curves = []
    for layer, name in enumerate(names):
        raw = [(step, layers[layer]) for step, layers in values if layers and layers[layer] is not None]
        stride, smoothed = max(len(raw) // LAYER_POINTS, 1), smooth(raw, len(raw) // 200)
        kept = [point for i, point in enumerate(smoothed) if i < LAYER_POINTS or (len(raw) - 1 - i) % stride == 0]
        curves.append(Curve(name, "layer", kept, 100 * layer // max(len(names) - 1, 1)))
    return curves


def chart(spec: Chart, last: int, curves: list[Curve]) -> dict | None:
    """Return the chart over steps 1 to `last` as plain data; None if no curve has a point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    values = [value for curve in curves for _, value in curve.points]
    low, high = value_range(values, spikes=spec.spikes, zero=spec.zero)

    def y(value: float) -> float:
        return HEIGHT * (1 - (value - low) / (high - low))

    def scale(name: str, x: Callable[[float], float], ticks: list[float]) -> dict:
        return {
            "name": name,
            "x_ticks": [{"at": 100 * x(tick), "text": tick_text(tick)} for tick in ticks if tick == int(tick)],
            "paths": [{"kind": curve.kind, "shade": curve.shade, "d": path(curve.points, x, y)} for curve in curves],
        }

    linear, logarithmic = axes(last)
    return {
        "title": spec.title,
        "unit": spec.unit,
        "legend": [curve for curve in curves if curve.label],
        "y_ticks": [{"at": 100 * y(tick) / HEIGHT, "text": tick_text(tick)} for tick in ticks_between(low, high, 6)],
        "scales": [scale("linear", linear, ticks_between(0, last, 5)), scale("log", logarithmic, decades(last))],
        "readings": {"last": last, "curves": [readings(curve, linear, logarithmic) for curve in curves if curve.label]},
    }


def axes(last: int) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Return functions from a step to its position, 0 to 1, on a linear axis from 0 and a logarithmic axis from 1."""
    return (lambda step: step / last), (lambda step: math.log(step) / math.log(max(last, 2)))


def value_range(values: list[float], *, spikes: bool, zero: bool) -> tuple[float, float]:
    """Return (low, high) with a margin around the values, low < high. `spikes` and `zero` need values of 0 or more."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if spikes:
        high = min(high, 1.5 * ordered[int(0.98 * (len(ordered) - 1))])
    low = 0.0 if zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if zero else low - margin), high + margin


def path(points: list[Point], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Return the SVG path of the points; a lone point becomes a short dash."""
    corners = [(WIDTH * x(step), y(value)) for step, value in thin(points, x)]
    if len(corners) == 1:
        corners.insert(0, (corners[0][0] - 15, corners[0][1]))
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)


def thin(points: list[Point], x: Callable[[float], float]) -> list[Point]:
    """Return at most 2 * COLUMNS points that draw the same picture: each column's lowest and highest, in order."""
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(min(int(x(point[0]) * COLUMNS), COLUMNS - 1), []).append(point)
    extremes = []
    for column in columns.values():
        lowest, highest = min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])
        extremes += sorted({lowest, highest})
    return extremes


def readings(curve: Curve, *axes: Callable[[float], float]) -> dict:
    """Return the curve at up to READINGS steps spread evenly over each axis, for the pointer."""
    nearby: set[Point] = set()  # one point at each position of the pointer
    for x in axes:
        nearby.update({int(x(point[0]) * READINGS): point for point in curve.points}.values())
    steps, values = zip(*sorted(nearby), strict=True)
    return {"label": curve.label, "steps": steps, "values": [float(f"{value:.4g}") for value in values]}


def ticks_between(low: float, high: float, about: int) -> list[float]:
    """Return at most `about` + 1 round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def decades(last: int) -> list[float]:
    """Return 1, 10, 100, ... up to the last step."""
    return [float(10**power) for power in range(len(str(last)))]


def points(rows: list[dict], key: str) -> list[Point]:
    """Return (step, value) for the rows with a number under the key; NaN and Inf are null there."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def smooth(points: list[Point], half: int) -> Iterator[Point]:
    """Average over `half` points on either side, and over fewer near both ends: at the start a curve is steep."""
    sums = [0.0, *accumulate(value for _, value in points)]
    for index, (step, _) in enumerate(points):
        reach = min(half, index // 4)
        first, end = index - reach, min(index + reach + 1, len(points))
        yield step, (sums[end] - sums[first]) / (end - first)


def tick_text(value: float) -> str:
    """Return a round number in few characters: 20k, 0.5, 6e-4."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    size, unit = next(((size, unit) for size, unit in ((1e6, "M"), (1e3, "k")) if abs(value) >= size), (1, ""))
    return f"{value / size:g}{unit}"
