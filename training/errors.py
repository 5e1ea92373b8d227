"""The exceptions a user is meant to see: each one's text is one line that says what to do."""


class UserError(Exception):
    """Wrong input. Commands print `error: <text>` and exit with this status."""

    status = 2


class StartAgain(UserError):
    """What the same command goes on from, as it is: a launcher that starts it again does right."""

    status = 1


def in_a_line(error: UserError | OSError) -> str:
    """What is said of it: of the system's refusals, to which file, and why."""
    if isinstance(error, UserError) or error.filename is None:
        return " ".join(str(error).split())
    return f"{error.filename}: {error.strerror}"
