"""TensorBoard: curves, expert load, samples, the configuration and the model's graph."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.config_pb2 import RunMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from training.files import writing
from training.logging import Run, scalars
from training.logging.format import printable
from training.logging.graph import record

if TYPE_CHECKING:
    import torch

CELL = 24  # pixels of a heat map's cell


class TensorBoardSink:
    """Writes events below `run.dir / "tensorboard"`; `tensorboard --logdir` on the folder of runs compares them."""

    def __init__(self, run: Run, histogram_every: int) -> None:
        self.histogram_every, self.steps = histogram_every, run.steps
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
            for tag, value in scalars(row).items():
                self.writer.add_scalar(tag, value, row["step"])
            if row.get("expert_load") and (row["step"] % self.histogram_every == 0 or row["step"] == self.steps):
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
        self.writer.add_image("router/load_layers_x_experts", heat_map(load), step, dataformats="HWC")
        for layer, fractions in enumerate(load):
            self.writer.add_histogram(f"router/load/moe_layer_{layer:02d}", np.asarray(fractions), step)

    def _flush(self) -> None:
        with writing(self.path):
            self.writer.flush()


def heat_map(load: list[list[float]]) -> np.ndarray:
    """An image (layers x CELL, experts x CELL, 3), uint8: blue starves, white has its share, red at twice or more."""
    width = max(map(len, load))
    image = np.full((len(load), width, 3), 127.0)  # grey where a layer has fewer experts
    for layer, fractions in enumerate(load):
        over_mean = np.asarray(fractions) * len(fractions)
        for channel, colours in enumerate(((33, 247, 178), (102, 247, 24), (172, 247, 43))):
            image[layer, : len(fractions), channel] = np.interp(over_mean, (0, 1, 2), colours)
    return image.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)


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
