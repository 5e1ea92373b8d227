"""metrics.jsonl: one JSON object per step, each step exactly once over all restarts.

Beside it, curves.jsonl holds the spans of `history.py` that are complete, so that a restart reads only the end of
metrics.jsonl. Each of its lines begins with a checksum: what is missing, damaged or does not fit is made again from
metrics.jsonl.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from training.config import LoggingConfig
from training.errors import UserError
from training.files import fsync_path, set_aside, write_atomically, write_errors_as_user_errors
from training.logging.history import MAX_SPANS, History, Span, span_of
from training.logging.phases import PHASES
from training.logging.sinks import RunInfo, Sink
from training.terminal import print_note

TAIL_BYTES = 2**20  # a start reads the rows from here before the checkpoint's row on; curves.jsonl has the rest
MAX_BYTES = 2**24  # that a start reads without a curves.jsonl that fits; of more it reads a sample of the rows
MAX_ROW_BYTES = 2**26  # more without a line break is not a row, such as the zeros of a file that a crash enlarged
SPAN = TypeAdapter(Span)


class Line(NamedTuple):
    """A line of metrics.jsonl."""

    start: int  # its first byte's number
    data: bytes
    row: dict | None  # None: not a row of metrics
    span: Span | None  # of the row


def open_sink(run: RunInfo, _config: LoggingConfig) -> Sink:
    return JSONLSink(run)


class JSONLSink(Sink):
    """Appends rows to `run.dir / "metrics.jsonl"` and to `history`. A run does not stop for its log.

    Opening it moves rows that cannot be read to metrics.unreadable.jsonl, and sums the time of the rows that it drops
    as `lost_s`. It warns if someone removed rows.
    """

    def __init__(self, run: RunInfo) -> None:
        self.path, self.curves = run.dir / "metrics.jsonl", run.dir / "curves.jsonl"
        self.unreadable = run.dir / "metrics.unreadable.jsonl"
        self.lost_s = 0.0
        for path in (self.path, self.unreadable, self.curves):
            if path.exists() and not path.is_file():
                set_aside(path)
        if not self.path.exists():
            write_atomically(self.path, "")
        with write_errors_as_user_errors(self.path):
            self._load(run.start_step)
        self._save_curves()
        self._check_steps(run.start_step, has_checkpoints=(run.dir / "checkpoints").exists())

    def write(self, rows: list[dict]) -> None:
        """Append the rows and fsync them: the rows before a checkpoint survive a power cut if the checkpoint does."""
        lines = [json.dumps(nan_to_null(row), ensure_ascii=False) + "\n" for row in rows]
        data = [line.encode("utf-8", "backslashreplace") for line in lines]
        with write_errors_as_user_errors(self.path), self.path.open("ab") as file:
            if file.tell() != self.size:
                self._warn("removed or changed while the run wrote it; training continues without the missing rows")
            self.size = file.tell()
            file.write(b"".join(data))
            file.flush()
            os.fsync(file.fileno())
        stride = self.history.stride
        for row, line in zip(rows, data, strict=True):
            self.size += len(line)
            self.history.add(row, self.size)
        self._save_curves(append=stride == self.history.stride)

    def _load(self, start_step: int) -> None:
        """Read the end of metrics.jsonl into the history; remove the rows past the checkpoint and unreadable lines."""
        tail = max(0, _offset_of(self.path, start_step) - TAIL_BYTES)
        self.history = _read_curves(self.curves, self.path, tail)
        self.size = self.history.spans[-1].end if self.history.spans else 0
        if tail - self.size > MAX_BYTES and (sample := _sample(self.path, tail)).spans:
            self.history, self.size = sample, sample.spans[-1].end
            reason = f"{self.curves.name} is missing or does not fit"
            self._warn(f"{reason}; the report shows a sample of the rows up to step {self.history.last_step}")
        kept = [[0, self.size]]  # parts of the file: first byte, end
        n_unreadable = after = 0
        for line, kind, step_before in _classified_lines(self.path, self.size, self.history.last_step, start_step):
            if kind == "kept":
                if line.start != kept[-1][1]:
                    kept.append([line.start, line.start])
                kept[-1][1] = line.start + len(line.data)
                self.size += len(line.data)
                line.span.end = self.size
                self.history.add_span(line.span, line.row)
            elif kind == "unreadable":
                with self.unreadable.open("ab") as file:
                    file.write(line.data.removesuffix(b"\n") + b"\n")
                after = after if n_unreadable else step_before
                n_unreadable += 1
            elif line.span is not None:
                series = (line.span.series.get(f"time_{phase}") for phase in PHASES)
                self.lost_s += sum(part.total for part in series if part is not None)
        if n_unreadable:
            fsync_path(self.unreadable)
            lines = f"{n_unreadable} line{'s' if n_unreadable > 1 else ''} after step {after}"
            self._warn(f"moved {lines}, unreadable or out of order, to {self.unreadable.name}; training continues")
        self.has_warned = n_unreadable > 0
        if len(kept) > 1:
            write_atomically(self.path, _read_ranges(self.path, kept))
        elif self.size != self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(self.size)
            fsync_path(self.path)

    def _check_steps(self, start_step: int, *, has_checkpoints: bool) -> None:
        spans, n_rows = self.history.spans, self.history.n_rows
        first = start_step + 1 - n_rows  # rows may begin at the checkpoint of another run
        is_complete = spans[0].first == first and spans[-1].last == start_step if spans else not has_checkpoints
        if start_step and not is_complete and not self.has_warned:
            reason = f"not every step up to {start_step} has exactly one row"
            self._warn(f"{reason}; training continues without the missing rows")

    def _save_curves(self, *, append: bool = False) -> None:
        """Write the spans that later rows will not change; with `append` those since the last call."""
        complete = self.history.spans[:-1]
        try:
            if append:
                with self.curves.open("ab") as file:
                    file.writelines(_checked(SPAN.dump_json(span)) for span in complete[self.n_saved :])
            else:
                lines = [b"%d" % self.history.stride, *map(SPAN.dump_json, complete)]
                write_atomically(self.curves, map(_checked, lines))
        except (OSError, UserError):
            with suppress(OSError):
                self.curves.unlink(missing_ok=True)  # without one, the next start reads all rows
        self.n_saved = len(complete)

    def _warn(self, problem: str) -> None:
        print_note(f"{self.path}: {problem}")


def read_rows(path: Path, after: int = 0) -> Iterator[dict]:
    """Yield the rows past step `after`, without lines that cannot be read; none if there is no file."""
    if path.is_file():
        for line in _lines(path, _offset_of(path, after)):
            if line.row is not None and line.row["step"] > after:
                yield line.row


def copy_rows(parent: Path, folder: Path, last_step: int) -> None:
    """Copy the rows up to `last_step` of the run in folder `parent`, and its curves, in place of the folder's own."""
    path = parent / "metrics.jsonl"
    if not path.is_file():
        return
    end = _offset_of(path, last_step)
    for line in _lines(path, end):
        if line.row is not None and line.row["step"] > last_step:
            break
        if line.row is not None:
            end = line.start + len(line.data)
    write_atomically(folder / "metrics.jsonl", _read_ranges(path, [[0, end]]))
    with suppress(OSError):  # without curves they are made again from the rows
        write_atomically(folder / "curves.jsonl", [(parent / "curves.jsonl").read_bytes()])


def read_history(path: Path) -> History:
    """Return the history of all rows, by curves.jsonl where it fits; an empty one if there is no file."""
    if not path.is_file():
        return History()
    history = _read_curves(path.with_name("curves.jsonl"), path, path.stat().st_size)
    start = history.spans[-1].end if history.spans else 0
    for line in _lines(path, start):
        if line.row is not None and line.row["step"] > history.last_step:
            history.add(line.row, line.start + len(line.data))
    return history


def read_tail(path: Path) -> list[dict]:
    """Return the rows in the last TAIL_BYTES, without lines that cannot be read; [] if there is no file."""
    if not path.is_file():
        return []
    return [line.row for line in _lines(path, max(0, path.stat().st_size - TAIL_BYTES)) if line.row is not None]


def _lines(path: Path, start: int) -> Iterator[Line]:
    with path.open("rb") as file:
        file.seek(start)
        while data := file.readline(MAX_ROW_BYTES):
            yield _line(start, data)
            start += len(data)


def _line(start: int, data: bytes) -> Line:
    try:
        if not data.endswith(b"\n"):
            raise ValueError("unfinished")
        row = json.loads(data.decode())
        return Line(start, data, row, span_of(row))
    except (ValueError, RecursionError):
        return Line(start, data, None, None)


def _offset_of(path: Path, step: int) -> int:
    """Return a byte at or before the row after `step`, at most TAIL_BYTES before it, by bisection."""
    low, high = 0, path.stat().st_size
    while high - low > TAIL_BYTES:
        middle = (low + high) // 2
        row = next((line.row for line in _lines(path, middle) if line.row is not None), None)
        low, high = (middle, high) if row is not None and row["step"] <= step else (low, middle)
    return low


def _classified_lines(path: Path, start: int, previous: int, start_step: int) -> Iterator[tuple[Line, str, int]]:
    """Yield (line, kind, step before) for the lines from byte `start` on, after the row of step `previous`.

    "kept": the rows of rising steps to `start_step`; "past": what lies past these; "unreadable": what lies among them.
    """
    held = None  # the row before: only the next one tells a wrong step, such as 900 between 99 and 101, from a gap
    for line in _lines(path, start):
        step = line.row["step"] if line.row is not None else None
        last = held.row["step"] if held is not None else previous
        if step is not None and last < step <= start_step:
            if held is not None:
                yield held, "kept", previous
            previous, held = last, line
        elif step is not None and previous < step < last:
            yield held, "unreadable", previous
            held = line
        else:
            is_past = last >= start_step or (step is not None and step > start_step)
            yield line, "past" if is_past else "unreadable", last
    if held is not None:
        yield held, "kept", previous


def _read_ranges(path: Path, ranges: list[list[int]]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for start, end in ranges:
            file.seek(start)
            while start < end:
                yield (data := file.read(min(end - start, 2**20)))
                start += len(data)


def _read_curves(curves: Path, path: Path, limit: int) -> History:
    """Return the history of the first `limit` bytes of metrics.jsonl by curves.jsonl; empty if that does not fit."""
    spans = []
    try:
        with curves.open("rb") as file:
            stride = int(_unchecked(file.readline()))
            for line in file:
                span = SPAN.validate_json(_unchecked(line))
                if span.end > limit:
                    break
                spans.append(span)
    except (OSError, ValueError):  # the rest is read from metrics.jsonl
        pass
    is_rising = all(a.last < b.first and a.end < b.end for a, b in pairwise(spans))
    return History(spans, stride) if spans and is_rising and _ends_at(path, spans[-1]) else History()


def _checked(data: bytes) -> bytes:
    """Return the line of curves.jsonl that holds `data`: a CRC-32 in hexadecimal digits, a space, the data."""
    return b"%08x %b\n" % (zlib.crc32(data), data)


def _unchecked(line: bytes) -> bytes:
    """Return the data of a line of curves.jsonl. Raises ValueError if it is damaged or unfinished."""
    data = line.removesuffix(b"\n").partition(b" ")[2]
    if line != _checked(data):
        raise ValueError("damaged")
    return data


def _sample(path: Path, limit: int) -> History:
    """Return the history of MAX_SPANS rows in the first `limit` bytes; each stands for those since the one before."""
    history = History()
    for part in range(MAX_SPANS):
        for line in islice(_lines(path, part * limit // MAX_SPANS), 2):  # the first may begin in its middle
            if line.row is not None and line.row["step"] > history.last_step:
                n_rows = line.row["step"] - history.last_step if history.spans else 1
                span = span_of(line.row, line.start + len(line.data))
                span.n_rows = n_rows
                for series in span.series.values():
                    series.n, series.total = n_rows, n_rows * series.total
                history.add_span(span, line.row)
                break
    return history


def _ends_at(path: Path, span: Span) -> bool:
    """Return True if a line of metrics.jsonl ends where the span does and the next row is that of the next step."""
    with path.open("rb") as file:
        file.seek(span.end - 1)
        is_line = file.read(1) == b"\n"
    line = next(_lines(path, span.end), None)
    return is_line and line is not None and (line.row is None or line.row["step"] == span.last + 1)


def nan_to_null(value: Any) -> Any:
    """Return the value with None for NaN and Inf, which JSON lacks, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    return [nan_to_null(item) for item in value] if isinstance(value, list | tuple) else value
