"""The history of a run: a summary of all its rows, of a size that does not grow with them.

The report and the advice read it. Up to `MAX_SPANS` rows it has every number; beyond, consecutive rows share a `Span`,
which keeps of each metric the sum and the lowest, highest, first and last point: a curve through these has the spikes,
the minimum and the ends of the curve through all rows (as M4 does, doi:10.14778/2732951.2732953).
"""

import math
from collections import deque
from dataclasses import dataclass

from training.logging.metrics import METRICS, by_name
from training.logging.phases import PHASES

MAX_SPANS = 1200  # beyond, `stride` doubles
SPANS_PER_OCTAVE = 32  # at least, between a step and twice that step: a logarithmic axis shows early steps at length
RECENT_STEPS = 50  # averaged for the expert load at the end

Point = tuple[int, int | float]  # step, value


@dataclass(slots=True)
class Series:
    """A metric over consecutive rows, without those that lack it."""

    n: int
    total: int | float
    first: Point
    low: Point
    high: Point
    last: Point

    def extend(self, later: "Series") -> None:
        self.n += later.n
        self.total += later.total
        if later.low[1] < self.low[1]:
            self.low = later.low
        if later.high[1] > self.high[1]:
            self.high = later.high
        self.last = later.last


@dataclass(slots=True)
class Span:
    """Consecutive rows."""

    first: int  # step
    last: int
    n_rows: int
    end: int  # where the rows end in metrics.jsonl, in bytes
    series: dict[str, Series]  # by the key in METRICS; "key/0" for the first MoE layer, "key/name" for a source or task
    evaluation: dict | None  # the run's first row with samples, if it is one of these: `step` and `samples`

    def extend(self, later: "Span") -> None:
        self.last, self.end, self.n_rows = later.last, later.end, self.n_rows + later.n_rows
        self.evaluation = self.evaluation or later.evaluation
        for key, series in later.series.items():
            if key in self.series:
                self.series[key].extend(series)
            else:
                self.series[key] = series


def span_of(row: dict, end: int = 0) -> Span:
    """Return the span of one row. Raises ValueError if it has no step, or a value of another type than METRICS says."""
    try:
        step, evaluation = row["step"], None
        if type(step) is not int or step < 1:
            raise ValueError(f"step is {step!r}")
        series = {}
        for key, value in _numbers(row).items():
            if math.isfinite(value):
                point = (step, value)
                series[key] = Series(1, value, point, point, point, point)
        if samples := row.get("samples"):
            texts = [{name: "".join(sample[name]) for name in ("prompt", "text")} for sample in samples]
            evaluation = {"step": step, "samples": texts}
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a row of metrics: {error}") from error
    return Span(step, step, 1, end, series, evaluation)


def _numbers(row: dict) -> dict[str, int | float]:
    """Return the row's numbers by key.

    Of a list over MoE layers, or a dict by source or task, only what a chart shows: as "key/0" or "key/name".
    """
    numbers, others = {}, []
    for key, value in row.items():
        if type(value) in (float, int):
            if key != "step":
                numbers[key] = value
        elif value is not None and key != "samples":
            others.append(key)
    for metric in METRICS:
        if metric.of_layer is None and not metric.of_name and metric.key in others:
            raise ValueError(f"{metric.key} is {row[metric.key]!r}")
        if metric.of_layer is not None and (metric.chart is not None or metric.heat_map is not None):
            layers = enumerate(metric.layers(row))
            numbers |= {f"{metric.key}/{layer}": value for layer, value in layers if value is not None}
        if metric.of_name:
            of_names = by_name(metric, row)  # raises ValueError, too
            numbers |= {f"{metric.key}/{name}": value for name, value in of_names.items() if metric.chart is not None}
    return numbers


class History:
    """The spans of a run's rows, and its last rows.

    A span covers `stride` steps, from a multiple of it on, and fewer before step `SPANS_PER_OCTAVE * stride`. It
    depends on the rows alone: a run that was interrupted and resumed has the history of one that was not, except that
    `stride` never falls again if a run goes back to a much earlier step.
    """

    def __init__(self, spans: list[Span] | None = None, stride: int = 1) -> None:
        self.spans, self.stride = spans or [], stride
        self.recent: deque[dict] = deque(maxlen=RECENT_STEPS)  # rows
        self.first_evaluation = next((span.evaluation for span in self.spans if span.evaluation is not None), None)
        self.last_evaluation: dict | None = None

    @property
    def last_step(self) -> int:
        """The last row's step; 0 if there are no rows."""
        return self.spans[-1].last if self.spans else 0

    @property
    def n_rows(self) -> int:
        return sum(span.n_rows for span in self.spans)

    def add(self, row: dict, end: int = 0) -> None:
        """Add the row after the last one; it ends at byte `end` of metrics.jsonl. Raises ValueError, as `span_of`."""
        self.add_span(span_of(row, end), row)

    def add_span(self, span: Span, row: dict) -> None:
        """Add a row by its span."""
        self.recent.append(row)
        self.last_evaluation = span.evaluation or self.last_evaluation
        if self.first_evaluation is None:
            self.first_evaluation = span.evaluation
        else:
            span.evaluation = None
        self._append(span)
        while len(self.spans) > MAX_SPANS:
            self.stride *= 2
            spans, self.spans = self.spans, []
            for narrow in spans:
                self._append(narrow)

    def _append(self, span: Span) -> None:
        if self.spans and self._start(self.spans[-1].first) == self._start(span.first):
            self.spans[-1].extend(span)
        else:
            self.spans.append(span)

    def _start(self, step: int) -> int:
        """Return the first step of the span that a step belongs to."""
        width = min(self.stride, 1 << max(0, (step // SPANS_PER_OCTAVE).bit_length() - 1))
        return step - step % width

    def series(self, key: str) -> list[Series]:
        """Return a metric's series, without the spans that lack it."""
        return [span.series[key] for span in self.spans if key in span.series]

    def names(self, key: str) -> list[str]:
        """Return the sources or tasks that have a series of this metric."""
        keys = dict.fromkeys(each for span in self.spans for each in span.series)
        return [each.removeprefix(f"{key}/") for each in keys if each.startswith(f"{key}/")]

    def points(self, key: str) -> list[Point]:
        """Return the points of a metric's curve: its ends, and each span's lowest and highest."""
        series = self.series(key)
        ends = {series[0].first, series[-1].last} if series else set()
        return sorted(ends.union(*((part.low, part.high) for part in series)))

    def newest(self) -> dict[str, int | float]:
        """Return the newest number of each metric."""
        return {key: series.last[1] for span in self.spans for key, series in span.series.items()}

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds by phase that the rows add up to."""
        return {phase: sum((part.total for part in self.series(f"time_{phase}")), 0.0) for phase in PHASES}
