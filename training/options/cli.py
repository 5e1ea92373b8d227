"""Read a run's config from a YAML file and the command line: merge both as trees and validate once.

    python -m training.options.cli schema > configs/schema.json

writes the JSON schema for editors. Nothing here imports torch.
"""

import argparse
import errno
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from training.config import Config, Section
from training.errors import UserError, exit_unless_first_local_rank
from training.files import expand_path
from training.options.schema import closest, explain_unknown, find_option, help_text, is_list, json_schema, sections_at
from training.options.validate import settle_alternatives, validate
from training.options.yaml import ConfigErrors, Node, Problem, read_file, read_flag_value, to_dotted, to_printable
from training.terminal import LostOutputError, print_note, print_text

MODEL_HELP = """folder of a run, finished or not, or of one of its checkpoints; or an exported or Hugging Face folder,
or a name on its hub, as init_from takes"""


class Parser(argparse.ArgumentParser):
    """A parser for commands with few flags. Wrong arguments raise a UserError."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def add_path(self, name: str, **options: Any) -> None:
        """Add an argument that is a path, or with `nargs` several."""
        self.add_argument(name, type=partial(flag_path, name), **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def print_help(self, _file: object = None) -> None:
        _print_and_exit(self.format_help())


def flag_path(flag: str, text: str) -> str:
    """Return the path that a flag names, by the rule of path options (`expand_path`). Raises UserError."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def load_config(path: str | Path | None, overrides: Mapping[str, str] | None = None) -> Config:
    """Load a YAML file (None: an empty one), with overrides such as `{"optim.learning_rate": "3e-4"}`.

    Overrides are YAML. A mapping without `type` is merged into the existing one; any other value replaces it, and the
    file's alternatives to it: `tokens` replaces `steps`.
    Raises ConfigErrors with one line for each error.
    """
    root, problems = (Node({}, "no file"), []) if path is None else read_file(path)
    for name in sorted(overrides or {}, key=lambda name: name.count(".")):  # a section before its options
        option = tuple(name.split("."))
        heads = (option[:n] for n in range(1, len(option) + 1))
        if unknown := next((head for head in heads if not find_option(head)), None):
            message = explain_unknown(unknown, sections_at(unknown[:-1]), option[len(unknown) :])
        else:
            message = _override(root, option, read_flag_value(overrides[name], f"--{name}"))
        if message:
            problems.append(Problem(f"--{name}", None, option, message))
    problems += settle_alternatives(root)
    config, more = validate(root)
    if problems or more:
        known = {problem.path for problem in problems}
        problems += [problem for problem in more if problem.path not in known]
        raise ConfigErrors(sorted(problems, key=lambda problem: problem.line or sys.maxsize))
    return config


def dump_config(config: Config) -> str:
    """Return the config as YAML that loads back to an equal one, with every option."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width = False, sys.maxsize
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """A representer that writes unprintable text, such as line breaks, in double quotes, which allow escapes."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def _override(root: Node, option: tuple[str, ...], value: Node) -> str | None:
    """Put a flag's value into the tree. Return an error message if a list has no such entry, else None."""
    node = root
    for depth, key in enumerate(option, start=1):
        child = node.child(key)
        if isinstance(node.value, list):
            if child is None:
                n, name = len(node.value), to_dotted(option[: depth - 1])
                return f"{name} has no entry '{to_printable(key)}': its length is {n}, counted from 0"
            key = int(key)
        elif not isinstance(node.value, dict):
            return None  # the file has no section here: `validate` will report it
        if depth == len(option):
            node.value[key] = _merged(child, value)
        elif isinstance(node.value, dict) and (child is None or child.value is None):
            node.value[key] = _default(option[:depth], value.origin)
        node = node.value[key]
    return None


def _merged(old: Node | None, new: Node) -> Node:
    """Return the flag's value, merged into an existing mapping unless the flag names a `type`."""
    if old is None or not isinstance(old.value, dict) or not isinstance(new.value, dict) or "type" in new.value:
        return new
    for key, node in new.value.items():
        old.value[key] = _merged(old.value.get(key), node)
    return old


def _default(option: tuple[str, ...], flag: str) -> Node:
    """Return the default of a section or list that a flag changes and the file does not contain."""
    field = find_option(option)
    if not is_list(field.annotation):
        return Node({}, flag)
    entries = () if field.is_required() else field.default
    plain = [entry.model_dump(exclude_defaults=True) if isinstance(entry, Section) else entry for entry in entries]
    return read_flag_value(json.dumps(plain), flag)  # JSON is YAML


def parse_command_line(
    argv: list[str], *, prog: str, doc: str, flags: dict[str, str]
) -> tuple[Config, dict[str, str | None]]:
    """Return the config of a command line, and the value of each of the command's own `flags` ({flag: help text}).

    Prints the help or the resolved config and exits with status 0, or prints every error and exits with status 2.
    """
    own = {"--config": "the run, a YAML file (required)", **flags}
    if "--help" in argv or "-h" in argv:
        _print_and_exit(_help(prog, doc, own) + "\n")
    values, lines = split_flags(argv, own)
    own_values = {flag: values.pop(flag, None) for flag in own}
    print_config = values.pop("--print-config", None) is not None
    if own_values["--config"] is not None:
        try:
            path = flag_path("--config", own_values.pop("--config"))
            config = load_config(path, {flag[2:]: value for flag, value in values.items()})
        except ConfigErrors as error:
            lines += error.lines
        except UserError as error:
            lines.append(str(error))
    elif not any(line.startswith("--config:") for line in lines):
        lines.append("--config: missing; give the run's YAML file, as in --config configs/quickstart.yaml")
    if lines:
        exit_unless_first_local_rank()
        for line in lines:
            print_note(f"error: {line}")
        raise SystemExit(2)
    if print_config:
        _print_and_exit(dump_config(config))
    return config, own_values


def _print_and_exit(text: str) -> NoReturn:
    try:
        print_text(text)
    except LostOutputError as error:
        if error.errno != errno.EPIPE:  # a pager that was left has shown enough
            raise
    raise SystemExit(0)


def split_flags(argv: list[str], own: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Split `--flag value` and `--flag=value` into ({flag: value}, error lines)."""
    values: dict[str, str] = {}
    lines, repeated = [], set()
    words = argv[::-1]
    while words:
        flag, equals, value = words.pop().partition("=")
        name = to_printable(flag)
        if not flag.startswith("--"):
            lines.append(f"{name}: not a flag; options are written --section.option VALUE")
            continue
        if flag == "--print-config" and equals:
            lines.append(f"{flag}: takes no value")
        elif flag != "--print-config" and not equals:
            if not words or words[-1].startswith("--"):
                lines.append(f"{name}: a value is missing: {name} VALUE")
                continue
            value = words.pop()
        known = closest(flag, [*own, "--help", "--print-config"])
        if flag in values:
            lines.append(f"{name}: given twice")
            repeated.add(flag)
        elif known and known != flag and not find_option((flag[2:],)):
            lines.append(f"{name}: unknown option; did you mean '{known}'?")
        else:
            values[flag] = value
    return {flag: value for flag, value in values.items() if flag not in repeated}, lines


def _help(prog: str, doc: str, own: dict[str, str]) -> str:
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    flags = {**own, "--print-config": "print the resolved config as YAML and exit", "--help": "print this and exit"}
    table = [
        line
        for flag, text in flags.items()
        for line in textwrap.wrap(text, width, initial_indent=f"    {flag:16}", subsequent_indent=" " * 20)
    ]
    about = (
        "All options, as flags; in a file, sections are indented. Values are YAML: 3e-4, null, true, [a, b], "
        "{type: moe, n_experts: 4}. N is the index in a list, from 0; `type` selects a variant. A mapping is merged "
        "into the file's unless it names its type; anything else replaces the file's value."
    )
    usage = f"usage: {prog} --config PATH [--section.option VALUE ...]"
    return "\n".join([usage, "", doc.strip(), "", *table, "", *textwrap.wrap(about, width), help_text(width)])


if __name__ == "__main__":
    if sys.argv[1:] != ["schema"]:
        raise SystemExit("usage: python -m training.options.cli schema > configs/schema.json")
    print_text(json_schema())
