"""Every metric of a run, in one table: `python -m training.logging.metrics` prints it for training/README.md.

A row of metrics.jsonl is a dict of plain data; row k is the state after k updates. A key that a row lacks is left out
everywhere. Layers count from 0 in data and from 1 in what people read.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from training.logging.format import count, number, share
from training.logging.phases import PHASES
from training.terminal import print_text

NAME = "NAME"  # in a tag: stands for the name of a source or task
LOAD_IMAGE = "router/load_layers_x_experts"  # tag of the expert load's heat map


class Chart(NamedTuple):
    """A curve of the report. Metrics whose charts have one title share a chart; the first describes its axes."""

    title: str
    unit: str = ""
    label: str = "training"  # in the legend and under the pointer
    style: str = "noisy"  # noisy: raw and smoothed; val, train, average: as it is, in that color
    spikes: bool = False  # rare outliers may leave the frame, rather than flatten the rest
    zero: bool = False  # the axis starts at 0
    hide_zeros: bool = False  # no chart if every value is 0


class Figure(NamedTuple):
    """A large number of the report."""

    label: str
    text: str | Callable[[Any, dict], str]  # a format, or a function of the value and all values of the newest row
    hide_zeros: bool = False  # no figure if every value is 0

    def format(self, value: Any, row: dict) -> str:
        return number(value, self.text) if isinstance(self.text, str) else self.text(value, row)


class Metric(NamedTuple):
    """A key of a row, and where its value is shown."""

    key: str  # "router_layers.z_loss" stands for row["router_layers"]["z_loss"]
    doc: str  # meaning and unit, for training/README.md
    tag: str | None = None  # in TensorBoard and W&B; None: not a curve there
    # step; validation, tasks: only after these; router: only with experts; layers: every logging.histogram_every steps
    group: str = "step"
    console: Callable[[Any], str] | None = None  # its field in the console, of constant width
    figure: Figure | None = None
    chart: Chart | None = None
    in_summary: bool = False  # summary.json repeats the last value
    # If the value is a list over MoE layers, or in the group "layers" over all layers: an element's number.
    of_layer: Callable[[Any], float | None] | None = None
    heat_map: str | None = None  # title of its heat map in the report, if it is a list over all layers
    of_name: bool = False  # the value is a dict by the name of a source or task; the tag has it for NAME

    def value(self, row: dict) -> Any:
        """Return the row's value, None if the row has none."""
        for name in self.key.split("."):
            row = (row or {}).get(name)
        return row

    def layers(self, row: dict) -> list[float | None]:
        """Return a number for each layer, [] if the row has none."""
        return [None if value is None else self.of_layer(value) for value in self.value(row) or ()]


def busiest(load_E: list[float | None]) -> float | None:
    """Return the busiest expert's load over the mean; None if a load is not finite."""
    return None if None in load_E else max(load_E) * len(load_E)


# fmt: off
METRICS = [
    Metric("step", "updates so far"),
    Metric("loss", "training loss of the global batch, in nats per token", "train/loss",
           console=lambda value: f"loss {number(value)}", figure=Figure("training loss", ".3f"),
           chart=Chart("Loss", "nats per token")),
    Metric("val_loss", "validation loss without auxiliary losses, in nats per token", "val/loss", "validation",
           console=lambda value: f"val loss {number(value)}", figure=Figure("validation loss", ".3f"),
           chart=Chart("Loss", label="validation", style="val"), in_summary=True),
    Metric("val_perplexity", "exp(val_loss)", "val/perplexity", "validation",
           console=lambda value: f"perplexity {number(value, '.2f')}", figure=Figure("perplexity", ".1f"),
           in_summary=True),
    Metric("val_bits_per_byte", "bits per byte of validation text, which do not depend on the tokenizer",
           "val/bits_per_byte", "validation",
           console=lambda value: f"bits/byte {number(value)}", figure=Figure("bits per byte", ".3f"),
           chart=Chart("Compression", "bits per byte of validation text", "validation", "val"), in_summary=True),
    Metric("averaged_val_loss", "`val_loss` of the averaged weights (`optim.average`)", "val/loss_averaged",
           "validation", console=lambda value: f"averaged weights {number(value)}",
           figure=Figure("validation loss, averaged weights", ".3f"),
           chart=Chart("Loss", label="validation, averaged weights", style="average"), in_summary=True),
    Metric("averaged_val_bits_per_byte", "`val_bits_per_byte` of the averaged weights", "val/bits_per_byte_averaged",
           "validation", chart=Chart("Compression", label="averaged weights", style="average"), in_summary=True),
    *(Metric(f"val_sets.{name}", f"`val_{name}` of each source of validation text, if there are several",
             f"val/{NAME}/{name}", "validation", of_name=True, in_summary=True,
             chart=Chart("Validation loss by source", "nats per token") if name == "loss" else None)
      for name in ("loss", "perplexity", "bits_per_byte")),
    Metric("tasks.acc", "share of each task's items whose right answer is the likeliest", f"tasks/{NAME}/acc", "tasks",
           of_name=True, in_summary=True, chart=Chart("Tasks", "accuracy")),
    Metric("tasks.acc_norm", "the same by log-likelihood per character of the answer", f"tasks/{NAME}/acc_norm",
           "tasks", of_name=True, in_summary=True),
    Metric("tasks_mean", "mean over the tasks of their accuracy, centered: 0 for guessing, 1 for all", "tasks/mean",
           "tasks", console=lambda value: f"mean, centered {number(value, '.3f')}", in_summary=True,
           figure=Figure("mean of the tasks, centered", ".3f")),
    Metric("samples", "after an evaluation: a list of `prompt` and the `text` that continues it", group="validation"),
    Metric("learning_rate", "learning rate of the update", "train/learning_rate",
           console=lambda value: f"lr {number(value, '.2e')}",
           chart=Chart("Learning rate", label="learning rate", style="train", zero=True)),
    Metric("grad_norm", "global norm of the gradient before clipping", "train/grad_norm",
           console=lambda value: f"grad {number(value, '.2f')}",
           chart=Chart("Gradient norm", "before clipping", spikes=True, zero=True)),
    Metric("skipped_steps", "updates skipped so far, because the loss or gradient was NaN/Inf or spiked "
           "([docs/reliability.md](../docs/reliability.md))", "train/skipped_steps"),
    Metric("tokens", "tokens read so far", "train/tokens", figure=Figure("tokens read", lambda value, _: count(value))),
    Metric("tokens_per_s", "tokens per second, all ranks together", "speed/tokens_per_s",
           console=lambda value: f"{count(value):>6} tokens/s",
           figure=Figure("tokens per second", lambda value, _: count(value)),
           chart=Chart("Throughput", "tokens per second", zero=True)),
    Metric("mfu", "model FLOPs utilization: FLOPs of the active parameters over the device's peak; null if the peak "
           "is unknown", "speed/mfu", console=lambda value: f"MFU {share(value):>7}"),
    Metric("memory_gib", "peak memory of the main rank, in GiB", "memory/gib",
           console=lambda value: f"{number(value, '5.1f')} GiB"),
    Metric("step_s", "seconds per step, the mean over the rows that were fetched together", "speed/step_s"),
    Metric("time_s", "seconds of training over all restarts, without evaluations and saves"),
    *(Metric(f"time_{phase}", f"seconds per step of this phase: {meaning}", f"time/{phase}")
      for phase, meaning in PHASES.items()),
    Metric("expert_load", "for each MoE layer, each expert's share of the assignments; the tag has the largest share "
           f"over the mean; also a heat map `{LOAD_IMAGE}` and, in TensorBoard, histograms",
           "router_layers/max_over_mean", "router", of_layer=busiest,
           chart=Chart("Busiest expert", "its load over the mean, in each MoE layer", spikes=True)),
    Metric("expert_load_max", "load of the busiest expert over the mean load, in the worst layer",
           "router/expert_load_max", "router", in_summary=True,
           figure=Figure("busiest expert's load over the mean",
                         lambda value, _: f"{number(value, '.2f')} \N{MULTIPLICATION SIGN}")),
    Metric("router_layers.confidence", "`router_confidence` of each MoE layer", "router_layers/confidence", "router",
           of_layer=float, chart=Chart("Router confidence", "a token's largest score as a share of all its scores")),
    Metric("expert_entropy", "entropy of the expert load over that of an even load, 1: even; in the worst layer",
           "router/expert_entropy", "router", in_summary=True, figure=Figure("entropy of the load (1: even)", ".3f"),
           chart=Chart("Evenness", "entropy of the load, 1: even, in the worst MoE layer")),
    Metric("dead_experts", "experts with less than 1 % of their layer's assignments, or than a tenth of an even share "
           "if that is less", "router/dead_experts", "router", in_summary=True,
           figure=Figure("dead experts", lambda value, row: f"{value} of {sum(map(len, row['expert_load']))}"),
           chart=Chart("Dead experts", "in all MoE layers", zero=True, hide_zeros=True)),
    Metric("router_confidence", "a token's largest score as a share of all its scores, mean over tokens and layers",
           "router/confidence", "router",
           figure=Figure("largest score's share of a token's scores", lambda value, _: share(value))),
    Metric("router_bias_range", "largest minus smallest selection bias, in the worst layer", "router/bias_range",
           "router", figure=Figure("range of the selection bias", ".3f", hide_zeros=True),
           chart=Chart("Selection bias", "largest minus smallest, in the worst MoE layer", zero=True, hide_zeros=True)),
    Metric("dropped_share", "share of the assignments beyond the experts' capacity; 0 without `capacity_factor`",
           "router/dropped_share", "router",
           figure=Figure("share of assignments dropped", lambda value, _: share(value), hide_zeros=True),
           chart=Chart("Dropped", "share of the assignments to experts", zero=True, hide_zeros=True)),
    Metric("router_z_loss", "logsumexp(logits)^2, mean over tokens and layers", "router/z_loss", "router",
           chart=Chart("Router z-loss", "mean over the MoE layers", spikes=True, zero=True)),
    *(Metric(f"router_layers.{figure}", f"`{key}` of each MoE layer", f"router_layers/{figure}", "router",
             of_layer=float)
      for figure, key in {"entropy": "expert_entropy", "z_loss": "router_z_loss", "bias_range": "router_bias_range",
                          "dropped": "dropped_share"}.items()),
    Metric("learning_rates", "learning rate of each group of parameters, named by their kinds; this and the next four "
           "every `logging.histogram_every` steps", f"train/learning_rate/{NAME}", "layers", of_name=True),
    *(Metric(f"layers.{name}", doc, f"layers/{name}", "layers", of_layer=float, heat_map=title)
      for name, title, doc in (
          ("grad_norm", "Gradient norm", "norm of each layer's gradient, before clipping"),
          ("weight_norm", "Weight norm", "norm of each layer's weights, before the update"),
          ("update_ratio", "Update / weights", "norm of each layer's update over that of its weights; left out if "
           "there is no memory for a copy of the weights"),
          ("residual_rms", "Residual stream", "root mean square of the residual stream after each layer"))),
]
# fmt: on


def scalars(row: dict, moe_layers: Sequence[int]) -> dict[str, float]:
    """Return the row's numbers by their tag in TensorBoard and W&B."""
    values = {}
    for metric in METRICS:
        if metric.of_layer is not None:
            by_layer = metric.layers(row)
            layers = range(len(by_layer)) if metric.group == "layers" else moe_layers
            for layer, value in zip(layers, by_layer, strict=bool(by_layer)):
                if value is not None:
                    values[layer_tag(metric.tag, layer)] = value
        elif metric.of_name:
            values |= {metric.tag.replace(NAME, name): value for name, value in by_name(metric, row).items()}
        elif metric.tag is not None and (value := metric.value(row)) is not None:
            values[metric.tag] = value
    return values


def by_name(metric: Metric, row: dict) -> dict[str, float]:
    """Return the number of each source or task, {} if the row has none. Raises ValueError for other values."""
    values = metric.value(row) or {}
    if any(type(value) not in (int, float, type(None)) for value in values.values()):
        raise ValueError(f"{metric.key} is {values!r}")
    return {name: value for name, value in values.items() if value is not None}


def layer_tag(tag: str, layer: int) -> str:
    """Return the tag of one layer's figure."""
    return f"{tag}/layer_{layer + 1:02d}"


def expert_load(row: dict, moe_layers: Sequence[int]) -> dict[int, list[float]]:
    """Return each expert's share of the assignments by the MoE layer's index; {} for a dense model."""
    load_LE = row.get("expert_load") or ()
    return dict(zip(moe_layers, load_LE, strict=bool(load_LE)))


def console_fields(row: dict, *groups: str) -> list[str]:
    """Return the console's fields of these groups for the keys that the row has."""
    shown = (metric for metric in METRICS if metric.console is not None and metric.group in groups)
    return [metric.console(row[metric.key]) for metric in shown if metric.key in row]


def fields_by_name(row: dict, label: str, key: str, spec: str) -> list[str]:
    """Return the console's fields for a figure of each source or task, after a label; [] if the row has none."""
    first, _, second = key.partition(".")
    values = (row.get(first) or {}).get(second, {})
    return values and [label, *(f"{name} {number(value, spec)}" for name, value in values.items())]


def summary_values(row: dict) -> dict[str, Any]:
    """Return the metrics of the last row that summary.json repeats."""
    keys = dict.fromkeys(metric.key.partition(".")[0] for metric in METRICS if metric.in_summary)
    return {key: row[key] for key in keys if key in row}


def readme_table() -> str:
    """Return the table of all metrics for training/README.md, in Markdown."""
    lines = ["| in a row of `metrics.jsonl` | in TensorBoard and W&B | meaning |", "|---|---|---|"]
    for metric in METRICS:
        per_layer = "/layer_01 ..." if metric.of_layer is not None else ""
        lines.append(f"| `{metric.key}` | {f'`{metric.tag}{per_layer}`' if metric.tag else ''} | {metric.doc} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_text(readme_table())
