"""report.html: the whole run on one page that opens from disk and needs no network."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.errors import UserError
from training.files import write_atomically
from training.logging import moe_report as experts
from training.logging import phases as times
from training.logging.charts import Curve, chart, noisy, points
from training.logging.format import count, number, printable, spoken
from training.logging.jsonl import read_rows


def write_report(run_dir: Path) -> Path:
    """Write `run_dir / "report.html"` from what the folder holds of the run, finished or not; return its path.

    Reads metrics.jsonl, summary.json, run.json, experts.json and config.yaml, each of which may be absent.
    Raises `UserError` where one cannot be read, is not what a run writes, or the page cannot be written.
    """
    try:
        page = _page(run_dir)
    except UserError:
        raise
    except Exception as error:  # whatever was made of these files by hand
        raise UserError(f"{run_dir}: its files are not what a run writes ({type(error).__name__}: {error})") from error
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def update_report(run_dir: Path) -> None:
    """Write the report; where that fails say so, as a run does not end for its report."""
    try:
        write_report(run_dir)
    except UserError as error:
        print(f"{error}; the report is not renewed", file=sys.stderr)


def _page(run_dir: Path) -> str:
    rows, summary = read_rows(run_dir / "metrics.jsonl"), _json(run_dir / "summary.json")
    facts = _json(run_dir / "run.json")
    return _template().render(
        name=facts.get("name", run_dir.resolve().name),
        lede=lede(rows, summary, facts.get("steps")),
        done=rows[-1]["step"] / facts["steps"] if rows and facts and not summary else None,
        headlines=headlines(rows, summary),
        charts=[found for found in charts(rows) if found],
        routing=experts.routing(rows, facts.get("moe_layers")),
        liked=experts.liked(_json(run_dir / "experts.json")),
        samples=samples(rows),
        time=times.bar(summary.get("time") or times.phase_seconds(rows)),
        advice=[line.partition(": ") for line in summary.get("advice", ())],
        header=facts.get("header", {}),
        next=summary.get("next", []),
        config=_text(run_dir / "config.yaml"),
    )


def lede(rows: list[dict], summary: dict, steps: int | None) -> str:
    """The run in two sentences."""
    if not rows:
        return "The first step is on its way."
    last = rows[-1]
    read_ = f"this model read {count(last['tokens'])} tokens"
    if not summary and steps:
        read_ += f" so far, in {last['step']:,} of {steps:,} steps"
    text = f"In {spoken(last['time_s'])} {read_}. "
    if len(rows) > 1:
        text += f"Its loss went from {number(rows[0]['loss'], '.2f')} to {number(last['loss'], '.2f')}"
    else:
        text += f"Its loss is {number(last['loss'], '.2f')}"
    bits = [value for _, value in points(rows, "val_bits_per_byte")]
    return text + (f", and it needs {bits[-1]:.2f} bits for a byte of text it has never seen." if bits else ".")


def headlines(rows: list[dict], summary: dict) -> list[tuple[str, str]]:
    """The large numbers: (text, what it is)."""
    if not rows:
        return []
    known = {
        key: values[-1][1] for key in {key for row in rows for key in row} if (values := points(rows, key))
    } | summary
    said = {
        "val_loss": ("validation loss", ".3f"),
        "val_perplexity": ("perplexity", ".1f"),
        "val_bits_per_byte": ("bits per byte", ".3f"),
        "loss": ("training loss", ".3f"),
    }
    found = [(number(known[key], spec), label) for key, (label, spec) in said.items() if known.get(key) is not None]
    for key, label in (("tokens", "tokens read"), ("tokens_per_s", "tokens per second"), ("parameters", "parameters")):
        if key in known:
            found.append((count(known[key]), label))
    if known.get("active_parameters") != known.get("parameters"):
        found.append((count(known["active_parameters"]), "active per token"))
    return [*found, (spoken(known["time_s"]), "training")]


def charts(rows: list[dict]) -> list[dict | None]:
    """The charts of learning, the loss first; None for those that the run has no numbers for."""
    last = rows[-1]["step"] if rows else 1
    validation = Curve("validation", "val", points(rows, "val_loss"))
    bits = Curve("validation", "val", points(rows, "val_bits_per_byte"))
    rate = Curve("learning rate", "train", points(rows, "learning_rate"))
    return [
        chart("Loss", "nats per token", last, [*noisy(rows, "loss"), validation]),
        chart("Compression", "bits per byte of validation text", last, [bits]),
        chart("Learning rate", "", last, [rate], zero=True),
        chart("Gradient norm", "before clipping", last, noisy(rows, "grad_norm"), spikes=True, zero=True),
        chart("Throughput", "tokens per second", last, noisy(rows, "tokens_per_s"), zero=True),
    ]


def samples(rows: list[dict]) -> list[dict]:
    """What the model wrote at its first evaluation and at its last."""
    told = [row for row in rows if row.get("samples")]
    titles = ["First words", "Last words"] if len(told) > 1 else ["First words"]
    return [
        {
            "title": f"{title}, step {row['step']:,}",
            "texts": [
                {"prompt": printable(sample["prompt"]), "text": printable(sample["text"])} for sample in row["samples"]
            ],
        }
        for title, row in zip(titles, (told[0], told[-1]) if told else (), strict=False)
    ]


@cache
def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")


def _json(path: Path) -> dict:
    try:
        return json.loads(_text(path) or "{}")
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it to go on") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
