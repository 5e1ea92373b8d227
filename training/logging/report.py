"""report.html: the whole run on one page that opens from disk and needs no network."""

import math
from pathlib import Path
from typing import Any

from training.errors import UserError, library_error
from training.files import write_atomically
from training.logging.charts import metric_charts
from training.logging.format import count, duration_text, layer_name, number
from training.logging.heat_map import draw_layer_map
from training.logging.history import History
from training.logging.metrics import METRICS
from training.logging.phases import PHASES, goodput, phase_shares
from training.logging.python_code import parsed_line
from training.logging.sinks import RunInfo
from training.logging.template import HERE, render_page
from training.terminal import print_note


def write_report(run: RunInfo, history: History, summary: dict | None = None, experts: dict | None = None) -> Path:
    """Write `run.dir / "report.html"` and return its path.

    `summary` and `experts` are the contents of summary.json and experts.json, None before the end of the run. Reads no
    file. Raises UserError if the page cannot be written.
    """
    summary = summary or {}
    newest = history.newest()
    seconds = summary.get("time") or history.phase_seconds()
    evaluations = [history.first_evaluation, history.last_evaluation]
    try:
        page = render_page(
            HERE / "report.html.j2",
            name=run.name,
            summary_sentence=summary_sentence(history, newest, None if summary else run.steps),
            progress=run.batches.tokens(history.last_step) / run.batches.tokens(run.steps)
            if history.spans and not summary
            else None,
            key_figures=key_figures(history, newest | summary),
            charts=metric_charts(history, ("step", "validation", "tasks")),
            routing=routing(history, newest, run.moe_layers),
            layer_maps=layer_maps(history),
            experts=experts,
            evaluations=[
                row | {"parsed": parsed_line(run.config["data"], row["samples"])}
                for i, row in enumerate(evaluations)
                if row and row not in evaluations[:i]
            ],
            phases=PHASES,
            seconds=seconds,
            shares=phase_shares(seconds),
            goodput=goodput(seconds),
            advice=summary.get("advice", ()),
            header=run.header,
            next=summary.get("next", []),
            config=run.config_yaml,
        )
    except Exception as error:  # rows edited by hand can fail in any way
        problem = f"metrics.jsonl is not what a run writes ({library_error(error)})"
        raise UserError(f"{run.dir}: {problem}") from error
    write_atomically(run.dir / "report.html", page)
    return run.dir / "report.html"


def update_report(run: RunInfo, history: History, summary: dict | None = None, experts: dict | None = None) -> None:
    """Write the report; print a warning if that fails, as a run does not stop for its report."""
    try:
        write_report(run, history, summary, experts)
    except UserError as error:
        print_note(f"{error}; the report is not updated")


def summary_sentence(history: History, newest: dict, steps: int | None) -> str:
    """Return the run in two sentences; `steps` is None at its end."""
    if not history.spans:
        return "Waiting for the first step."
    losses = [point[1] for part in history.series("loss") for point in (part.first, part.last)] or [None]
    first, last = number(losses[0], ".2f"), number(losses[-1], ".2f")
    so_far = f" so far, in {history.last_step:,} of {steps:,} steps" if steps else ""
    loss = f"went from {first} to {last}" if history.n_rows > 1 else f"is {last}"
    bits = newest.get("val_bits_per_byte")
    unseen = "" if bits is None else f", and it needs {bits:.2f} bits for a byte of text it has never seen"
    time, tokens = duration_text(newest.get("time_s", 0)), count(newest.get("tokens", 0))
    return f"In {time} this model read {tokens} tokens{so_far}. Its loss {loss}{unseen}."


def key_figures(history: History, known: dict) -> list[tuple[str, str]]:
    """Return the large numbers at the top as (text, label)."""
    if not history.spans:
        return []
    figures = [figure for group in ("validation", "tasks", "step") for figure in _figures(history, known, group)]
    if "parameters" in known:
        figures.append((count(known["parameters"]), "parameters"))
        if known.get("active_parameters") != known["parameters"]:
            figures.append((count(known["active_parameters"]), "active per token"))
    return [*figures, (duration_text(known.get("time_s", 0)), "training")]


def _figures(history: History, known: dict, group: str) -> list[tuple[str, str]]:
    return [
        (metric.figure.format(known[metric.key], known), metric.figure.label)
        for metric in METRICS
        if metric.group == group and metric.figure is not None and known.get(metric.key) is not None
        if not metric.figure.hide_zeros or any(value for _, value in history.points(metric.key))
    ]


def routing(history: History, newest: dict, moe_layers: list[int]) -> dict[str, Any] | None:
    """Return the figures, heat map and charts of the experts; None for a dense run."""
    loads = [row["expert_load"] for row in history.recent if row.get("expert_load")]
    loads = [load for load in loads if all(None not in load_E and math.isfinite(sum(load_E)) for load_E in load)]
    if not loads:
        return None
    names, table = [layer_name(i) for i in moe_layers], load_table(loads)
    return {
        "figures": _figures(history, newest | {"expert_load": loads[-1]}, "router"),
        "layers": [{"name": name, "cells": cells} for name, cells in zip(names, table, strict=True)],
        "n_experts": max(map(len, table)),
        "even": " or ".join(f"{100 / n:.1f} %" for n in sorted({len(cells) for cells in table})),
        "charts": metric_charts(history, ("router",), names),
    }


def layer_maps(history: History) -> list[dict]:
    """Return the heat maps of the figures by layer, as images of a pixel for each layer and inspected step."""
    maps = []
    for metric in METRICS:
        if metric.heat_map is not None and (layers := sorted(map(int, history.names(metric.key)))):
            series = [dict(part.last for part in history.series(f"{metric.key}/{i}")) for i in range(layers[-1] + 1)]
            maps.append({"title": metric.heat_map, "meaning": metric.doc, **draw_layer_map(series)})
    return maps


def load_table(loads: list[list[list[float]]]) -> list[list[dict]]:
    """Return the mean of the loads, a list per MoE layer: each share as text, and per cent over or under even."""
    return [
        [_load_cell(sum(expert) / len(layer), len(layer[0])) for expert in zip(*layer, strict=True)]
        for layer in zip(*loads, strict=True)
    ]


def _load_cell(share: float, n_experts: int) -> dict:
    over = 100 * (share * n_experts - 1)
    return {"text": f"{100 * share:.1f}", "kind": "over" if over > 0 else "under", "by": min(round(abs(over)), 100)}
