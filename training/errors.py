"""Errors that the user can act on, and `@command`, which turns them into one line and an exit status."""

import functools
import os
import sys
import time
from collections.abc import Callable

EXIT_DELAY_S = 5.0  # time for the first local rank to print its error before the launcher ends all ranks


class UserError(Exception):
    """Wrong input. The text says in one line what is wrong and what to do. Commands exit with `status`."""

    status = 2


class RestartNeeded(UserError):
    """A retryable error: running the same command again resumes the run."""

    status = 1


def command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wrap a command's `main(argv)`: print its error as one line on stderr and return the exit status.

    UserError: its `status`; OSError: 2; Ctrl-C: 130.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print("error:", *str(error).split(), file=sys.stderr)
            return error.status
        except OSError as error:
            reason = str(error).split() if error.filename is None else [f"{error.filename}: {error.strerror}"]
            print("error:", *reason, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


def exit_unless_first_local_rank() -> None:
    """Exit with status 2 on all local ranks but the first, so that an error that every rank finds is printed once.

    They exit `EXIT_DELAY_S` later, because a launcher ends all ranks as soon as one of them exits.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(EXIT_DELAY_S)
        raise SystemExit(2)


def library_error(error: BaseException) -> str:
    """Return "Type: first line" of a library's, the hub's or the network's exception: they share no base class."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"
