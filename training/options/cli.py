"""A run's config from a YAML file and the command line: merged as trees, validated once, every error on a line.

    python -m training.options.cli schema > configs/schema.json

writes the JSON schema that editors complete from. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from training.config import Config, Section
from training.errors import UserError, exit_unless_first_local_rank
from training.options.schema import closest, find_option, help_text, is_list, json_schema, sections_at, unknown
from training.options.validate import validate
from training.options.yaml import (
    ConfigErrors,
    ConfigTree,
    OptionPath,
    Problem,
    SourceLocation,
    dotted,
    printable,
    read_file,
    read_flag_value,
)


class Parser(argparse.ArgumentParser):
    """For the commands whose flags are few: wrong arguments are a UserError, and so one line."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def load_config(path: str | Path | None, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of a YAML file (None: of nothing), with `overrides` such as `{"optim.learning_rate": "3e-4"}`.

    The values are YAML. A mapping is merged into what is there unless it names its `type`; all else replaces it.
    Raises ConfigErrors with a line for everything that is wrong.
    """
    document = read_file(path) if path is not None else ConfigTree({}, {(): SourceLocation("no file")}, [])
    for name in sorted(overrides or {}, key=lambda name: name.count(".")):  # a whole before its parts
        _override(document, name, overrides[name])
    config = validate(document)
    if document.problems:
        problems = sorted(document.problems, key=lambda problem: problem.given.line or sys.maxsize)
        raise ConfigErrors(list(dict.fromkeys(map(str, problems))))
    return config


def dump_config(config: Config) -> str:
    """The config as YAML that loads back to an equal one, every option written out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width = False, sys.maxsize
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """Text with line breaks and the like goes in double quotes, where every character can be escaped."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def parse_command_line(
    argv: list[str], *, prog: str, doc: str, flags: dict[str, str]
) -> tuple[Config, dict[str, str | None]]:
    """The config that a command line asks for, and the values of the command's own `flags` ({flag: doc}).

    Prints the help or the resolved config and exits with status 0; prints every error and exits with status 2.
    """
    own = {"--config": "the run, a YAML file (required)", **flags}
    if "--help" in argv or "-h" in argv:
        _answer(_help(prog, doc, own) + "\n")
    values, lines = _split(argv, own)
    given = {flag: values.pop(flag, None) for flag in own}
    print_config = values.pop("--print-config", None) is not None
    if given["--config"] is not None:
        try:
            config = load_config(given.pop("--config"), {flag[2:]: value for flag, value in values.items()})
        except ConfigErrors as error:
            lines += error.lines
    elif not any(line.startswith("--config:") for line in lines):
        lines.append("--config: missing; give the run's YAML file, as in --config configs/quickstart.yaml")
    if lines:
        exit_unless_first_local_rank()
        print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
        raise SystemExit(2)
    if print_config:
        _answer(dump_config(config))
    return config, given


def _answer(text: str) -> NoReturn:
    """Print what was asked for, and exit with status 0."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # a pager was left; without this, Python complains once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _split(argv: list[str], own: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """({flag: value}, error lines) of `--flag value` and `--flag=value`."""
    values: dict[str, str] = {}
    lines, twice = [], set()
    words = argv[::-1]
    while words:
        flag, equals, value = words.pop().partition("=")
        name = printable(flag)
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
        meant = closest(flag, [*own, "--help", "--print-config"])
        if flag in values:
            lines.append(f"{name}: given twice")
            twice.add(flag)
        elif meant and meant != flag and not find_option((flag[2:],)):
            lines.append(f"{name}: unknown option; did you mean '{meant}'?")
        else:
            values[flag] = value
    return {flag: value for flag, value in values.items() if flag not in twice}, lines


def _help(prog: str, doc: str, own: dict[str, str]) -> str:
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    flags = {**own, "--print-config": "print the resolved config as YAML and exit", "--help": "print this and exit"}
    table = [
        line
        for flag, text in flags.items()
        for line in textwrap.wrap(text, width, initial_indent=f"    {flag:16}", subsequent_indent=" " * 20)
    ]
    about = (
        "Every option, as a flag; in a file, sections are indented. Values are YAML: 3e-4, null, true, [a, b], "
        "{type: moe, n_experts: 4}. N is the place in a list, from 0; `type` picks a variant. A mapping is merged into "
        "the file's unless it names its type; all else replaces it."
    )
    usage = f"usage: {prog} --config PATH [--section.option VALUE ...]"
    return "\n".join([usage, "", doc.strip(), "", *table, "", *textwrap.wrap(about, width), help_text(width)])


# --- merging ---------------------------------------------------------------------------------------


def _override(document: ConfigTree, name: str, text: str) -> None:
    """Put a flag's value into the tree, or note why there is no place for it."""
    flag, keys = SourceLocation(f"--{name}"), tuple(name.split("."))
    if problem := _unknown(keys) or _insert(document, flag, keys, text):
        document.problems.append(Problem(flag, keys, problem))


def _insert(document: ConfigTree, flag: SourceLocation, keys: OptionPath, text: str) -> str | None:
    """Put a flag's value into the tree; what to say where a list has no such entry."""
    at, node = (), document.tree
    for key in keys:
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(node):
                return f"{dotted(at)} has {len(node)} of them, counted from 0, and none is '{printable(key)}'"
            key = int(key)
        elif not isinstance(node, dict):
            break  # the file has something else where a section belongs, which is an error of its own
        at = (*at, key)
        if len(at) == len(keys):
            _merge(document, node, at, read_flag_value(text, flag.origin))
            break
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = _default(at)
            document.given[at] = flag
        node = node[key]
    return None


def _unknown(keys: OptionPath) -> str | None:
    """What to say of an option that there is not."""
    for n in range(1, len(keys) + 1):
        if not find_option(keys[:n]):
            return unknown(keys[:n], sections_at(keys[: n - 1]), keys[n:])[0]
    return None


def _default(at: OptionPath) -> Any:
    """What a section or a list begins with when a flag is the first to set something in it."""
    field = find_option(at)
    if not is_list(field.annotation):
        return {}
    entries = () if field.is_required() else field.default
    return [entry.model_dump(exclude_defaults=True) if isinstance(entry, Section) else entry for entry in entries]


def _merge(document: ConfigTree, node: Any, at: OptionPath, value: ConfigTree, below: OptionPath = ()) -> None:
    """Set `node[at[-1]]` to a flag's value; into a mapping there, one that does not name its `type` is merged."""
    old = node[at[-1]] if isinstance(node, list) else node.get(at[-1])
    new = value.tree
    for key in below:
        new = new[key]
    if isinstance(old, dict) and isinstance(new, dict) and "type" not in new:
        for key in new:
            _merge(document, old, (*at, key), value, (*below, key))
        return
    node[at[-1]] = new
    for stale in [path for path in document.given if path[: len(at)] == at]:
        del document.given[stale]
    given = value.given.items()
    document.given.update({(*at, *path[len(below) :]): one for path, one in given if path[: len(below)] == below})


if __name__ == "__main__":
    if sys.argv[1:] != ["schema"]:
        raise SystemExit("usage: python -m training.options.cli schema > configs/schema.json")
    print(json_schema(), end="")
