"""The one exception a user is meant to cause: its text is one line that says what to do."""


class UserError(Exception):
    """Wrong input. Commands print `error: <text>` and exit with status 2."""
