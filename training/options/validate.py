"""Turn a tree of nodes into a Config, or into one problem for each wrong option.

Pydantic lists the errors of all fields at once. The rules between a section's options run once its fields are right, so
what they say rests on values that the user gave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from training.config import Config
from training.options.schema import (
    closest,
    describe_expected,
    explain_unknown,
    is_list,
    literals,
    locate,
    sections,
    type_name,
)
from training.options.yaml import MAX_PROBLEMS, Node, OptionPath, Problem, to_printable


def validate(root: Node) -> tuple[Config | None, list[Problem]]:
    """Return the config, or None and the problems, the first MAX_PROBLEMS of them."""
    try:
        return Config.model_validate(root.plain()), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    if _take_flags_as_text(root, details):
        return validate(root)
    problems: dict[OptionPath, Problem] = {}
    for path, message in (explained for detail in details for explained in _explain(root, detail)):
        node = root.innermost(path)
        problems.setdefault(path, Problem(node.origin, node.line, path, node.syntax_error or message))
        if len(problems) == MAX_PROBLEMS:
            return None, [*problems.values(), Problem(root.origin, None, (), "and so on")]
    return None, list(problems.values())


def _take_flags_as_text(root: Node, details: list[Any]) -> bool:
    """Take a flag's value as text if the option is text: a flag has no quotes to say so. Return True if any was."""
    nodes = [root.innermost(locate(detail["loc"]).path) for detail in details if detail["type"] == "string_type"]
    nodes = [node for node in nodes if node.text is not None and node.line is None]
    for node in nodes:
        node.value = node.text
    return bool(nodes)


def _explain(root: Node, detail: Any) -> Iterator[tuple[OptionPath, str]]:
    """Yield (option, message) of one of pydantic's errors."""
    option, kind, value = locate(detail["loc"]), detail["type"], detail["input"]
    if kind == "rules":
        for below, message in detail["ctx"]["problems"]:
            yield (*option.path, *below.split(".")), message
    elif kind == "extra_forbidden":
        yield option.path, explain_unknown(option.path, (option.section,))
    elif kind == "missing":
        yield from _missing(option.path, option.field)
    elif kind.startswith("union_tag") and isinstance(value, dict):
        types = [type_name(section) for section in sections(option.annotation)]
        hint = _did_you_mean(value["type"], types)
        yield (*option.path, "type"), f"{_shown(value['type'], None)} is not one of {', '.join(types)}{hint}"
    elif kind != "too_short" or len(value) < detail["ctx"]["min_length"]:  # else each wrong entry has its own error
        text = root.innermost(option.path).text
        yield option.path, f"{_shown(value, text)} is not {_expected(option, kind, value, text)}"


def _missing(path: OptionPath, field: FieldInfo) -> Iterator[tuple[OptionPath, str]]:
    """Yield the missing option, or the required options of a missing section."""
    if is_list(field.annotation) or not (inside := sections(field.annotation)):
        yield path, f"missing, and it has no default: {field.description}"
        return
    for name, below in inside[0].model_fields.items():
        if below.is_required():
            yield from _missing((*path, name), below)


def _expected(option: Any, kind: str, value: Any, text: str | None) -> str:
    """Say which values an option takes, with a hint."""
    expected = describe_expected(option.annotation, option.field.metadata if option.field else ())
    if kind == "literal_error":
        return expected + _did_you_mean(value, literals(option.annotation))
    if kind == "finite_number":
        return f"finite: {expected}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"{expected}; quote it: '{text}'"
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{expected}; write {int(value):.15g}"
    return expected


def _did_you_mean(value: Any, words: list[str]) -> str:
    match = closest(value, words) if isinstance(value, str) else None
    return f"; did you mean '{match}'?" if match else ""


def _shown(value: Any, text: str | None) -> str:
    """Return a value for an error line: short, and as written if that is known."""
    if isinstance(value, str):
        return f"'{to_printable(value, 60)}'"
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") if value else str(value)
    return "null" if value is None else to_printable(text or json.dumps(value), 60)
