"""TensorBoard: curves, expert load, samples, the configuration and the model's graph."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.config_pb2 import RunMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from training.files import writing
from training.logging import LOAD_IMAGE, Run, layer_tag, scalars
from training.logging.format import printable
from training.logging.graph import record
from training.logging.heat_map import due, heat_map

if TYPE_CHECKING:
    import torch


class TensorBoardSink:
    """Writes events below `run.dir / "tensorboard"`; `tensorboard --logdir` on the folder of runs compares them."""

    def __init__(self, run: Run, histogram_every: int) -> None:
        self.histogram_every, self.steps, self.moe_layers = histogram_every, run.steps, run.moe_layers
        self.path = run.dir / "tensorboard"
        first = run.start_step + 1
        with writing(self.path):
            self.writer = SummaryWriter(str(self.path), purge_step=first)
        self.writer.add_text("config", fenced(run.config_yaml), first)
        facts = "\n".join(f"| {label} | {cell(text)} |" for label, text in run.header.items())
        self.writer.add_text("run", f"| | |\n|---|---|\n{facts}", first)
        _, start, self.end = hparams(flat(run.config), {})
        self.writer.file_writer.add_summary(start)
        self._flush()

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            # All in one event: `add_scalar` writes one a number, which for a deep model takes five times as long.
            found = scalars(row, self.moe_layers).items()
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in found]
            self.writer.file_writer.add_summary(Summary(value=values), row["step"])
            if due(row, self.histogram_every, self.steps):
                self._expert_load(row["expert_load"], row["step"])
            if row.get("samples"):
                text = "\n\n---\n".join(fenced(printable(s["prompt"] + s["text"])) for s in row["samples"])
                self.writer.add_text("samples", text, row["step"])
        self._flush()

    def graph(self, model: torch.nn.Module, *inputs: Any) -> None:
        """Show `model(*inputs)` in the Graphs tab."""
        # add_graph wants device statistics as well, which only torch's own tracer has: none.
        self.writer.file_writer.add_graph((record(model, *inputs), RunMetadata()))
        self._flush()

    def close(self, summary: dict | None) -> None:
        if summary is not None:
            self.writer.file_writer.add_summary(self.end)
        with writing(self.path):
            self.writer.close()

    def _expert_load(self, load: list[list[float]], step: int) -> None:
        self.writer.add_image(LOAD_IMAGE, heat_map(load, self.moe_layers), step, dataformats="HWC")
        for layer, shares in zip(self.moe_layers, load, strict=True):
            self.writer.add_histogram(layer_tag("load", layer), np.asarray(shares), step)

    def _flush(self) -> None:
        with writing(self.path):
            self.writer.flush()


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
