"""The exceptions a user is meant to see: each one's text is one line that says what to do."""

from __future__ import annotations

import os
import time

EXIT_DELAY_S = 5.0


class UserError(Exception):
    """Wrong input. Commands print `error: <text>` and exit with this status."""

    status = 2


class RestartNeeded(UserError):
    """What the same command goes on from, as it is: a launcher that starts it again does right."""

    status = 1


def exit_unless_first_local_rank() -> None:
    """End this process with status 2, unless it is its host's first: all find the same wrong, and that one says so.

    The others end later, as a launcher ends all processes with the first that ends.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(EXIT_DELAY_S)
        raise SystemExit(2)


def one_line(error: UserError | OSError) -> str:
    """What is said of it: of the system's refusals, to which file, and why."""
    if isinstance(error, UserError) or error.filename is None:
        return " ".join(str(error).split())
    return f"{error.filename}: {error.strerror}"


def library_error(error: BaseException) -> str:
    """Return "Type: first line" of an exception of a library, a hub or the network, which have no common class."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"
