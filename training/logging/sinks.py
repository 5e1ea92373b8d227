"""What a person sees and keeps of a run: one sink a file, and the report.

The loop hands every sink the same rows. A row is a dict of one optimizer step, plain data that JSON can
hold; row k is the state after k steps.

Always: `step loss learning_rate grad_norm skipped_steps tokens tokens_per_s mfu memory_gib step_s time_s`, where `mfu`
may be None, and `time_compute`, `time_data`, ...: seconds a step of each phase (`times.PHASES`), the mean since the
row that was fetched before, so that what follows a row is in the next. After an evaluation: `val_loss
val_perplexity val_bits_per_byte` and `samples`, dicts of a `prompt` and the `text` that continues it.

With experts, of the step's global batch:

- `expert_load`: for each MoE layer the share of what was sent that each expert got, summing to one;
- `router_layers`: for each MoE layer, in lists: `entropy` of the load over that of an even one,
  `confidence` (mean over tokens of the largest share of the scores), `z_loss`, `bias_range` (largest less
  smallest selection bias) and `dropped` (share of what was sent that was beyond the experts' capacity);
- of all layers at once: `expert_load_max` (largest over mean share) and `expert_entropy`, each of the worst
  layer, `dead_experts` (how many got less than `model.metrics.dead_expert_threshold`), `router_confidence` and
  `router_z_loss` (means), `router_bias_range` (the largest) and `dropped_share` (of all that was sent).

Layers are counted from 0 in data (`RunInfo.moe_layers`, run.json, experts.json) and from 1 in what people read.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from training.config import LoggingConfig
from training.files import write_atomically
from training.logging.phases import PHASES

if TYPE_CHECKING:
    import torch

TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "skipped_steps": "train/skipped_steps",
    "tokens": "train/tokens",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
    "val_bits_per_byte": "val/bits_per_byte",
    "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s",
    "mfu": "speed/mfu",
    "memory_gib": "memory/gib",
    "expert_load_max": "router/expert_load_max",
    "expert_entropy": "router/expert_entropy",
    "dead_experts": "router/dead_experts",
    "router_confidence": "router/confidence",
    "router_z_loss": "router/z_loss",
    "router_bias_range": "router/bias_range",
    "dropped_share": "router/dropped_share",
    **{f"time_{phase}": f"time/{phase}" for phase in PHASES},
}
LOAD_IMAGE = "router/load_layers_x_experts"


@dataclass(frozen=True)
class RunInfo:
    """What a sink may know of the run it shows."""

    dir: Path
    name: str
    config: dict[str, Any]  # resolved, as plain data
    config_yaml: str
    header: dict[str, str]  # facts in the order to show them, such as "device" or "parameters"
    start_step: int  # 0, or the step of the checkpoint that the run goes on from
    steps: int
    tokens_per_step: int
    moe_layers: list[int]  # the layers that have experts, counted from 0


class Sink(Protocol):
    """A place that rows go to."""

    def write(self, rows: list[dict]) -> None:
        """Take the rows of consecutive steps, none of which it was given before."""

    def close(self, summary: dict | None) -> None:
        """End. `summary` is what summary.json says; None: interrupted."""


def open_sinks(config: LoggingConfig, run: RunInfo) -> list[Sink]:
    """Open what `config` asks for, metrics.jsonl first. Rows past `run.start_step` are forgotten.

    Raises `UserError` where a file cannot be written or Weights & Biases is not set up.
    """
    from training.logging.console import open_console
    from training.logging.jsonl import JSONLSink

    known = ("name", "header", "steps", "tokens_per_step", "moe_layers")
    facts = {name: getattr(run, name) for name in known}
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

            add(WandbSink(run, config.wandb, config.histogram_every))
        add(open_console(run, config.every))
        opened.pop_all()
    return sinks


def write_graph(sinks: list[Sink], model: torch.nn.Module, *inputs: Any) -> None:
    """Draw `model(*inputs)` where a sink can show it. Call it before compiling or sharding the model."""
    for sink in sinks:
        if draw := getattr(sink, "graph", None):
            draw(model, *inputs)


def scalars(row: dict, moe_layers: list[int]) -> dict[str, float]:
    """The row's numbers by the tag that TensorBoard and Weights & Biases group them under."""
    found = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
    by_layer = dict(row.get("router_layers") or {})
    if load := row.get("expert_load"):
        by_layer["max_over_mean"] = [max(load_E) * len(load_E) for load_E in load]
    for figure, values in by_layer.items():
        for layer, value in zip(moe_layers, values, strict=True):
            found[layer_tag(figure, layer)] = value
    return found


def layer_tag(figure: str, layer: int) -> str:
    """Apart from `router/`, so that its few summary figures are not lost among those of every layer."""
    return f"router_layers/{figure}/layer_{layer + 1:02d}"
