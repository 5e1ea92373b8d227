"""Every command prints its error as one line and returns the exit status, whatever happens in it."""

import importlib

import pytest

from training.errors import RestartNeeded, UserError
from training.options import cli

COMMANDS = ["train", "prepare", "evaluate", "generate", "export", "plan", "twin", "checkpoints"]
COMMANDS += ["compare.__main__", "runs.__main__"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "runs/small"), 2, "error: runs/small: No space left on device"),
        (UserError("--run: two\nlines"), 2, r"error: --run: two\nlines"),
        (RestartNeeded("out of memory"), 1, "error: out of memory"),
    ],
    ids=["Ctrl-C", "OSError", "UserError", "RestartNeeded"],
)
def test_every_command_ends_with_one_line_and_an_exit_status(monkeypatch, capsys, name, error, status, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "parse_command_line", fail)
    monkeypatch.setattr(cli.Parser, "parse_args", fail)
    monkeypatch.setattr(cli.Parser, "parse_known_args", fail)
    arguments = ["a.yaml"] if name.startswith("compare") else []
    assert importlib.import_module(f"training.{name}").main(arguments) == status
    assert capsys.readouterr().err == line + "\n"
