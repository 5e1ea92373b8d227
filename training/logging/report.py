"""report.html: the whole run on one page that opens from disk and needs no network."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.errors import UserError
from training.files import write_atomically
from training.logging.charts import metric_charts, points
from training.logging.format import count, duration_text, layer_name, number, token_text
from training.logging.jsonl import read_rows, read_text
from training.logging.metrics import METRICS
from training.logging.phases import PHASES, goodput, phase_seconds, phase_shares
from training.terminal import TEXT, print_note, printable

RECENT_STEPS = 50  # averaged for the expert load at the end


def write_report(run_dir: Path) -> Path:
    """Write `run_dir / "report.html"` from the files of a run, each of which may be missing, and return its path.

    Raises UserError if one cannot be read or was not written by a run, or if the page cannot be written.
    """
    try:
        rows = read_rows(run_dir / "metrics.jsonl")
        summary, run, experts = (_read_json(run_dir / f"{name}.json") for name in ("summary", "run", "experts"))
        newest = {key: value for row in rows for key, value in row.items() if value is not None}
        seconds = summary.get("time") or phase_seconds(rows)
        evaluations = [row for row in rows if row.get("samples")]
        page = _template().render(
            name=run.get("name", run_dir.resolve().name),
            summary_sentence=summary_sentence(rows, summary, run.get("steps")),
            progress=rows[-1]["step"] / run["steps"] if rows and run and not summary else None,
            key_figures=key_figures(rows, newest | summary),
            charts=metric_charts(rows, ("step", "validation")),
            routing=routing(rows, newest, run.get("moe_layers")),
            experts=experts,
            evaluations=evaluations[:1] + evaluations[1:][-1:],
            phases=PHASES,
            seconds=seconds,
            shares=phase_shares(seconds),
            goodput=goodput(seconds),
            advice=summary.get("advice", ()),
            header=run.get("header", {}),
            next=summary.get("next", []),
            config=read_text(run_dir / "config.yaml"),
        )
    except UserError:
        raise
    except Exception as error:  # files edited by hand can fail in any way
        raise UserError(f"{run_dir}: its files are not what a run writes ({type(error).__name__}: {error})") from error
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def update_report(run_dir: Path) -> None:
    """Write the report; print a warning if that fails, as a run does not stop for its report."""
    try:
        write_report(run_dir)
    except UserError as error:
        print_note(f"{error}; the report is not updated")


def summary_sentence(rows: list[dict], summary: dict, steps: int | None) -> str:
    """Return the run in two sentences."""
    if not rows:
        return "Waiting for the first step."
    last = rows[-1]
    first_loss, last_loss = (number(row.get("loss"), ".2f") for row in (rows[0], last))
    so_far = f" so far, in {last['step']:,} of {steps:,} steps" if steps and not summary else ""
    loss = f"went from {first_loss} to {last_loss}" if len(rows) > 1 else f"is {last_loss}"
    bits = [value for _, value in points(rows, "val_bits_per_byte")]
    unseen = f", and it needs {bits[-1]:.2f} bits for a byte of text it has never seen" if bits else ""
    time, tokens = duration_text(last.get("time_s", 0)), count(last.get("tokens", 0))
    return f"In {time} this model read {tokens} tokens{so_far}. Its loss {loss}{unseen}."


def key_figures(rows: list[dict], known: dict) -> list[tuple[str, str]]:
    """Return the large numbers at the top as (text, label)."""
    if not rows:
        return []
    figures = [*_figures(rows, known, "validation"), *_figures(rows, known, "step")]
    if "parameters" in known:
        figures.append((count(known["parameters"]), "parameters"))
        if known.get("active_parameters") != known["parameters"]:
            figures.append((count(known["active_parameters"]), "active per token"))
    return [*figures, (duration_text(known.get("time_s", 0)), "training")]


def _figures(rows: list[dict], known: dict, group: str) -> list[tuple[str, str]]:
    return [
        (metric.figure.format(known[metric.key], known), metric.figure.label)
        for metric in METRICS
        if metric.group == group and metric.figure is not None and known.get(metric.key) is not None
        if not metric.figure.hide_zeros or any(value for _, value in points(rows, metric.key))
    ]


def routing(rows: list[dict], newest: dict, moe_layers: list[int] | None) -> dict[str, Any] | None:
    """Return the figures, heat map and charts of the experts; None for a dense run."""
    table = load_table(rows)
    if not table:
        return None
    # A folder without run.json does not have the places of MoE layers in the network.
    names = [layer_name(i) for i in moe_layers] if moe_layers else [f"MoE layer {i + 1}" for i in range(len(table))]
    return {
        "figures": _figures(rows, newest, "router"),
        "layers": [{"name": name, "cells": cells} for name, cells in zip(names, table, strict=True)],
        "n_experts": max(map(len, table)),
        "even": " or ".join(f"{100 / n:.1f} %" for n in sorted({len(cells) for cells in table})),
        "charts": metric_charts(rows, ("router",), names),
    }


def load_table(rows: list[dict]) -> list[list[dict]]:
    """Return the expert load at the end, a list per MoE layer: each share as text, and per cent over or under even."""
    loads = [row["expert_load"] for row in rows[-RECENT_STEPS:] if row.get("expert_load")]
    return [
        [_load_cell(sum(expert) / len(layer), len(layer[0])) for expert in zip(*layer, strict=True)]
        for layer in zip(*loads, strict=True)
    ]


def _load_cell(share: float, n_experts: int) -> dict:
    over = 100 * (share * n_experts - 1)
    return {"text": f"{100 * share:.1f}", "kind": "over" if over > 0 else "under", "by": min(round(abs(over)), 100)}


@cache
def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=lambda value: printable(value, TEXT) if type(value) is str else value,  # a bidi override moves text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (duration_text, layer_name, token_text)}
    return environment.get_template("report.html.j2")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(read_text(path) or "{}")
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it and start again") from error
