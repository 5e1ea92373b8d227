"""Errors that the user can act on, and `@command`, which turns them into one line and an exit status."""

import errno
import functools
import os
import time
from collections.abc import Callable

from training.terminal import LostOutputError, messages_of_libraries, one_line, print_note

BROKEN_PIPE = 141  # 128 + SIGPIPE, as for other programs whose reader has left
EXIT_DELAY_S = 5.0  # a launcher ends all ranks as soon as one exits; the first needs time to print its error


class UserError(Exception):
    """Wrong input. Its one-line message names the error and the remedy. Commands exit with `status`."""

    status = 2


class RestartNeeded(UserError):
    """A retryable error: running the same command again resumes the run."""

    status = 1


def command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wrap a command's `main(argv)`: print its errors, a line each, on standard error and return the exit status."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        with messages_of_libraries():
            try:
                return main(argv)
            except UserError as error:
                for line in getattr(error, "lines", [str(error)]):
                    print_note(f"error: {line}")
                return error.status
            except OSError as error:
                if isinstance(error, LostOutputError) and error.errno == errno.EPIPE:
                    return BROKEN_PIPE
                is_named = error.filename is not None
                print_note(f"error: {f'{error.filename}: {error.strerror}' if is_named else one_line(str(error))}")
                return 2
            except KeyboardInterrupt:
                print_note("interrupted")
                return 130

    return wrapper


def exit_unless_first_local_rank() -> None:
    """Exit with status 2 on all local ranks but the first, so that an error that every rank finds is printed once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(EXIT_DELAY_S)
        raise SystemExit(2)


def library_error(error: BaseException) -> str:
    """Return "Type: first line" of a library's, the hub's or the network's exception: they share no base class."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"
