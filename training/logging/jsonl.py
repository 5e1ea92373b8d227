"""metrics.jsonl: one JSON object a step, each step exactly once, whatever restarts the run had."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import write_atomically, write_errors_as_user_errors
from training.logging.sinks import RunInfo


class JSONLSink:
    """Appends rows to `run.dir / "metrics.jsonl"`, after dropping what is past `run.start_step`.

    Rows that someone else removed are missed aloud: a run does not end for its log.
    """

    def __init__(self, run: RunInfo) -> None:
        self.path = run.dir / "metrics.jsonl"
        text = _text(self.path)
        rows = [(line, row["step"]) for line, row in _rows(self.path, text) if row["step"] <= run.start_step]
        kept = "".join(f"{line}\n" for line, _ in rows)
        if kept != text or not self.path.exists():
            write_atomically(self.path, kept)
        steps, begun = [step for _, step in rows], (run.dir / "checkpoints").exists()
        first = run.start_step + 1 - len(steps)  # a run that began with another's checkpoint has rows from there
        if steps != list(range(first, run.start_step + 1)) or (begun and run.start_step and not steps):
            self._miss(f"not every step up to {run.start_step} has a row of its own")
        self.size = self.path.stat().st_size

    def write(self, rows: list[dict]) -> None:
        """Append the rows, durably: rows that a checkpoint relies on survive a power cut as it does."""
        lines = "".join(json.dumps(nan_to_null(row), ensure_ascii=False) + "\n" for row in rows)
        with write_errors_as_user_errors(self.path), self.path.open("ab") as file:
            if file.tell() != self.size:
                self._miss("removed or changed while the run wrote it")
            file.write(lines.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()

    def _miss(self, why: str) -> None:
        print(f"{self.path}: {why}; the run goes on, without these rows", file=sys.stderr)

    def close(self, summary: dict | None) -> None:
        """Nothing is held open."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, also of one that is being written; none where there is no file.

    Raises `UserError` for a line, other than an unfinished last one, that is no row.
    """
    return [row for _, row in _rows(path, _text(path))]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _rows(path: Path, text: str) -> list[tuple[str, dict]]:
    """Every complete line with its row. A line is complete when it ends in a newline."""
    *lines, _torn = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not _is_row(row):
            raise UserError(f"{path} line {number} is not a row of metrics: remove the line to go on")
        found.append((line, row))
    return found


def _is_row(row: dict) -> bool:
    times = [value for name, value in row.items() if name.startswith("time_")]
    return type(row.get("step")) is int and all(type(value) in (int, float) for value in times)


def nan_to_null(value: Any) -> Any:
    """NaN and infinities as null, since JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    return [nan_to_null(item) for item in value] if isinstance(value, list | tuple) else value
