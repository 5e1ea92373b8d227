"""What a person sees and keeps of a run: one sink a file, and the report.

The loop hands every sink the same rows. A row is a flat dict of one optimizer step, plain data that
JSON can hold; row k is the state after k steps. Always: `step loss learning_rate grad_norm tokens
tokens_per_s mfu memory_gib step_s time_s`, where `mfu` may be None. With experts: `router_z_loss`,
`expert_load` (per MoE layer the share of each expert, summing to one) and `expert_load_max` (largest
over mean share, over the layers). After an evaluation: `val_loss val_perplexity val_bits_per_byte`
and `samples`, dicts of a `prompt` and the `text` that continues it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from training.config import LoggingConfig
from training.files import write_atomically

if TYPE_CHECKING:
    import torch

TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
    "val_bits_per_byte": "val/bits_per_byte",
    "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s",
    "mfu": "speed/mfu",
    "memory_gib": "memory/gib",
    "router_z_loss": "router/z_loss",
    "expert_load_max": "router/expert_load_max",
}


@dataclass(frozen=True)
class Run:
    """What a sink may know of the run it shows."""

    dir: Path
    name: str
    config: dict[str, Any]  # resolved, as plain data
    config_yaml: str
    header: dict[str, str]  # facts in the order to show them, such as "device" or "parameters"
    start_step: int  # 0, or the step of the checkpoint that the run goes on from
    steps: int
    tokens_per_step: int


class Sink(Protocol):
    """A place that rows go to."""

    def write(self, rows: list[dict]) -> None:
        """Take the rows of consecutive steps, none of which it was given before."""

    def close(self, summary: dict | None) -> None:
        """End. `summary` is what summary.json says; None: interrupted."""


def open_sinks(config: LoggingConfig, run: Run) -> list[Sink]:
    """Open what `config` asks for, metrics.jsonl first. Rows past `run.start_step` are forgotten.

    Raises `UserError` where a file cannot be written or Weights & Biases is not set up.
    """
    from training.logging.console import open_console
    from training.logging.jsonl import JSONLSink

    facts = {"name": run.name, "header": run.header, "steps": run.steps, "tokens_per_step": run.tokens_per_step}
    write_atomically(run.dir / "run.json", json.dumps(facts, indent=2) + "\n")
    with ExitStack() as opened:
        sinks: list[Sink] = []

        def add(sink: Sink) -> None:
            sinks.append(sink)
            opened.callback(sink.close, None)

        add(JSONLSink(run))
        if config.tensorboard:
            from training.logging.tensorboard import TensorBoardSink

            add(TensorBoardSink(run, config.histogram_every))
        if config.wandb:
            from training.logging.wandb import WandbSink

            add(WandbSink(run, config.wandb))
        add(open_console(run, config.every))
        opened.pop_all()
    return sinks


def write_graph(sinks: list[Sink], model: torch.nn.Module, *inputs: Any) -> None:
    """Draw `model(*inputs)` where a sink can show it. Call it before compiling or sharding the model."""
    for sink in sinks:
        if draw := getattr(sink, "graph", None):
            draw(model, *inputs)


def scalars(row: dict) -> dict[str, float]:
    """The row's numbers by the tag that TensorBoard and Weights & Biases group them under."""
    found = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
    for layer, load in enumerate(row.get("expert_load") or ()):
        found[f"router/max_over_mean/moe_layer_{layer:02d}"] = max(load) * len(load)
    return found
