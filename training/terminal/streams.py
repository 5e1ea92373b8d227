"""Standard output and standard error: each call writes one line or text at once, as a terminal may show it.

A stream may be closed (`>&-`), on a full disk, or have no reader (`| head -1`). A run does not stop for that: the
output is dropped. A command whose output is its result must not end as if it had been read: `print_result` and
`print_text` raise.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from training.terminal.printable import TEXT, printable

NAMES = {"stdout": "standard output", "stderr": "standard error"}
lost: dict[str, OSError] = {}  # the streams that no longer work, and why
seen_notes: list[set[str]] = []  # the notes `once` that were printed, for each block of `each_note_once`


class LostOutputError(OSError):
    """The result of a command was not written. Its `filename` is the stream, EPIPE means that the reader has left."""


def print_line(line: str = "") -> None:
    """Print one line about a command's progress on standard output. If that is lost, note it once and go on."""
    was_lost = "stdout" in lost
    write("stdout", printable(line) + "\n")
    if not was_lost and "stdout" in lost and lost["stdout"].errno != errno.EPIPE:
        print_note(f"{NAMES['stdout']}: {lost['stdout'].strerror}; output is dropped from here on")


def print_note(text: str, *, keep: str = "", once: bool = False) -> None:
    """Print one line on standard error: an error, a warning, or progress beside a result. Characters in `keep` stay.

    `once`: not again in a block of `each_note_once`.
    """
    if once and seen_notes:
        if text in seen_notes[-1]:
            return
        seen_notes[-1].add(text)
    write("stderr", printable(text, keep) + "\n")


@contextmanager
def each_note_once() -> Iterator[None]:
    """Print a note `once` in this block: runs of one process have the same notes about their options and text."""
    seen_notes.append(set())
    try:
        yield
    finally:
        seen_notes.pop()


def print_result(line: str) -> None:
    """Print one line of a command's result on standard output. Raises LostOutputError if it cannot be written."""
    print_text(printable(line) + "\n")


def print_text(text: str, *, is_exact: bool = False) -> None:
    """Write a text of several lines, a command's result, to standard output.

    With `is_exact`, a file or a pipe gets the text without escapes. Raises LostOutputError if it cannot be written.
    """
    write("stdout", text if is_exact and not sys.stdout.isatty() else printable(text, TEXT))
    if reason := lost.get("stdout"):
        raise LostOutputError(reason.errno, reason.strerror, NAMES["stdout"])


def is_terminal(name: str) -> bool:
    """Return True if the stream is a terminal that can move its cursor."""
    return getattr(sys, name).isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")


def write(name: str, text: str, stream: TextIO | None = None) -> None:
    """Write to a stream, with escapes for characters that its encoding lacks, and flush it; if that fails, lose it."""
    stream = stream or getattr(sys, name)
    if name in lost:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        lost[name] = error
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python prints an error about it at exit


def open_closed_streams() -> None:
    """Open the null device in place of closed streams, because the next file opened would get their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for descriptor, name in enumerate(NAMES, start=1):
        if getattr(sys, name) is None:
            lost[name] = OSError(errno.EBADF, "closed")
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
