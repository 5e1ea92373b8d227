"""Messages that libraries write themselves: log records, warnings and tracebacks."""

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.terminal.printable import TEXT, one_line
from training.terminal.streams import is_terminal, open_closed_streams, print_note


@contextmanager
def messages_of_libraries() -> Iterator[None]:
    """Open the streams, and print the messages of libraries through this package until the command ends."""
    open_closed_streams()
    if not is_terminal("stderr"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of downloads
    sys.excepthook = _print_traceback  # for good: it is called after the command
    saved = logging.lastResort, logging.getLoggerClass(), threading.excepthook
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        logging.lastResort = _LineHandler(logging.WARNING)
        logging.setLoggerClass(_LibraryLogger)
        threading.excepthook = lambda error: _print_traceback(*error[:3])
        try:
            yield
        finally:
            logging.lastResort, logger_class, threading.excepthook = saved
            logging.setLoggerClass(logger_class)


class _LineHandler(logging.Handler):
    """Prints each record as one line that begins with the library's name."""

    def emit(self, record: logging.LogRecord) -> None:
        print_note(f"{record.name.partition('.')[0]}: {one_line(record.getMessage())}")


class _LibraryLogger(logging.Logger):
    """A logger that replaces a handler for the terminal: huggingface_hub, datasets and transformers add such ones."""

    def addHandler(self, handler: logging.Handler) -> None:
        is_bare = type(handler) is logging.StreamHandler and handler.formatter is None
        super().addHandler(_LineHandler() if is_bare and handler.stream in (sys.stderr, sys.stdout) else handler)


def _print_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print_note(f"{category.__name__}: {one_line(str(message))}")


def _print_traceback(*error: Any) -> None:
    for part in traceback.format_exception(*error):  # the further lines of a message look like lines of ours: indent
        print_note(part.rstrip("\n").replace("\n", "\n    "), keep=TEXT)
