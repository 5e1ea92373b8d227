"""Errors that the user can act on, and `@command`, which turns them into one line and an exit status."""

import functools
import os
import sys
import time
from collections.abc import Callable

EXIT_DELAY_S = 5.0  # a launcher ends all ranks as soon as one exits; the first needs time to print its error


class UserError(Exception):
    """Wrong input. Its one-line message names the error and the remedy. Commands exit with `status`."""

    status = 2


class RestartNeeded(UserError):
    """A retryable error: running the same command again resumes the run."""

    status = 1


def command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wrap a command's `main(argv)`: print its error as one line on stderr and return the exit status."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except (UserError, OSError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, OSError) and error.filename is not None:
                reason = f"{error.filename}: {error.strerror}"
            print(f"error: {reason}", file=sys.stderr)
            return getattr(error, "status", 2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
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
