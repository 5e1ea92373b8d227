"""The console of `rich`, for tables and live bars."""

import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from training.terminal.printable import printable
from training.terminal.streams import write

if TYPE_CHECKING:
    from rich.console import Console


def rich_console(name: str = "stdout") -> "Console":
    """Return a console on a stream. It shows text as it is: without markup, links or emoji codes."""
    return _console_class()(file=_File(name), highlight=False, emoji=False, markup=False)


def redirects() -> dict[str, bool]:
    """Return the arguments of a live bar: what other code prints appears above it, unless it goes to a file."""
    return {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": sys.stderr.isatty()}


class _File:
    """A stream as the file of a console. It survives the loss of the terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.stream = name, getattr(sys, name)

    def write(self, text: str) -> None:
        write(self.name, text, self.stream)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.stream, attribute)


@cache
def _console_class() -> type["Console"]:
    from rich.console import Console
    from rich.segment import Segment

    class PrintableConsole(Console):
        """A console that escapes control characters in every text, whichever way it came."""

        def render(self, *arguments: Any) -> Iterable[Segment]:
            for text, style, control in super().render(*arguments):
                yield Segment(text if control else printable(text, "\n"), style, control)

    return PrintableConsole
