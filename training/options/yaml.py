"""Parse YAML to a tree of nodes, each with its file and line, or its flag.

ruamel.yaml's loaders read the whole document before it can be checked, and do not report which option repeats a key or
has an anchor. This parser reads their events instead and rejects tags, anchors, aliases, repeated keys and deep nesting
at once. In YAML 1.2 `3e-4` is a number, `010` is ten, and `no` and `12:30:45` are text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from training.errors import UserError
from training.terminal import printable

MAX_BYTES = 32_768  # parsed in about half a second; a config has about 2,000 bytes
MAX_DEPTH = 12  # the deepest option, model.blocks.0.ffn.n_experts, is at 5
MAX_PROBLEMS = 50

OptionPath = tuple[str | int, ...]  # keys and list indices from the root to a value


@dataclass
class Node:
    """A value and its origin."""

    value: Any  # a dict of nodes, a list of nodes, or a scalar
    origin: str  # `my.yaml`, or the flag `--optim.learning_rate`
    line: int | None = None  # in a file, from 1
    text: str | None = None  # as written; only of an unquoted scalar or a flag's value
    syntax_error: str | None = None  # if a flag's value is not YAML: it can only be text

    def plain(self) -> Any:
        """Return the tree as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def child(self, key: str | int) -> "Node | None":
        """Return the entry of a mapping or a list, if there is one."""
        if isinstance(self.value, list) and re.fullmatch("[0-9]{1,6}", str(key)) and int(key) < len(self.value):
            return self.value[int(key)]
        return self.value.get(key) if isinstance(self.value, dict) else None

    def innermost(self, path: OptionPath) -> "Node":
        """Return the node at a path, or the innermost section around it that exists."""
        node = self
        for key in path:
            if (child := node.child(key)) is None:
                break
            node = child
        return node


class Problem(NamedTuple):
    """One error: the origin of a value, its option and a message."""

    origin: str
    line: int | None
    path: OptionPath
    message: str

    def __str__(self) -> str:
        origin = to_printable(self.origin) + (f":{self.line}" if self.line else "")
        name = to_printable(to_dotted(self.path))
        start = origin if not name or origin == f"--{name}" else f"{origin}: {name}"
        return f"{start}: {to_printable(self.message, 500)}"


class ConfigErrors(UserError):
    """All errors of a config, one line each in `lines`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.lines = list(dict.fromkeys(map(str, problems)))
        super().__init__("\nerror: ".join(self.lines))  # commands print `error: <text>`


def to_dotted(path: OptionPath) -> str:
    """Return a path as users write it: `model.blocks.0.ffn`."""
    return ".".join(map(str, path))


def to_printable(text: str, limit: int = 100) -> str:
    """Return `text` on one line: truncated, with control characters escaped."""
    return printable(text if len(text) <= limit else text[: limit - 3] + "...")


def read_file(path: str | Path) -> tuple[Node, list[Problem]]:
    """Parse a file. Raises ConfigErrors if it cannot be read, or is not a mapping."""
    parser = _Parser(_read_text(path), str(path), has_lines=True)
    root = parser.parse()
    if not isinstance(root.value, dict | None):
        raise parser.fatal(1, "not a mapping of options; write `option: value`, one a line")
    return Node(root.value or {}, str(path)), parser.problems


def _read_text(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) <= MAX_BYTES:
            return raw.decode()
        message = f"longer than {MAX_BYTES} bytes, which no config is"
    except FileNotFoundError:
        message = "no such file"
    except IsADirectoryError:
        message = "a folder; give the YAML file"
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start})"
    except (OSError, ValueError) as error:
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise ConfigErrors([Problem(str(path), None, (), message)])


def read_flag_value(text: str, flag: str) -> Node:
    """Parse the value of a flag. The node also keeps the text, as a text option need not be YAML."""
    parser = _Parser(text, flag, has_lines=False)
    try:
        root, problems = parser.parse(), parser.problems
    except ConfigErrors as error:
        problems = error.problems
    if problems:
        return Node(text, flag, text=text, syntax_error=problems[0].message)
    # Keep unquoted text as written: YAML would end it at ` #` and join its lines.
    is_unquoted = isinstance(root.value, str) and root.text is not None
    return Node(text if is_unquoted else root.value, flag, text=text)


class _Parser:
    """A parser of one document that collects problems."""

    def __init__(self, text: str, origin: str, *, has_lines: bool) -> None:
        self.text, self.origin, self.has_lines = text, origin, has_lines
        self.yaml = YAML(typ="safe", pure=True)
        skipped = (events.StreamStartEvent, events.DocumentEndEvent)
        self.events = (event for event in self.yaml.parse(text) if not isinstance(event, skipped))
        self.problems: list[Problem] = []

    def parse(self) -> Node:
        """Return the root; its value is None in an empty document. Raises ConfigErrors if parsing cannot go on."""
        try:
            start = next(self.events)
            if isinstance(start, events.StreamEndEvent):
                return Node(None, self.origin)
            if start.version or start.tags:
                raise self.fatal(_line(start), "no % directives here: a config is YAML 1.2")
            first = next(self.events)
            root = self.node(first, (), _line(first))
            if not isinstance(end := next(self.events), events.StreamEndEvent):
                raise self.fatal(_line(end), "a second document; a config is one")
            return root
        except ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            raise self.fatal(line, f"character {error.character:#04x} is not allowed in YAML") from None
        except MarkedYAMLError as error:
            problem = to_printable(error.problem or "unreadable")
            context = f" ({error.context})" if error.context else ""
            message = "a tab; indent with spaces" if "\\t" in problem else f"{problem}{context}"
            line = (error.problem_mark or error.context_mark).line + 1
            raise self.fatal(line, f"not YAML: {message}") from None

    def node(self, event: Any, path: OptionPath, line: int) -> Node:
        """Build the node that starts with `event`. An entry of a mapping has the line of its key."""
        if len(path) > MAX_DEPTH:
            raise self.fatal(_line(event), f"nested more than {MAX_DEPTH} deep")
        self.check(event, path)
        text = event.value if isinstance(event, events.ScalarEvent) and event.implicit[0] else None
        if isinstance(event, events.MappingStartEvent):
            value = self.mapping(path)
        elif isinstance(event, events.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self.events), events.SequenceEndEvent):
                value.append(self.node(item, (*path, len(value)), _line(item)))
        else:
            value = self.scalar(text) if text is not None else getattr(event, "value", None)
        return Node(value, self.origin, line if self.has_lines else None, text)

    def mapping(self, path: OptionPath) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            if not isinstance(event, events.ScalarEvent):
                raise self.fatal(_line(event), "a key has to be a word")
            self.check(event, path)
            key = event.value
            if first := entries.get(key):
                repeated = f"given twice, first on line {first.line}" if first.line else "given twice"
                self.reject((*path, key), _line(event), repeated)
            entries[key] = self.node(next(self.events), (*path, key), _line(event))
        return entries

    def scalar(self, text: str) -> Any:
        """Return an unquoted scalar as YAML 1.2 reads it: null, true or false, a number, or else text."""
        tag = str(self.yaml.resolver.resolve(ScalarNode, text, (True, False)))
        if tag.rpartition(":")[2] not in ("null", "bool", "int", "float") or len(text) > 100:
            return text
        try:
            return self.yaml.constructor.construct_object(ScalarNode(tag=tag, value=text))
        except ValueError:  # `-_`
            return text

    def check(self, event: Any, path: OptionPath) -> None:
        """Reject anchors, aliases and tags: no option needs them; they can run code or expand without bounds."""
        if isinstance(event, events.AliasEvent):
            name = to_printable(event.anchor)
            self.reject(path, _line(event), f"no aliases here (*{name}): write the value out, or quote it")
        elif event.anchor or event.tag:
            kind, name = ("anchors", f"&{event.anchor}") if event.anchor else ("tags", str(event.tag))
            self.reject(path, _line(event), f"no {kind} here ({to_printable(name)}): remove it, or quote the value")

    def reject(self, path: OptionPath, line: int, message: str) -> None:
        self.problems.append(Problem(self.origin, line if self.has_lines else None, path, message))
        if len(self.problems) == MAX_PROBLEMS:
            raise self.fatal(line, "and so on; this is no config")

    def fatal(self, line: int, message: str) -> ConfigErrors:
        return ConfigErrors([*self.problems, Problem(self.origin, line if self.has_lines else None, (), message)])


def _line(event: Any) -> int:
    return event.start_mark.line + 1
