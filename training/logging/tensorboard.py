"""TensorBoard: curves, expert load, samples, the configuration and the model's graph."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram, hparams, image, text

from training.files import write_errors_as_user_errors
from training.logging.format import printable
from training.logging.graph import record
from training.logging.heat_map import due, heat_map
from training.logging.sinks import LOAD_IMAGE, RunInfo, layer_tag, scalars

if TYPE_CHECKING:
    import torch

LOAD_BINS = [0.0, *np.geomspace(1e-4, 1.1, 99)]  # of an expert's share of the tokens: a tenth apart


class TensorBoardSink:
    """Writes events below `run.dir / "tensorboard"`; `tensorboard --logdir` on the folder of runs compares them."""

    def __init__(self, run: RunInfo, histogram_every: int) -> None:
        self.histogram_every, self.steps, self.moe_layers = histogram_every, run.steps, run.moe_layers
        self.path = run.dir / "tensorboard"
        purge_step = run.start_step + 1
        facts = "\n".join(f"| {label} | {cell(fact)} |" for label, fact in run.header.items())
        _, start, self.end = hparams(flat(run.config), {})
        # torch's SummaryWriter writes in a thread, which prints a traceback where a disk is full.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with write_errors_as_user_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.file = (self.path / name).open("xb")
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
            Event(step=purge_step, summary=text("config", fenced(run.config_yaml))),
            Event(step=purge_step, summary=text("run", f"| | |\n|---|---|\n{facts}")),
            Event(summary=start),
        )

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            # All in one event, for one a number takes five times as long to write where a model is deep.
            found = scalars(row, self.moe_layers).items()
            summaries = [Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in found])]
            if due(row, self.histogram_every, self.steps):
                summaries += self._expert_load(row["expert_load"])
            if row.get("samples"):
                said = "\n\n---\n".join(fenced(printable(s["prompt"] + s["text"])) for s in row["samples"])
                summaries.append(text("samples", said))
            self._write(*(Event(step=row["step"], summary=summary) for summary in summaries))

    def graph(self, model: torch.nn.Module, *inputs: Any) -> None:
        """Show `model(*inputs)` in the Graphs tab."""
        self._write(Event(graph_def=record(model, *inputs).SerializeToString()))

    def close(self, summary: dict | None) -> None:
        if summary is not None:
            self._write(Event(summary=self.end))
        with suppress(OSError):  # every event was flushed; what a disk refused then, it refuses again
            self.file.close()

    def _expert_load(self, load: list[list[float]]) -> list[Summary]:
        found = [image(LOAD_IMAGE, heat_map(load, self.moe_layers), dataformats="HWC")]
        for layer, shares in zip(self.moe_layers, load, strict=True):
            found.append(histogram(layer_tag("load", layer), np.asarray(shares), LOAD_BINS))
        return found

    def _write(self, *events: Event) -> None:
        """Append events, and hand them to the system."""
        with write_errors_as_user_errors(self.path):
            for event in events:
                event.wall_time = time.time()
                RecordWriter(self.file).write(event.SerializeToString())
            self.file.flush()


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration as `section.option: value` for the HParams tab, lists written as JSON."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


def fenced(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in ("\n" + text).split("\n"))


def cell(text: str) -> str:
    """The text on one line, with nothing in it that Markdown would take for markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|" else " " if c == "\n" else c for c in text)
