"""TensorBoard: curves, expert load, samples, the configuration and the model's graph."""

import os
import re
import socket
import time
from contextlib import suppress
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout, MultilineChartContent
from tensorboard.plugins.custom_scalar.layout_pb2 import Chart as LayoutChart
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto
from torch import nn
from torch.utils.tensorboard.summary import histogram, hparams, image, text

from training.config import LoggingConfig
from training.files import ensure_folder, write_errors_as_user_errors
from training.logging.graph import trace_graph
from training.logging.heat_map import draw_heat_map, should_draw
from training.logging.jsonl import read_rows
from training.logging.metrics import LOAD_IMAGE, METRICS, NAME, expert_load, layer_tag, scalars
from training.logging.sinks import RunInfo, Sink
from training.terminal import TEXT, printable

CATEGORIES = {  # of the Custom Scalars tab, in order, by the first part of a tag
    "train": "Training",
    "val": "Validation",
    "tasks": "Tasks",
    "speed": "Speed",
    "memory": "Memory",
    "time": "Time by phase",
    "router": "Experts",
    "layers": "By layer",
    "router_layers": "Experts by layer",
}
COLLAPSED = ("time", "layers", "router_layers")
LOAD_BINS = [0.0, *np.geomspace(1e-4, 1.1, 99)]  # edges, of an expert's share; each is 10 % above the last


def open_sink(run: RunInfo, config: LoggingConfig) -> Sink:
    return TensorBoardSink(run, config.histogram_every)


class TensorBoardSink(Sink):
    """Writes events below `run.dir / "tensorboard"`; `tensorboard --logdir` on the folder of runs compares them."""

    def __init__(self, run: RunInfo, histogram_every: int) -> None:
        self.histogram_every, self.steps, self.moe_layers = histogram_every, run.steps, run.moe_layers
        self.path = run.dir / "tensorboard"
        purge_step = 1 if run.is_new_branch else run.start_step + 1
        # without line breaks and with Markdown's markup characters escaped
        cells = [re.sub(r"[]\\`*_{}[<>()#+\-.!|]", r"\\\g<0>", printable(fact)) for fact in run.header.values()]
        header = "\n".join(f"| {label} | {cell} |" for label, cell in zip(run.header, cells, strict=True))
        # Without an experiment's summary, TensorBoard shows the options of all runs and the last value of each curve.
        _, start, self.end = hparams(run.hyperparameters, {})
        # torch's SummaryWriter writes in a thread, which prints a traceback if the disk is full.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with write_errors_as_user_errors(self.path):
            ensure_folder(self.path)
            self.file = (self.path / name).open("xb")
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
            Event(step=purge_step, summary=text("config", _code_block(run.config_yaml))),
            Event(step=purge_step, summary=text("run", f"| | |\n|---|---|\n{header}")),
            Event(step=purge_step, summary=custom_scalars(layout())),
            Event(summary=start),
        )
        if run.is_new_branch:  # a killed start may have left events of its own: they are purged
            for row in read_rows(run.dir / "metrics.jsonl"):
                self.write([row])

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            # One event for all numbers: an event per number takes five times as long for a deep model.
            values = [Summary.Value(tag=tag, simple_value=v) for tag, v in scalars(row, self.moe_layers).items()]
            summaries = [Summary(value=values)]
            if should_draw(row, self.histogram_every, self.steps):
                load = expert_load(row, self.moe_layers)
                summaries.append(image(LOAD_IMAGE, draw_heat_map(load), dataformats="HWC"))
                for layer, load_E in load.items():
                    summaries.append(histogram(layer_tag("router_layers/load", layer), np.asarray(load_E), LOAD_BINS))
            if row.get("samples"):
                texts = (sample["prompt"] + sample["text"] for sample in row["samples"])
                summaries.append(text("samples", "\n\n---\n".join(map(_code_block, texts))))
            self._write(*(Event(step=row["step"], summary=summary) for summary in summaries))

    def write_graph(self, model: nn.Module, *inputs: Any) -> None:
        """Show the graph of `model(*inputs)` in the Graphs tab."""
        self._write(Event(graph_def=trace_graph(model, *inputs).SerializeToString()))

    def close(self, summary: dict | None) -> None:
        if summary is not None and not self.file.closed:
            self._write(Event(summary=self.end))
        with suppress(OSError):  # all events were flushed, or `_write` has raised already
            self.file.close()

    def _write(self, *events: Event) -> None:
        """Append the events and flush them."""
        with write_errors_as_user_errors(self.path):
            for event in events:
                event.wall_time = time.time()
                RecordWriter(self.file).write(event.SerializeToString())
            self.file.flush()


def custom_scalars(layout: Layout) -> Summary:
    """Return the summary that gives the Custom Scalars tab its layout; TensorBoard's own function needs TensorFlow."""
    tensor = make_tensor_proto(layout.SerializeToString())
    value = {"tag": metadata.CONFIG_SUMMARY_TAG, "metadata": metadata.create_summary_metadata(), "tensor": tensor}
    return Summary(value=[Summary.Value(**value)])


def layout() -> Layout:
    """Return the order of the Custom Scalars tab: the loss first, figures by layer last and collapsed.

    TensorBoard sorts the cards of its other tabs by name.
    """
    categories: dict[str, Category] = {}
    for prefix, title in CATEGORIES.items():
        categories[prefix] = Category(title=title, closed=prefix in COLLAPSED)
    for metric in METRICS:
        if metric.tag is not None:
            prefix, _, name = metric.tag.partition("/")
            pattern = re.escape(metric.tag).replace(NAME, ".+") + ("/.+" if metric.of_layer is not None else "")
            lines = MultilineChartContent(tag=[f"^{pattern}$"])
            categories[prefix].chart.append(LayoutChart(title=name.replace("_", " "), multiline=lines))
    return Layout(category=list(categories.values()))


def _code_block(text: str) -> str:
    """Return Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in ("\n" + printable(text, TEXT)).split("\n"))
