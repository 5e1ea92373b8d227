"""The console: a live bar on a terminal, plain aligned lines elsewhere; on standard output."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from training.logging.dead_experts import DeadExpertWatch
from training.logging.format import clock, count, number, printable, share
from training.logging.phases import as_text
from training.logging.sinks import RunInfo, Sink

if TYPE_CHECKING:
    from rich.console import Group

RECENT_STEPS = 50  # what the ETA goes by


def open_console(run: RunInfo, every: int) -> Sink:
    """The live display where standard output is a terminal that can move its cursor; else plain lines."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal's encoding does not
    live = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")
    return LiveConsole(run) if live else PlainConsole(run, every)


class PlainConsole:
    """A header, a line every `every` steps, a line and the samples an evaluation, a closing summary; and a line
    where experts starve."""

    def __init__(self, run: RunInfo, every: int) -> None:
        self.run, self.every, self.eta, self.starvation = run, every, ETA(run.steps), DeadExpertWatch(run.moe_layers)
        with unread_output_dropped():
            print(run.name, *aligned(run.header), "", sep="\n", flush=True)

    def write(self, rows: list[dict]) -> None:
        width = len(str(self.run.steps))
        with unread_output_dropped():
            for row in rows:
                self.eta.update(row)
                step = f"step {row['step']:>{width}}/{self.run.steps}"
                if row["step"] % self.every == 0 or row["step"] == self.run.steps:
                    print(step, *progress(row), f"ETA {self.eta}", sep="  ")
                for line in self.starvation.update(row):
                    print(step, line, sep="  ")
                if "val_loss" in row:
                    print(step, *evaluation(row), sep="  ")
                for sample in row.get("samples") or ():
                    print(*(f"    | {line}".rstrip() for line in continuation(sample).split("\n")), sep="\n")
            sys.stdout.flush()

    def close(self, summary: dict | None) -> None:
        if summary is not None:
            with unread_output_dropped():
                print("", *aligned(closing(summary)), *commands(summary), sep="\n", flush=True)


class LiveConsole:
    """A bar and the newest numbers at the bottom of the terminal; what stays is printed above it."""

    def __init__(self, run: RunInfo) -> None:
        from rich.console import Console
        from rich.live import Live

        self.run, self.eta, self.row, self.val_loss = run, ETA(run.steps), None, None
        self.starvation = DeadExpertWatch(run.moe_layers)
        self.console = Console(highlight=False, emoji=False, markup=False)
        self.live = Live(get_renderable=self.render, console=self.console, auto_refresh=False)
        with unread_output_dropped():
            self.console.print(run.name, style="bold")
            self._print_facts(run.header)
            self.console.print()
            self.live.start(refresh=True)

    def write(self, rows: list[dict]) -> None:
        with unread_output_dropped():
            for row in rows:
                self.eta.update(row)
                self.row = row
                for line in self.starvation.update(row):
                    self.console.print(f"step {row['step']}", line, sep="  ", style="yellow")
                if "val_loss" in row:
                    self.val_loss = row["val_loss"]
                    self.console.print(f"step {row['step']}", "  ".join(evaluation(row)), sep="  ", style="green")
                for sample in row.get("samples") or ():
                    self._print_sample(sample)
            self.live.refresh()

    def close(self, summary: dict | None) -> None:
        with unread_output_dropped():
            self.live.stop()
            if summary is not None:
                self.console.print()
                self._print_facts(closing(summary))
                for line in commands(summary):
                    self.console.print(line, style="cyan" if line.startswith(" ") else "", soft_wrap=True)

    def render(self) -> Group:
        """Two rows on a wide terminal; on a narrow one the numbers take as many as they need."""
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.row["step"] if self.row else self.run.start_step
        bar = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(f"step {step}/{self.run.steps}", ProgressBar(self.run.steps, step), f"ETA {self.eta}")
        if self.row is None:
            return Group(bar, Text("the first step is on its way", style="dim"))
        fields = progress(self.row)
        if self.val_loss is not None:
            fields.insert(1, f"val loss {number(self.val_loss)}")
        return Group(bar, Columns([Text(" ".join(field.split()), no_wrap=True) for field in fields], padding=(0, 2)))

    def _print_facts(self, facts: dict[str, str]) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        for label, text in facts.items():
            table.add_row(label, text)
        self.console.print(table)

    def _print_sample(self, sample: dict) -> None:
        from rich.padding import Padding
        from rich.text import Text

        prompt = printable(sample["prompt"])
        text = Text.assemble((prompt, "bold"), continuation(sample).removeprefix(prompt))
        self.console.print(Padding(text, (0, 0, 0, 4), expand=False))


class ETA:
    """The time left, from the mean duration of the last steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step, self.recent = steps, 0, deque(maxlen=RECENT_STEPS)

    def update(self, row: dict) -> None:
        self.step = row["step"]
        self.recent.append(row["step_s"])

    def __str__(self) -> str:
        if not self.recent:
            return "unknown"
        return clock((self.steps - self.step) * sum(self.recent) / len(self.recent))


def progress(row: dict) -> list[str]:
    """The fields of a step, each of a steady width."""
    return [
        f"loss {number(row['loss'])}",
        f"lr {row['learning_rate']:.2e}",
        f"grad {number(row['grad_norm'], '.2f')}",
        f"{count(row['tokens_per_s']):>6} tokens/s",
        f"MFU {share(row['mfu']):>7}",
        f"{row['memory_gib']:5.1f} GiB",
    ]


def evaluation(row: dict) -> list[str]:
    """The fields of an evaluation."""
    return [
        f"val loss {number(row['val_loss'])}",
        f"perplexity {number(row['val_perplexity'], '.2f')}",
        f"bits/byte {number(row['val_bits_per_byte'])}",
    ]


def closing(summary: dict) -> dict[str, str]:
    """The run in a few facts, without those that a run did not measure."""
    validation = f"loss {number(summary['val_loss'])}, " if summary["val_loss"] is not None else ""
    if validation:
        validation += f"perplexity {number(summary['val_perplexity'], '.2f')}, "
        validation += f"{number(summary['val_bits_per_byte'])} bits/byte; "
        validation += f"best {number(summary['best_val_loss'])} at step {summary['best_step']}"
    facts = {
        "done": f"{summary['steps']} steps, {count(summary['tokens'])} tokens in {clock(summary['time_s'])}"
        f" ({count(summary['tokens_per_s'])} tokens/s)",
        "training": f"loss {number(summary['train_loss'])}",
        "validation": validation,
        "model": summary["model_dir"],
        "time": as_text(summary["time"]),
        "advice": "\n".join(summary["advice"]),
    }
    return {label: text for label, text in facts.items() if text}


def commands(summary: dict) -> list[str]:
    """What to type next, a line each, under a title."""
    return ["", "next:", *(f"  {command}" for command in summary["next"])] if summary["next"] else []


def aligned(facts: dict[str, str]) -> list[str]:
    """A fact a line, the texts and their further lines below each other."""
    width = max(map(len, facts), default=0)
    below = "\n" + " " * (width + 2)
    return [f"{label:<{width}}  {text}".replace("\n", below) for label, text in facts.items()]


def continuation(sample: dict) -> str:
    """A prompt and how the model went on."""
    return printable(sample["prompt"] + sample["text"].rstrip())


@contextmanager
def unread_output_dropped() -> Iterator[None]:
    """Training goes on where the reader of standard output has gone: metrics.jsonl has every row."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
