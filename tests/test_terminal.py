"""What reaches the terminal: nothing that it obeys, no forged line, and no traceback if it is closed or full."""

import ast
import importlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, write_config
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_payloads import dotted, imports, replace_file

from training import generate
from training.logging.console import MAX_SAMPLE_CHARS, MAX_SAMPLE_LINES, sample_text
from training.terminal import TEXT, messages_of_libraries, one_line, printable, rich_console, streams
from training.train import train

HOSTILE = "a\x1b[2J\x1b]0;title\x07\nerror: forged\r\x9b31m\u202e[red]x[/]"
SHOWN = r"a\x1b[2J\x1b]0;title\x07\nerror: forged\r\x9b31m\u202e[red]x[/]"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def assert_harmless(text: str) -> None:
    assert not OBEYED.search(text), text
    assert not any(line.startswith("error: forged") for line in text.splitlines()), text


# --- text ------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=())))
@example(HOSTILE + "\ud800\U000e0041\x00")
def test_printable_text_is_one_line_that_no_terminal_obeys(text):
    shown = printable(text)
    assert_harmless(shown)
    assert "\n" not in shown and "\t" not in shown and printable(shown) == shown
    assert not OBEYED.search(printable(text, TEXT)) and printable(text, TEXT).count("\n") == text.count("\n")


def test_printable_text_keeps_every_script_and_emoji():
    text = "naïve 日本語\u3000 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d👩\u200d👧 e\u0301 a\xa0b"
    assert printable(text) == text
    assert printable(HOSTILE) == SHOWN


def test_a_message_of_a_library_is_one_short_line():
    assert one_line("  Retrying\n\n   in 1s\x1b[31m ") == r"Retrying in 1s\x1b[31m"
    assert len(one_line("x" * 10_000)) == 500


# --- one room prints --------------------------------------------------------------------------------

PRINTERS = {
    "print", "input", "sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "rich.print", "rich.get_console",
    "rich.console.Console", "traceback.print_exc", "traceback.print_exception", "traceback.print_stack",
    "logging.basicConfig", "logging.StreamHandler", "warnings.warn", "pprint.pprint", "os.write",
}  # fmt: skip
BARS = {"rich.live.Live", "rich.progress.Progress"}


def prints(source: str) -> list[str]:
    """Return the names in a source that write to the terminal, called or not, under any import name."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [pair for node in nodes for pair in imports(node)]
    names = dict(imported)
    used = [full for _, full in imported]
    used += [dotted(node, names) for node in nodes if isinstance(node, ast.Attribute | ast.Name)]
    bars = [node for node in nodes if isinstance(node, ast.Call) and dotted(node.func, names) in BARS]
    used += ["print" for bar in bars if "console" not in [word.arg for word in bar.keywords]]  # a console of its own
    return [name for name in used if name in PRINTERS]


def test_only_one_room_prints():
    package = ROOT / "training"
    # open_export.py runs as a process of its own, without this package, and its output is captured.
    files = [path for path in package.rglob("*.py") if path.parent.name != "terminal" and path.name != "open_export.py"]
    assert {str(path.relative_to(package)): names for path in files if (names := prints(path.read_text()))} == {}


def test_every_way_to_print_is_detected():
    sources = [
        "print(text)", "checkpoints.latest(folder, print)", "import sys\nsys.stdout.write(text)",
        "from sys import stderr", "import sys as s\ns.stderr.flush()", "from rich.console import Console as Terminal",
        "import rich\nrich.print(text)", "import traceback\ntraceback.print_exc()", "import os\nos.write(1, data)",
        "from rich.progress import Progress\nProgress(*columns)",
    ]  # fmt: skip
    assert [source for source in sources if not prints(source)] == []
    assert prints("self.printer.print(text)\nsample.stdout") == []


# --- libraries --------------------------------------------------------------------------------------


LIBRARIES = f"""
import logging, warnings
from training.terminal import messages_of_libraries
with messages_of_libraries():
    library = logging.getLogger("library.utils")
    library.addHandler(logging.StreamHandler())  # as huggingface_hub does at import
    library.propagate = False
    library.warning("HTTP Error 503\\n%s thrown", {HOSTILE!r})
    logging.getLogger("other").warning("Retrying")
    logging.getLogger("other").info("not shown")
    warnings.warn({HOSTILE!r})
    raise ValueError({HOSTILE!r})
"""


def test_log_records_and_warnings_of_libraries_are_lines_of_ours_and_tracebacks_are_escaped():
    error = command("-c", LIBRARIES).stderr
    first, second, third, *trace = error.splitlines()
    shown = SHOWN.replace("\\n", " ").replace("\\r", " ")  # white space is a blank
    assert (first, second) == (f"library: HTTP Error 503 {shown} thrown", "other: Retrying")
    assert third == f"UserWarning: {shown}"
    message, indented = SHOWN.split("\\n")
    assert trace[0].startswith("Traceback") and trace[-2:] == [f"ValueError: {message}", f"    {indented}"]
    assert_harmless(error)


def test_rich_text_is_escaped_and_its_markup_is_not_obeyed(capsys):
    console = rich_console()
    console.print(HOSTILE, soft_wrap=True)
    text = capsys.readouterr().out
    assert "[red]x[/]" in text and not OBEYED.search(text.replace("\n", ""))


# --- samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x = 1\r\n\tpass \n\n", "import os\nx = 1\n    pass"),
        ("\n\nx", "import os\n\n\nx"),
        ("\n\n\nx", "import os\n(3 blank lines)\nx"),
        ("\n" * 50 + "x" + "\n" * 9, "import os\n(50 blank lines)\nx"),
        ("\n  " * 50 + "\n x", "import os\n(51 blank lines)\n x"),
        ("\x1b[2Jx\x85\u2028y", "import os\n\\x1b[2Jx\\x85\\u2028y"),
    ],
)
def test_a_sample_is_shown_as_it_is_but_for_escapes_and_blank_lines(text, shown):
    assert sample_text({"prompt": "import os\n", "text": text}) == shown


@pytest.mark.parametrize("text", ["a\n" * 500, "a " * 5000, "a\n\n" * 300], ids=["lines", "width", "blank lines"])
def test_a_long_sample_fits_the_screen_and_says_how_much_is_missing(text):
    shown = sample_text({"prompt": "", "text": text})
    *lines, last = shown.split("\n")
    n_shown = len("\n".join(lines))
    assert len(lines) <= MAX_SAMPLE_LINES and n_shown <= MAX_SAMPLE_CHARS
    assert last == f"({len(text.rstrip()) - n_shown:,} more characters are in metrics.jsonl)"


# --- streams ----------------------------------------------------------------------------------------


def shell(line: str, **env: str) -> subprocess.CompletedProcess:
    """Run a line of bash with `train` for a command that imports no torch, and return the first program's status."""
    program = f"{sys.executable} -m training.train --config configs/quickstart.yaml --print-config"
    script = f"{line.replace('train', program, 1)}; exit ${{PIPESTATUS[0]}}"
    variables = os.environ | env
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("train >&-", 2, "error: standard output: closed\n"),
        ("train > /dev/full", 2, "error: standard output: No space left on device\n"),
        ("train --steps x 2>&-", 2, ""),
        ("train --steps x 2> /dev/full", 2, ""),
    ],
)
def test_a_result_that_cannot_be_written_is_an_error_of_one_line(line, status, error):
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", error)


def test_an_ascii_terminal_shows_escapes():
    done = shell("train --eval.prompts '[日本]'", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and r"- \u65e5\u672c" in done.stdout


@pytest.fixture
def stdout_to(monkeypatch):
    """Send standard output to a file or terminal; forget afterwards that it failed."""

    files = []

    def redirect(file: str | int) -> None:
        streams.lost.clear()
        files.append(open(file, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 (or a descriptor; closed below)
        monkeypatch.setattr(sys, "stdout", files[-1])

    yield redirect
    streams.lost.clear()
    for file in files:
        with suppress(OSError):
            file.close()


def test_a_run_does_not_stop_for_its_output_but_a_command_for_its_result(config, finished, capsys, stdout_to):
    run = str(finished())
    shutil.rmtree(Path(run, "checkpoints/step-00000008"))
    capsys.readouterr()
    stdout_to("/dev/full")
    with messages_of_libraries():
        assert train(config()) == 0
    assert Path(run, "summary.json").exists()
    lost = "standard output: No space left on device; output is dropped from here on"
    assert [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")] == [lost]
    for target, *arguments in (
        ("evaluate", "--run", run),
        ("generate", "--run", run, "--prompt", "a", "--tokens", "4"),
        ("checkpoints", "list", run),
        ("prepare", "--config", f"{run}/config.yaml"),
    ):
        stdout_to("/dev/full")
        assert importlib.import_module(f"training.{target}").main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")]
        assert lines == ["error: standard output: No space left on device"]
    reader, writer = os.pipe()
    os.close(reader)
    stdout_to(writer)
    assert importlib.import_module("training.checkpoints").main(["list", run]) == 141
    assert capsys.readouterr().err == ""


# --- hostile names ------------------------------------------------------------------------------------


def test_no_command_shows_a_hostile_name_raw_or_takes_its_newline_for_a_line(call, options, tmp_path):
    """One run, in a folder and of a data file with such names, through every command."""
    name, shown = HOSTILE.replace("/", "|"), SHOWN.replace("/", "|")
    text, prompts, out = tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl", tmp_path / name
    text.write_text("some text to train on\n" * 400 + HOSTILE)
    prompts.write_text("{}")
    source = [{"type": "files", "paths": [str(text)]}]
    data = options()["data"] | {"sources": source, "val_sources": source}
    config = str(write_config(tmp_path / "a.yaml", options(out_dir=str(out), steps=4, data=data)))
    run = out / "small"
    outputs = [
        call("prepare", "--config", config),
        call("train", "--config", config),
        call("evaluate", "--run", str(run)),
        call("evaluate", "--run", str(run), "--data", str(prompts)),
        call("generate", "--run", str(run), "--prompt", HOSTILE[:9], "--tokens", "1", "--json"),
        call("generate", "--run", str(run), "--prompts", str(prompts)),
        call("export", "--run", str(run), "--out", str(out)),
        call("checkpoints", "list", str(run)),
        call("plan", "--config", config, "--device", HOSTILE),
        call("twin", "--config", config, "--out", str(out / "twin.yaml")),
        call("twin", "--config", config),
        call("train", "--config", str(prompts)),
        call("train", "--config", config, f"--{HOSTILE}", "1"),
        call("train", "--config", config, "--model", f"{{? {json.dumps(HOSTILE)} : 1}}"),
    ]
    for result in outputs:
        assert_harmless(result.stdout + result.stderr)
    assert [result.returncode for result in outputs] == [0, 0, 0, 2, 0, 2, 2, 0, 2, 0, 0, 2, 2, 2]
    page = (run / "report.html").read_text()
    assert not OBEYED.search(page) and shown.partition("\\n")[0] in page
    harm(run)
    for result in (call("checkpoints", "verify", str(run)), call("generate", "--run", str(run), "--prompt", "a")):
        assert result.returncode and shown in result.stdout + result.stderr
        assert_harmless(result.stdout + result.stderr)


def harm(run: Path) -> None:
    """Give the newest checkpoint a tensor, and the older one a file in its manifest, of a hostile name."""
    older, newest = sorted((run / "checkpoints").iterdir())
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "manifest.json").write_text(json.dumps(manifest | {HOSTILE: {"sha256": "0", "bytes": 1}}))
    weights = load_file(newest / "model.safetensors")
    save_file(weights | {HOSTILE: torch.zeros(2)}, newest / "model.safetensors")
    replace_file(newest, "model.safetensors", (newest / "model.safetensors").read_bytes())


# --- generate -------------------------------------------------------------------------------------------


def test_generated_text_is_exact_in_a_file_and_escaped_on_a_terminal(finished, tmp_path, stdout_to):
    prompt = "a\x1b[2J\n\tb\x0c\u202e"
    arguments = ["--run", str(finished()), "--prompt", prompt, "--tokens", "4", "--temperature", "0"]
    stdout_to(str(tmp_path / "out"))
    assert generate.main(arguments) == 0
    exact = (tmp_path / "out").read_bytes().decode()
    assert exact.startswith(prompt)
    terminal, slave = pty.openpty()
    stdout_to(slave)
    assert generate.main(arguments) == 0
    shown = os.read(terminal, 65536).decode().replace("\r\n", "\n")
    os.close(terminal)
    assert shown == printable(exact, TEXT) and shown.startswith("a\\x1b[2J\n\tb\\x0c\\u202e")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", ["a b\n\né", "a b\r\n\r\né\r\n"])
def test_prompts_are_read_from_the_files_of_any_editor(tmp_path, encoding, text):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode(encoding))
    assert generate.read_prompts(path) == ["a b", "", "é"]
    lines = "".join(json.dumps({"prompt": line}) + "\r\n" for line in ("a", "é"))
    path.with_suffix(".jsonl").write_bytes(lines.encode(encoding))
    assert generate.read_prompts(path.with_suffix(".jsonl")) == ["a", "é"]
