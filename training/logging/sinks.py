"""Sinks: the places that rows of metrics go to, one per file. `SINKS` lists them."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from training.config import LoggingConfig
from training.files import write_atomically
from training.optim.batch_schedule import BatchSchedule

# Modules of this folder, and if the options enable their sink. Each has `open_sink(run, config) -> Sink`.
# metrics.jsonl comes first: it is the log of record. The console comes last: it prints once all others are open.
SINKS: dict[str, Callable[[LoggingConfig], bool]] = {
    "jsonl": lambda _: True,
    "tensorboard": lambda config: config.tensorboard,
    "wandb": lambda config: config.wandb is not None,
    "console": lambda _: True,
}


class RunInfo(NamedTuple):
    """Facts about the run that sinks may show."""

    dir: Path
    name: str
    config: dict[str, Any]  # resolved, as plain data
    config_yaml: str
    header: dict[str, str]  # label and text, in the order to show them
    start_step: int  # 0, or the step of the checkpoint that the run resumes from
    steps: int
    batches: BatchSchedule
    moe_layers: list[int]  # indices of the layers with experts
    facts: dict[str, Any]  # plain data for programs: device, world_size, ...
    hyperparameters: dict[str, Any]  # the options of the config that tell runs apart, by dotted name
    is_new_branch: bool = False  # metrics.jsonl has the rows of the run that this one branches off from


class Sink:
    """A place that rows go to. Opening one drops the rows past `run.start_step` that an earlier process wrote."""

    def write(self, rows: list[dict]) -> None:
        """Write the rows of consecutive steps; each row comes once."""
        raise NotImplementedError

    def write_graph(self, model: Any, *inputs: Any) -> None:
        """Draw the graph of `model(*inputs)`, a torch.nn.Module; a sink that cannot draw ignores it."""

    def close(self, summary: dict | None) -> None:
        """Close; harmless if repeated. `summary` is the content of summary.json, None if the run was interrupted."""


def open_sinks(config: LoggingConfig, run: RunInfo) -> list[Sink]:
    """Write run.json and open the sinks that `config` enables. Raises UserError if one cannot work."""
    content = {
        **{name: getattr(run, name) for name in ("name", "header", "facts", "steps", "moe_layers")},
        "tokens_per_step": run.batches.constant,
        "tokens": run.batches.tokens(run.steps),
    }
    write_atomically(run.dir / "run.json", json.dumps(content, indent=2) + "\n")
    sinks: list[Sink] = []
    with ExitStack() as on_error:
        for name, is_enabled in SINKS.items():
            if is_enabled(config):
                sinks.append(import_module(f"training.logging.{name}").open_sink(run, config))
                on_error.callback(sinks[-1].close, None)
        on_error.pop_all()
    return sinks
