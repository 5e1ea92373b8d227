"""The geometry of the report's charts: what an SVG needs, computed here, so the page needs no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

WIDTH, HEIGHT = 1000, 300  # units of the SVG's own coordinates; the page stretches them
COLUMNS = 400  # a path has at most two points in each, its lowest and its highest
READINGS = 200  # steps that the pointer can read values at, on either axis

Point = tuple[int, float]  # step, value


@dataclass(frozen=True)
class Curve:
    """A line of a chart. Without a label it is neither in the legend nor read out."""

    label: str
    kind: str  # CSS class: raw, train, val or layer
    points: list[Point]
    shade: int = 0  # per cent between the first layer's colour and the last's


def chart(
    title: str, unit: str, last: int, curves: list[Curve], *, spikes: bool = False, zero: bool = False
) -> dict | None:
    """The chart over steps 1 to `last` as plain data; None where no curve has a point.

    `spikes`: rare outliers may leave the frame, rather than flatten the rest. `zero`: the axis starts at 0.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    low, high = limits([value for curve in curves for _, value in curve.points], spikes=spikes, zero=zero)

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
        "title": title,
        "unit": unit,
        "legend": [curve for curve in curves if curve.label],
        "y_ticks": [{"at": 100 * y(tick) / HEIGHT, "text": tick_text(tick)} for tick in ticks_between(low, high, 6)],
        "scales": [scale("linear", linear, ticks_between(0, last, 5)), scale("log", logarithmic, decades(last))],
        "readings": {"last": last, "curves": [readings(curve, linear, logarithmic) for curve in curves if curve.label]},
    }


def axes(last: int) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """The place of a step, 0 to 1, on a linear axis from 0 and on a logarithmic one from 1."""
    return (lambda step: step / last), (lambda step: math.log(step) / math.log(max(last, 2)))


def limits(values: list[float], *, spikes: bool, zero: bool) -> tuple[float, float]:
    """The values' range with a margin, never empty; with `spikes` or `zero` no value is negative."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if spikes:
        high = min(high, 1.5 * ordered[int(0.98 * (len(ordered) - 1))])
    low = 0.0 if zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if zero else low - margin), high + margin


def path(points: list[Point], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The SVG path of the points; a lone point becomes a short dash."""
    kept = [(WIDTH * x(step), y(value)) for step, value in thinned(points, x)]
    if len(kept) == 1:
        kept.insert(0, (kept[0][0] - 15, kept[0][1]))
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in kept)


def thinned(points: list[Point], x: Callable[[float], float]) -> list[Point]:
    """At most 2 * COLUMNS points that draw the same picture: each column's lowest and highest, in order."""
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(min(int(x(point[0]) * COLUMNS), COLUMNS - 1), []).append(point)
    kept = []
    for column in columns.values():
        lowest, highest = min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])
        kept += sorted({lowest, highest})
    return kept


def readings(curve: Curve, *places: Callable[[float], float]) -> dict:
    """The curve at up to READINGS steps spread evenly over each axis, for the pointer to read."""
    kept: set[Point] = set()
    for x in places:
        kept.update({int(x(point[0]) * READINGS): point for point in curve.points}.values())
    steps, values = zip(*sorted(kept), strict=True)
    return {"label": curve.label, "steps": steps, "values": [float(f"{value:.4g}") for value in values]}


def ticks_between(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    return [round(index * apart, 12) for index in range(first, last + 1)]


def decades(last: int) -> list[float]:
    """1, 10, 100, ... up to the last step."""
    return [float(10**power) for power in range(len(str(last)))]


def points(rows: list[dict], key: str) -> list[Point]:
    """(step, value) wherever the rows have one; null stands for what was not finite."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def noisy(rows: list[dict], key: str) -> list[Curve]:
    """What the rows have under the key, as it is and smoothed."""
    raw = points(rows, key)
    return [Curve("", "raw", raw), Curve("training", "train", list(smoothed(raw, len(rows) // 100)))]


def smoothed(points: list[Point], half: int) -> Iterator[Point]:
    """Mean over `half` points on either side, over fewer near the start, where a curve is steep."""
    sums = [0.0, *accumulate(value for _, value in points)]
    for index, (step, _) in enumerate(points):
        reach = min(half, index // 4)
        first, end = index - reach, min(index + reach + 1, len(points))
        yield step, (sums[end] - sums[first]) / (end - first)


def tick_text(value: float) -> str:
    """A round number in few characters: 20k, 0.5, 6e-4."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return (
        f"{value / 1000:g}k" if 1000 <= abs(value) < 1e6 else f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value:g}"
    )
