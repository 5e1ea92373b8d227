"""The exceptions a user is meant to see: each one's text is one line that says what to do."""


class UserError(Exception):
    """Wrong input. Commands print `error: <text>` and exit with this status."""

    status = 2


class StartAgain(UserError):
    """What the same command goes on from, as it is: a launcher that starts it again does right."""

    status = 1
