"""The geometry of the report's charts as plain data for SVG, so that the page needs no library."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple

from training.logging.history import History, Point, Series
from training.logging.metrics import METRICS, Chart, Metric

WIDTH, HEIGHT = 1000, 300  # units of the SVG's own coordinates; the page stretches them
COLUMNS = 400  # a path has at most two points in each: its lowest and its highest
READINGS = 200  # steps along each axis at which the pointer can show values
LAYER_POINTS = 400  # of a layer's curve, about; its first 400 are all kept, for the logarithmic axis

Axis = Callable[[float], float]  # step or value to position


class Curve(NamedTuple):
    """A line of a chart. Without a label it is in neither the legend nor the pointer's values."""

    label: str
    kind: str  # CSS class: raw, train, val, average or layer
    points: list[Point]
    shade: int = 0  # per cent between the color of the first layer, source or task and that of the last
    band: Sequence[tuple[float, float, float]] = ()  # an area around the line: (x, low, high)


def metric_charts(history: History, groups: Sequence[str], layer_names: Sequence[str] = ()) -> list[dict]:
    """Return the charts of these groups of METRICS, without those that have no numbers to show."""
    charts: dict[str, tuple[Chart, list[Curve]]] = {}
    for metric in METRICS:
        if metric.chart is not None and metric.group in groups:
            _, curves = charts.setdefault(metric.chart.title, (metric.chart, []))
            curves += [curve for curve in _metric_curves(metric, history, layer_names) if curve.points]
    return [chart(spec, history.last_step, curves) for spec, curves in charts.values() if curves]


def _metric_curves(metric: Metric, history: History, layer_names: Sequence[str]) -> list[Curve]:
    spec = metric.chart
    if metric.of_layer is not None:
        by_layer = [history.series(f"{metric.key}/{layer}") for layer in range(len(layer_names))]
        return [_layer_curve(series, layer, layer_names) for layer, series in enumerate(by_layer)]
    if metric.of_name:
        names = history.names(metric.key)
        curves = [(name, history.points(f"{metric.key}/{name}")) for name in names]
        return [Curve(name, "layer", points, _shade(i, len(names))) for i, (name, points) in enumerate(curves)]
    raw = history.points(metric.key)
    if spec.hide_zeros and not any(value for _, value in raw):
        return []
    if spec.style != "noisy":
        return [Curve(spec.label, spec.style, raw)]
    smoothed = smooth(history.series(metric.key), history.n_rows // 100)
    return [Curve("", "raw", raw), Curve(spec.label, "train", list(smoothed))]


def _layer_curve(series: list[Series], layer: int, names: Sequence[str]) -> Curve:
    """Return a MoE layer's smoothed curve."""
    n = len(series)
    stride, smoothed = max(n // LAYER_POINTS, 1), smooth(series, sum(part.n for part in series) // 200)
    kept = [point for i, point in enumerate(smoothed) if i < LAYER_POINTS or (n - 1 - i) % stride == 0]
    return Curve(names[layer], "layer", kept, _shade(layer, len(names)))


def _shade(index: int, n: int) -> int:
    """Return the place of a curve among n in per cent."""
    return 100 * index // max(n - 1, 1)


def chart(spec: Chart, last: float, curves: list[Curve], *, first: float = 1, x_name: str = "steps") -> dict:
    """Return the chart over steps, or another quantity, as plain data.

    The linear axis goes from 0 to `last`, the logarithmic one from `first` to `last`.
    """
    values = [value for curve in curves for _, value in curve.points]
    values += [value for curve in curves for _, *edges in curve.band for value in edges]
    span = math.log(max(last / first, 2))
    decades = range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)
    low, high = value_range(values, spikes=spec.spikes, zero=spec.zero)
    labeled = [curve for curve in curves if curve.label]
    axes: dict[str, tuple[Axis, list[float]]] = {  # step to position, 0 to 1; ticks
        "linear": (lambda step: step / last, ticks_between(0, last, 5)),
        "log": (lambda step: math.log(step / first) / span, [10.0**n for n in decades]),
    }

    def y(value: float) -> float:
        return HEIGHT * (1 - (value - low) / (high - low))

    def is_shown(tick: float) -> bool:
        return x_name != "steps" or tick == int(tick)

    return {
        "title": spec.title,
        "unit": spec.unit,
        "x": x_name,
        "legend": labeled,
        "y_ticks": [{"at": 100 * y(tick) / HEIGHT, "text": tick_text(tick)} for tick in ticks_between(low, high, 6)],
        "scales": [
            {
                "name": name,
                "x_ticks": [{"at": 100 * x(tick), "text": tick_text(tick)} for tick in ticks if is_shown(tick)],
                "paths": [
                    *({"kind": f"band {c.kind}", "shade": c.shade, "d": area(c.band, x, y)} for c in curves if c.band),
                    *({"kind": c.kind, "shade": c.shade, "d": path(c.points, x, y)} for c in curves),
                ],
            }
            for name, (x, ticks) in axes.items()
        ],
        "readings": {
            "x": x_name,
            "first": first,
            "last": last,
            "curves": [readings(curve, *(x for x, _ in axes.values())) for curve in labeled],
        },
    }


def value_range(values: list[float], *, spikes: bool, zero: bool) -> tuple[float, float]:
    """Return (low, high) with a margin around the values, low < high. `spikes` and `zero` need values of 0 or more."""
    ordered = sorted(values)
    low, high = 0.0 if zero else ordered[0], ordered[-1]
    if spikes:
        high = min(high, 1.5 * ordered[int(0.98 * (len(ordered) - 1))])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if zero else low - margin), high + margin


def path(points: list[Point], x: Axis, y: Axis) -> str:
    """Return the SVG path of the points; a lone point becomes a short dash."""
    corners = [(WIDTH * x(step), y(value)) for step, value in thin(points, x)]
    if len(corners) == 1:
        corners.insert(0, (corners[0][0] - 15, corners[0][1]))
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)


def area(band: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> str:
    """Return the SVG path of an area: along its upper edge, and back along the lower one."""
    edge = [(WIDTH * x(at), y(high)) for at, _, high in band] + [(WIDTH * x(at), y(low)) for at, low, _ in band[::-1]]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in edge) + "Z"


def thin(points: list[Point], x: Axis) -> list[Point]:
    """Return at most 2 * COLUMNS points that draw the same picture: each column's lowest and highest, in order."""
    extremes = []
    for _, group in groupby(points, lambda point: min(int(x(point[0]) * COLUMNS), COLUMNS - 1)):
        column = list(group)
        extremes += sorted({min(column, key=itemgetter(1)), max(column, key=itemgetter(1))})
    return extremes


def readings(curve: Curve, *axes: Axis) -> dict:
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


def smooth(series: list[Series], half: int) -> Iterator[Point]:
    """Average over `half` rows on either side, and over fewer near both ends: at the start a curve is steep.

    A span counts whole, at its last step, and at least its own is averaged.
    """
    sums = [0.0, *accumulate(part.total for part in series)]
    rows = [0, *accumulate(part.n for part in series)]
    for index, part in enumerate(series):
        middle = rows[index] + (part.n - 1) // 2
        reach = min(half, middle // 4)
        first = min(bisect_left(rows, middle - reach), index)
        end = max(bisect_right(rows, middle + reach + 1) - 1, index + 1)
        yield part.last[0], (sums[end] - sums[first]) / (rows[end] - rows[first])


def tick_text(value: float) -> str:
    """Return a round number in few characters: 20k, 0.5, 6e-4."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    size, unit = next(((size, unit) for size, unit in ((1e6, "M"), (1e3, "k")) if abs(value) >= size), (1, ""))
    return f"{value / size:g}{unit}"
