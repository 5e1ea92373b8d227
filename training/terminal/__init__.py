"""The only package that prints: it escapes what a terminal would obey, and survives a closed, full or unread stream."""

from training.terminal.libraries import messages_of_libraries
from training.terminal.printable import TEXT, one_line, printable, valid_utf8
from training.terminal.rich_console import redirects, rich_console
from training.terminal.streams import (
    LostOutputError,
    each_note_once,
    is_terminal,
    print_line,
    print_note,
    print_result,
    print_text,
)
from training.terminal.table import aligned_table

__all__ = [
    "TEXT",
    "LostOutputError",
    "aligned_table",
    "each_note_once",
    "is_terminal",
    "messages_of_libraries",
    "one_line",
    "print_line",
    "print_note",
    "print_result",
    "print_text",
    "printable",
    "redirects",
    "rich_console",
    "valid_utf8",
]
