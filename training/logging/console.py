"""The console, on standard output: a live bar on a terminal, plain aligned lines elsewhere."""

import re
import time
from collections import deque
from typing import Any

from training.config import LoggingConfig
from training.logging.format import clock, count, layer_name, number
from training.logging.metrics import console_fields, expert_load, fields_by_name
from training.logging.phases import as_text
from training.logging.sinks import RunInfo, Sink
from training.terminal import is_terminal, print_line, printable, redirects, rich_console

RECENT_STEPS = 50  # averaged for the ETA
BRIEF_EVERY_S = 10.0
MAX_SAMPLE_LINES, MAX_SAMPLE_CHARS = 24, 1600  # a screen; metrics.jsonl has the whole text
BLANK_LINES = re.compile(r"\n([^\S\n]*\n){3,}")
PATIENCE = 200  # steps until an expert counts as dead, and between two lines about a layer at least


def open_sink(run: RunInfo, config: LoggingConfig) -> Sink:
    """Open the live display if standard output is a terminal that can move its cursor, else plain lines."""
    if config.console == "brief":
        return BriefConsole(run, config.every)
    return (LiveConsole if is_terminal("stdout") else Console)(run, config.every)


class Console(Sink):
    """A header, a line every `every` steps, the evaluations, samples and dead experts, and a closing summary."""

    def __init__(self, run: RunInfo, every: int) -> None:
        self.run, self.every, self.step, self.is_closed = run, every, run.start_step, False
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # tokens and seconds of a step
        self.dead_experts = {layer: DeadExpertWatch(layer) for layer in run.moe_layers}
        self.print_header()

    @property
    def eta(self) -> str:
        """The time left, from the mean speed of the last steps."""
        if not self.recent:
            return "unknown"
        n_tokens, seconds = map(sum, zip(*self.recent, strict=True))
        tokens_left = self.run.batches.tokens(self.run.steps) - self.run.batches.tokens(self.step)
        return clock(tokens_left * seconds / n_tokens)

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            self.step = row["step"]
            if "step_s" in row:
                self.recent.append((self.run.batches.batch_tokens(self.step - 1), row["step_s"]))
            self.print_step(row)
            for layer, load_E in expert_load(row, self.run.moe_layers).items():
                if line := self.dead_experts[layer].update(load_E):
                    self.print_event(row, line, "yellow")
            if fields := console_fields(row, "validation"):
                self.print_event(row, "  ".join(fields), "green")
            if fields := fields_by_name(row, "val loss by source", "val_sets.loss", ".4f"):
                self.print_event(row, "  ".join(fields), "green")
            if fields := fields_by_name(row, "tasks", "tasks.acc", ".3f"):
                self.print_event(row, "  ".join([*fields, *console_fields(row, "tasks")]), "green")
            for sample in row.get("samples") or ():
                self.print_sample(sample)
        self.refresh()

    def close(self, summary: dict | None) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.print_end(summary)

    def refresh(self) -> None:
        """Draw the live part, if there is one."""

    def print_header(self) -> None:
        print_lines(self.run.name, *aligned(self.run.header), "")

    def print_step(self, row: dict) -> None:
        if row["step"] % self.every == 0 or row["step"] == self.run.steps:
            self.print_event(row, "  ".join([*console_fields(row, "step"), f"ETA {self.eta}"]))

    def print_event(self, row: dict, text: str, _color: str = "") -> None:
        print_line(f"step {row['step']:>{len(str(self.run.steps))}}/{self.run.steps}  {text}")

    def print_sample(self, sample: dict) -> None:
        print_lines(*(f"    | {line}".rstrip() for line in sample_text(sample).split("\n")))

    def print_end(self, summary: dict | None) -> None:
        if summary is not None:
            print_lines("", *aligned(closing(summary)), *commands(summary))


class BriefConsole(Console):
    """A line of progress every BRIEF_EVERY_S seconds."""

    def print_header(self) -> None:
        self.printed_at = time.monotonic()

    def print_step(self, row: dict) -> None:
        if time.monotonic() - self.printed_at >= BRIEF_EVERY_S:
            self.printed_at = time.monotonic()
            super().print_event(row, "  ".join([*console_fields(row, "step")[:1], f"ETA {self.eta}"]))

    def print_event(self, row: dict, text: str, _color: str = "") -> None:
        """Print nothing: the report has the evaluations."""

    def print_sample(self, sample: dict) -> None:
        """Print nothing."""

    def print_end(self, summary: dict | None) -> None:
        """Print nothing."""


class LiveConsole(Console):
    """A bar and the newest numbers at the bottom of the terminal; lines that stay are printed above it."""

    def print_header(self) -> None:
        from rich.live import Live

        self.row: dict = {}  # the newest
        self.evaluation: list[str] = []  # its first field, from the newest row that has one
        self.terminal = rich_console()
        self.live = Live(get_renderable=self.render, console=self.terminal, auto_refresh=False, **redirects())
        self.terminal.print(printable(self.run.name), style="bold")
        self._print_table(self.run.header)
        self.terminal.print()
        self.live.start(refresh=True)

    def print_step(self, row: dict) -> None:
        self.row = row
        self.evaluation = console_fields(row, "validation")[:1] or self.evaluation

    def print_event(self, row: dict, text: str, color: str) -> None:
        self.terminal.print(f"step {row['step']}", text, sep="  ", style=color)

    def print_sample(self, sample: dict) -> None:
        from rich.padding import Padding
        from rich.text import Text

        text = Text(sample_text(sample))
        text.stylize("bold", 0, len(sample_text({"prompt": sample["prompt"], "text": ""})))
        self.terminal.print(Padding(text, (0, 0, 0, 4), expand=False))

    def print_end(self, summary: dict | None) -> None:
        self.live.stop()
        if summary is not None:
            self.terminal.print()
            self._print_table(closing(summary))
            for line in commands(summary):
                self.terminal.print(printable(line), style="cyan" if line.startswith(" ") else "", soft_wrap=True)

    def refresh(self) -> None:
        self.live.refresh()

    def render(self) -> Any:
        """Return two lines for a wide terminal; on a narrow one the numbers take as many as they need."""
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None):
            bar.add_column(ratio=ratio)
        bar.add_row(f"step {self.step}/{self.run.steps}", ProgressBar(self.run.steps, self.step), f"ETA {self.eta}")
        if not self.row:
            return Group(bar, Text("waiting for the first step", style="dim"))
        fields = console_fields(self.row, "step")
        fields[1:1] = self.evaluation
        return Group(bar, Columns([Text(" ".join(field.split()), no_wrap=True) for field in fields], padding=(0, 2)))

    def _print_table(self, facts: dict[str, str | list[str]]) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in facts.items():
            table.add_row(label, "\n".join(map(printable, [text] if isinstance(text, str) else text)))
        self.terminal.print(table)


class DeadExpertWatch:
    """A watch over one layer's load. It reports when experts die, when more die, and each time the duration doubled."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.dead_steps_E: list[int] = []  # consecutive steps below the threshold, of this process
        self.reported = (0, 0)  # experts and steps in the last line; (0, 0): all have recovered since
        self.quiet = 0  # steps until another line may come

    def update(self, load_E: list[float]) -> str | None:
        """Return the line to print after a step with this load. The loads of all calls are consecutive."""
        from training.model.metrics import dead_expert_threshold  # imports torch

        threshold = dead_expert_threshold(len(load_E))
        before_E = self.dead_steps_E or [0] * len(load_E)
        self.dead_steps_E = [(n + 1) * (share < threshold) for n, share in zip(before_E, load_E, strict=True)]
        self.quiet = max(self.quiet - 1, 0)
        dead = [n for n in self.dead_steps_E if n >= PATIENCE]
        if not dead:
            self.reported = (0, 0)
            return None
        n_reported, steps_reported = self.reported
        if self.quiet or (len(dead) <= n_reported and min(dead) < 2 * steps_reported):
            return None
        self.reported, self.quiet = (len(dead), min(dead)), PATIENCE
        experts = f"{len(dead)} of {len(load_E)} experts"
        return f"{layer_name(self.layer)}: {experts} received < {100 * threshold:.2g} % of tokens for {min(dead)} steps"


def closing(summary: dict) -> dict[str, str | list[str]]:
    """Return the closing summary of a finished run by label, without what the run did not measure."""
    validation = ""
    if summary["val_loss"] is not None:
        fields = [field.removeprefix("val ") for field in console_fields(summary, "validation")]
        validation = f"{', '.join(fields)}; best {number(summary['best_val_loss'])} at step {summary['best_step']}"
        validation += f" ({summary['best_of']})" if summary["best_of"] else ""
    of_step = "" if summary["model_step"] == summary["steps"] else f", of step {summary['model_step']}"
    tokens, speed = count(summary["tokens"]), count(summary["tokens_per_s"])
    facts = {
        "done": f"{summary['steps']} steps, {tokens} tokens in {clock(summary['time_s'])} ({speed} tokens/s)",
        "training": f"loss {number(summary['train_loss'])}",
        "validation": validation,
        "model": f"{summary['model_dir']}{of_step}",
        "time": as_text(summary["time"]),
        "advice": summary["advice"],
    }
    return {label: text for label, text in facts.items() if text}


def commands(summary: dict) -> list[str]:
    """Return the commands to run next, a line each, under a title."""
    return ["", "next:", *(f"  {command}" for command in summary["next"])] if summary["next"] else []


def aligned(facts: dict[str, str | list[str]]) -> list[str]:
    """Return the facts as lines in two columns, label and text; the further lines of a list stay in its column."""
    width, lines = max(map(len, facts), default=0), []
    for label, text in facts.items():
        first, *others = [text] if isinstance(text, str) else text
        lines += [f"{label:<{width}}  {first}", *(f"{'':<{width}}  {other}" for other in others)]
    return lines


def sample_text(sample: dict) -> str:
    """Return prompt and text as lines that leave the rest of the log on the screen, and say what they leave out."""
    text = sample["prompt"] + sample["text"].rstrip()
    text = printable(text.replace("\r\n", "\n").replace("\t", "    "), "\n")
    text = BLANK_LINES.sub(lambda run: "\n({} blank lines)\n".format(run[0].count("\n") - 1), text)
    shown = "\n".join(text.split("\n")[:MAX_SAMPLE_LINES])[:MAX_SAMPLE_CHARS]
    return shown if shown == text else f"{shown}\n({len(text) - len(shown):,} more characters are in metrics.jsonl)"


def print_lines(*lines: str) -> None:
    for line in lines:
        print_line(line)
