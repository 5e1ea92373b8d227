"""metrics.jsonl: one JSON object per step, each step exactly once over all restarts."""

import json
import math
import os
from pathlib import Path
from typing import Any

from training.config import LoggingConfig
from training.errors import UserError
from training.files import write_atomically, write_errors_as_user_errors
from training.logging.sinks import RunInfo, Sink
from training.terminal import print_note


def open_sink(run: RunInfo, _config: LoggingConfig) -> Sink:
    return JSONLSink(run)


class JSONLSink(Sink):
    """Appends rows to `run.dir / "metrics.jsonl"`. Warns if someone removed rows: a run does not stop for its log."""

    def __init__(self, run: RunInfo) -> None:
        self.path = run.dir / "metrics.jsonl"
        text = read_text(self.path)
        lines = zip(text.split("\n"), _parse(text, self.path), strict=False)  # the last line is empty or unfinished
        kept = [(f"{line}\n", row["step"]) for line, row in lines if row["step"] <= run.start_step]
        new_text = "".join(line for line, _ in kept)
        if new_text != text or not self.path.exists():
            write_atomically(self.path, new_text)
        steps, has_checkpoints = [step for _, step in kept], (run.dir / "checkpoints").exists()
        first = run.start_step + 1 - len(steps)  # rows may begin at the checkpoint of another run
        if steps != list(range(first, run.start_step + 1)) or (has_checkpoints and run.start_step and not steps):
            self._warn(f"not every step up to {run.start_step} has exactly one row")
        self.size = self.path.stat().st_size

    def write(self, rows: list[dict]) -> None:
        """Append the rows and fsync them: the rows before a checkpoint survive a power cut if the checkpoint does."""
        lines = "".join(json.dumps(nan_to_null(row), ensure_ascii=False) + "\n" for row in rows)
        with write_errors_as_user_errors(self.path), self.path.open("ab") as file:
            if file.tell() != self.size:
                self._warn("removed or changed while the run wrote it")
            file.write(lines.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()

    def _warn(self, problem: str) -> None:
        print_note(f"{self.path}: {problem}; training continues without the missing rows")


def read_rows(path: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, [] if there is no file. Raises UserError for a complete line that is no row."""
    return _parse(read_text(path), path)


def _parse(text: str, path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            times = [value for name, value in row.items() if name.startswith("time_")]
            is_row = type(row["step"]) is int and all(type(value) in (int, float) for value in times)
        except (ValueError, AttributeError, KeyError):  # no JSON, not an object, or without a step
            is_row = False
        if not is_row:
            raise UserError(f"{path} line {number} is not a row of metrics: remove the line and start again")
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """Return the file's text, "" if there is no file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def nan_to_null(value: Any) -> Any:
    """Return the value with None for NaN and Inf, which JSON lacks, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    return [nan_to_null(item) for item in value] if isinstance(value, list | tuple) else value
