"""Turn a tree of nodes into a Config, or into one problem for each wrong option.

Pydantic lists the errors of all fields at once. Rules between a section's options run only if each of them is valid.
"""

import json
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from training.config import Config, Section
from training.options.schema import all_groups, closest, explain_unknown, is_list, literals, sections, type_name
from training.options.yaml import MAX_PROBLEMS, Node, OptionPath, Problem, to_printable
from training.section import SectionWithAlternatives

NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def validate(root: Node) -> tuple[Config | None, list[Problem]]:
    """Return the config, or None and the first MAX_PROBLEMS problems."""
    try:
        return Config.model_validate(root.plain()), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    if _reset_to_text(root, details):
        return validate(root)
    problems: dict[OptionPath, Problem] = {}
    for path, message in (explained for detail in details for explained in _explain(root, detail)):
        node = root.innermost(path)
        problems.setdefault(path, Problem(node.origin, node.line, path, node.syntax_error or message))
        if len(problems) == MAX_PROBLEMS:
            return None, [*problems.values(), Problem(root.origin, None, (), "and so on")]
    return None, list(problems.values())


def settle_alternatives(root: Node) -> list[Problem]:
    """Remove all but one of the alternatives that are set; a flag's replaces the file's. Return a problem for the rest.

    The first of the file's, or of the flags', stays.
    """
    problems = []
    groups = [group for group in all_groups() if issubclass(group.section, SectionWithAlternatives)]
    for (path, names), kind in {
        (g.path, names): g.section for g in groups for names, _ in g.section.alternatives
    }.items():
        section = _node_at(root, path)
        if section is None or not isinstance(section.value, dict):
            continue
        chosen = {name: node for name in names if (node := section.child(name)) and kind.is_set(name, node.plain())}
        flags = {name: node for name, node in chosen.items() if node.line is None}
        first, *others = sorted(flags or chosen, key=lambda name: chosen[name].line or 0) or [None]
        for name in others:
            node, kept = chosen[name], chosen[first]
            where = f"on line {kept.line}" if kept.line else f"with {kept.origin}"
            message = f"{first} is also set, {where}; set one of {', '.join(names)}"
            problems.append(Problem(node.origin, node.line, (*path, name), message))
        for name in chosen.keys() - {first}:
            del section.value[name]
    return problems


def _node_at(root: Node, path: OptionPath) -> Node | None:
    """Return the node at a path, None if it is not there."""
    node: Node | None = root
    for key in path:
        node = node and node.child(key)
    return node


def _reset_to_text(root: Node, details: list[Any]) -> bool:
    """Reset flag values to text where the option is text: the shell removes quotes. Return True if any was reset."""
    nodes = [root.innermost(locate(detail["loc"]).path) for detail in details if detail["type"] == "string_type"]
    nodes = [node for node in nodes if node.text is not None and node.line is None]
    for node in nodes:
        node.value = node.text
    return bool(nodes)


def _explain(root: Node, detail: Any) -> Iterator[tuple[OptionPath, str]]:
    """Yield (option, message) of a pydantic error."""
    option, kind, value = locate(detail["loc"]), detail["type"], detail["input"]
    if kind == "rules":
        for below, message in detail["ctx"]["problems"]:
            yield (*option.path, *below.split(".")), message
    elif kind == "extra_forbidden":
        yield option.path, explain_unknown(option.path, (option.section,))
    elif kind == "value_error":
        yield option.path, str(detail["ctx"]["error"])
    elif kind == "missing":
        yield from _missing_options(option.path, option.field)
    elif kind.startswith("union_tag") and isinstance(value, dict):
        types = [type_name(section) for section in sections(option.annotation)]
        hint = _did_you_mean(value["type"], types)
        yield (*option.path, "type"), f"{_value_text(value['type'])} is not one of {', '.join(types)}{hint}"
    elif kind != "too_short" or len(value) < detail["ctx"]["min_length"]:  # else: wrong entries have their own errors
        text = root.innermost(option.path).text
        yield option.path, f"{_value_text(value, text)} is not {_expected_text(option, kind, value, text)}"


def _missing_options(path: OptionPath, field: FieldInfo) -> Iterator[tuple[OptionPath, str]]:
    """Yield the missing option, or the required options of a missing section."""
    if is_list(field.annotation) or not (inside := sections(field.annotation)):
        yield path, f"missing, and it has no default: {field.description}"
        return
    for name, below in inside[0].model_fields.items():
        if below.is_required():
            yield from _missing_options((*path, name), below)


def _expected_text(option: Any, kind: str, value: Any, text: str | None) -> str:
    """Describe the values that an option takes, with a hint."""
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


def _value_text(value: Any, text: str | None = None) -> str:
    """Return a value for an error line: short, and as the user wrote it if `text` is known."""
    if isinstance(value, str):
        return f"'{to_printable(value, 60)}'"
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") if value else str(value)
    return "null" if value is None else to_printable(text or json.dumps(value), 60)


class ErrorLocation(NamedTuple):
    """An option that a pydantic error is about."""

    path: OptionPath
    section: type[Section]
    annotation: Any
    field: FieldInfo | None  # None for an entry of a list


def locate(loc: OptionPath) -> ErrorLocation:
    """Convert a pydantic location, in which unions add their variant."""
    here = ErrorLocation((), Config, Config, None)
    for key in loc:
        inside = sections(here.annotation)
        if isinstance(key, int):
            here = ErrorLocation((*here.path, key), here.section, get_args(here.annotation)[0], None)
        elif len(inside) > 1:
            here = here._replace(annotation=next(section for section in inside if type_name(section) == key))
        elif inside:
            field = inside[0].model_fields.get(key)
            here = ErrorLocation((*here.path, key), inside[0], field and field.annotation, field)
        # Else the key is a branch of a union of plain values.
    return here


def describe_expected(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """Describe the values of an option, such as `an integer >= 1 or null`."""
    if get_origin(annotation) in (Union, UnionType) and not sections(annotation):
        parts = get_args(annotation)
        return " or ".join(describe_expected(part, () if part is NoneType else limits) for part in parts)
    if get_origin(annotation) is Annotated:
        annotation, *own = get_args(annotation)
        limits = (*limits, *own)
    not_empty = any(hasattr(limit, "min_length") for limit in limits)
    if is_list(annotation):
        entries = "{...}, {...}" if sections(annotation) else "first, second"
        return f"a list{' with an entry' * not_empty}: [{entries}]"
    if sections(annotation):
        return "a section: write its options indented below it" + ", or null" * (NoneType in get_args(annotation))
    if words := literals(annotation):
        return "one of " * (len(words) > 1) + ", ".join(words)
    bounds = [f"{sign} {getattr(limit, at)}" for limit in limits for at, sign in SIGNS.items() if hasattr(limit, at)]
    bounds += [f"matching {limit.pattern}" for limit in limits if getattr(limit, "pattern", None)]
    return f"{NOUNS[annotation]} {' and '.join(bounds + ['that is not empty'] * not_empty)}".strip()
