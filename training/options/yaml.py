"""YAML as a plain tree that remembers where, and in which words, every value was given.

ruamel.yaml parses YAML 1.2: `3e-4` is a number, `010` is ten, `no` and `12:30:45` are text. A config is a page of
mappings, lists and scalars: tags, anchors, aliases, repeated keys and deep nesting are refused as they are met, before
anything is built from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from training.errors import UserError

MAX_BYTES = 32_768  # parsed in about half a second; a config is a page, about 2,000 bytes
MAX_DEPTH = 12  # the deepest option, model.blocks.0.ffn.n_experts, is at 5
MAX_PROBLEMS = 50  # more are no help to anybody

OptionPath = tuple[str | int, ...]  # the way from the root of a tree to a value


class SourceLocation(NamedTuple):
    """Where a value was given, and how."""

    origin: str  # `my.yaml`, or the flag `--optim.learning_rate`
    line: int | None = None  # of a file, from 1
    text: str | None = None  # an unquoted scalar, as written
    flaw: str | None = None  # why a flag's value is no YAML, so that it can only be text


class Problem(NamedTuple):
    """What is wrong with the value at `at`."""

    given: SourceLocation
    at: OptionPath
    message: str

    def __str__(self) -> str:
        origin = printable(self.given.origin) + (f":{self.given.line}" if self.given.line else "")
        name = printable(dotted(self.at))
        place = origin if not name or origin == f"--{name}" else f"{origin}: {name}"
        return f"{place}: {printable(self.message, 500)}"


class ConfigErrors(UserError):
    """Everything that is wrong with a config, one line each in `lines`."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\nerror: ".join(lines))  # commands print `error: <text>`
        self.lines = lines


class ConfigTree(NamedTuple):
    """A tree of dicts, lists and scalars, where each part of it was given, and what was refused in it."""

    tree: Any
    given: dict[OptionPath, SourceLocation]
    problems: list[Problem]


def dotted(at: OptionPath) -> str:
    """A path as it is written: `model.blocks.0.ffn`."""
    return ".".join(map(str, at))


def printable(text: str, limit: int = 100) -> str:
    """`text` on one line: what cannot be printed is escaped, and what is too long is cut."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def read_file(path: str | Path) -> ConfigTree:
    """The file at `path`. Raises ConfigErrors where it cannot be read, or not as a mapping."""
    given = SourceLocation(str(path))
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refusal(given, "no such file") from None
    except IsADirectoryError:
        raise _refusal(given, "a folder; give the YAML file") from None
    except (OSError, ValueError) as error:
        raise _refusal(given, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise _refusal(given, f"longer than {MAX_BYTES} bytes, which no config is")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _refusal(given, f"not UTF-8 text (byte {error.start})") from None
    document = _Reader(text, given._replace(line=1)).document()
    document.given[()] = given
    if not isinstance(document.tree, dict | None):
        raise _refusal(given._replace(line=1), "not a mapping of options; write `option: value`, one a line")
    return document._replace(tree=document.tree or {})


def read_flag_value(text: str, flag: str) -> ConfigTree:
    """The value of a flag: YAML, or what can only be text and says in its `flaw` why."""
    given = SourceLocation(flag, text=text)
    try:
        document = _Reader(text, given).document()
    except ConfigErrors as error:
        return ConfigTree(text, {(): given._replace(flaw=error.lines[0].removeprefix(f"{flag}: "))}, [])
    if document.problems:
        return ConfigTree(text, {(): given._replace(flaw=document.problems[0].message)}, [])
    # Unquoted text stands as it is: YAML would end it at ` #` and join its lines.
    as_it_stands = isinstance(document.tree, str) and document.given[()].text is not None
    document.given[()] = given
    return document._replace(tree=text) if as_it_stands else document


def _refusal(given: SourceLocation, message: str) -> ConfigErrors:
    return ConfigErrors([str(Problem(given, (), message))])


class _Refused(Exception):
    """(event, message): a document that cannot be read on from here."""


class _Reader:
    """Builds one document from parser events."""

    def __init__(self, text: str, source: SourceLocation) -> None:
        self.text, self.source = text, source
        self.yaml = YAML(typ="safe", pure=True)
        self.given: dict[OptionPath, SourceLocation] = {}
        self.problems: list[Problem] = []

    def document(self) -> ConfigTree:
        """Raises ConfigErrors where the text is no YAML, or no config whatever its options are."""
        try:
            return ConfigTree(self.root(), self.given, self.problems)
        except _Refused as error:
            self.refuse((), *error.args)
        except ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            self.refuse((), line, f"character {error.character:#04x} is not allowed in YAML")
        except MarkedYAMLError as error:
            self.refuse((), (error.problem_mark or error.context_mark).line + 1, _in_words(error))
        raise ConfigErrors([str(problem) for problem in self.problems])

    def root(self) -> Any:
        """The one document's value; None where there is none."""
        self.events = (event for event in self.yaml.parse(self.text) if not isinstance(event, DocumentEndEvent))
        next(self.events)
        start = next(self.events)
        if isinstance(start, StreamEndEvent):
            return None
        if start.version or start.tags:
            raise _Refused(start, "no % directives here: a config is YAML 1.2")
        tree = self.node(next(self.events), ())
        if not isinstance(end := next(self.events), StreamEndEvent):
            raise _Refused(end, "a second document; a config is one")
        return tree

    def node(self, event: Any, at: OptionPath, line: int | None = None) -> Any:
        """The value that begins with `event`; an entry's line is that of its key."""
        if len(at) > MAX_DEPTH:
            raise _Refused(event, f"nested more than {MAX_DEPTH} deep")
        plain = event.value if isinstance(event, ScalarEvent) and event.implicit[0] else None
        self.given[at] = self.at_line(line or event)._replace(text=plain)
        self.check(event, at)
        if isinstance(event, MappingStartEvent):
            return self.mapping(at)
        if isinstance(event, SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                items.append(self.node(item, (*at, len(items))))
            return items
        return self.scalar(plain) if plain is not None else getattr(event, "value", None)

    def mapping(self, at: OptionPath) -> dict[str, Any]:
        """A mapping's entries, the keys as written."""
        entries: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise _Refused(event, "a key has to be a word")
            self.check(event, at)
            key = event.value
            if key in entries:
                first = self.given[*at, key].line
                self.refuse((*at, key), event, f"given twice, first on line {first}" if first else "given twice")
            entries[key] = self.node(next(self.events), (*at, key), event.start_mark.line + 1)
        return entries

    def scalar(self, text: str) -> Any:
        """An unquoted scalar as YAML 1.2 reads it: null, a truth value or a number; everything else is text."""
        tag = str(self.yaml.resolver.resolve(ScalarNode, text, (True, False)))
        if tag.rpartition(":")[2] not in ("null", "bool", "int", "float") or len(text) > 100:
            return text
        try:
            return self.yaml.constructor.construct_object(ScalarNode(tag=tag, value=text))
        except ValueError:  # `-_`
            return text

    def check(self, event: Any, at: OptionPath) -> None:
        """Refuse what options have no use for, and what can be made to run code or to explode."""
        if isinstance(event, AliasEvent):
            self.refuse(at, event, f"no aliases here (*{printable(event.anchor)}): write the value out, or quote it")
        elif event.anchor:
            self.refuse(at, event, f"no anchors here (&{printable(event.anchor)}): remove it, or quote the value")
        elif event.tag:
            self.refuse(at, event, f"no tags here ({printable(str(event.tag))}): remove it, or quote the value")

    def refuse(self, at: OptionPath, where: Any, message: str) -> None:
        self.problems.append(Problem(self.at_line(where), at, message))
        if len(self.problems) == MAX_PROBLEMS:
            raise _Refused(where, "and so on; this is no config")

    def at_line(self, where: Any) -> SourceLocation:
        """The source at a line, or at an event's; a flag has no lines."""
        line = where if isinstance(where, int) else where.start_mark.line + 1
        return self.source._replace(text=None, line=self.source.line and line)


def _in_words(error: MarkedYAMLError) -> str:
    """A syntax error on one line."""
    problem = printable(error.problem or "unreadable")
    if "\\t" in problem:
        return "not YAML: a tab; indent with spaces"
    return f"not YAML: {problem}" + (f" ({error.context})" if error.context else "")
