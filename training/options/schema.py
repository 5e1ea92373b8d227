"""What `config.py` declares, read back from its models: where an option is, what it wants, the help and the schema."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from training.config import Config, Section
from training.options.yaml import OptionPath, dotted

NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def sections(annotation: Any) -> tuple[type[Section], ...]:
    """The sections that an annotation allows: none for a plain value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    return tuple(section for part in get_args(annotation) for section in sections(part))


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def type_name(section: type[Section]) -> str | None:
    """What picks this section in its union, as in `type: moe`."""
    return section.model_fields["type"].default if "type" in section.model_fields else None


def find_option(at: OptionPath) -> FieldInfo | None:
    """The option at a path, in whichever variant of a union has it; an entry of a list is the list's."""
    inside, field, listed = (Config,), None, False
    for key in at:
        if listed and str(key).isdecimal():
            listed = False
            continue
        field = next((section.model_fields[key] for section in inside if key in section.model_fields), None)
        if field is None:
            return None
        inside, listed = sections(field.annotation), is_list(field.annotation)
    return field


def sections_at(at: OptionPath) -> tuple[type[Section], ...]:
    """The sections that can be at a path."""
    field = find_option(at)
    return sections(field.annotation) if field else (Config,)


class ErrorLocation(NamedTuple):
    """Where an error of pydantic's is: the path, the section of the option there, and what belongs there."""

    at: OptionPath
    section: type[Section]
    annotation: Any
    field: FieldInfo | None  # None for an entry of a list


def locate(loc: OptionPath) -> ErrorLocation:
    """The place of a pydantic location, which names the variants of unions on its way."""
    place = ErrorLocation((), Config, Config, None)
    for key in loc:
        inside = sections(place.annotation)
        if isinstance(key, int):
            place = ErrorLocation((*place.at, key), place.section, get_args(place.annotation)[0], None)
        elif len(inside) > 1:
            place = place._replace(annotation=next(section for section in inside if type_name(section) == key))
        elif inside:
            field = inside[0].model_fields.get(key)
            place = ErrorLocation((*place.at, key), inside[0], field and field.annotation, field)
        # Else it is a branch of a union of plain values, all of which are wrong.
    return place


def describe_expected(annotation: Any, limits: list[Any] | tuple[()] = ()) -> str:
    """What a value has to be, such as `an integer >= 1 or null`."""
    if get_origin(annotation) in (Union, UnionType) and not sections(annotation):
        return " or ".join(
            describe_expected(part, limits if part is not NoneType else ()) for part in get_args(annotation)
        )
    if get_origin(annotation) is Annotated:
        annotation, *limits = get_args(annotation)
    if is_list(annotation):
        entries = "{...}, {...}" if sections(annotation) else "first, second"
        return f"a list{' with an entry' if any(hasattr(limit, 'min_length') for limit in limits) else ''}: [{entries}]"
    if sections(annotation):
        return "a section: write its options indented below it" + (
            ", or null" if NoneType in get_args(annotation) else ""
        )
    if get_origin(annotation) is Literal:
        return "one of " * (len(get_args(annotation)) > 1) + ", ".join(get_args(annotation))
    bounds = [
        f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in SIGNS.items() if hasattr(limit, name)
    ]
    bounds += [f"matching {limit.pattern}" for limit in limits if getattr(limit, "pattern", None)]
    bounds += ["that is not empty" for limit in limits if hasattr(limit, "min_length")]
    return f"{NOUNS[annotation]} {' and '.join(bounds)}".strip()


def minimal_value(annotation: Any) -> Any:
    """Some right value, to look past a wrong one at what else is wrong."""
    if is_list(annotation):
        return [minimal_value(get_args(annotation)[0])]
    if inside := sections(annotation):
        fields = inside[0].model_fields.items()
        return {name: minimal_value(field.annotation) for name, field in fields if field.is_required()}
    return "x" if annotation is str else 1


def closest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)


def unknown(at: OptionPath, inside: tuple[type[Section], ...], rest: OptionPath = ()) -> tuple[str, OptionPath]:
    """(what to say of `at`, which these sections lack, the option that was meant); `rest` was asked for below it."""
    *parent, key = at
    if "." in str(key) and find_option(nested := (*parent, *str(key).split("."))):
        return f"unknown option; nest it: `{nested[-1]}:` indented below `{dotted(nested[:-1])}:`", nested
    names = list(dict.fromkeys(name for section in inside for name in section.model_fields))
    elsewhere = ((*group.at, name) for group in all_groups() for name in group.section.model_fields)
    if match := closest(str(key), names):
        meant = (*parent, match, *rest) if find_option((*parent, match, *rest)) else (*parent, match)
    else:
        meant = next((other for other in elsewhere if other[-1] == (*at, *rest)[-1]), None)
    siblings = [type_name(one) for one in sections_at(tuple(parent)) if key in one.model_fields and one not in inside]
    if siblings:
        return f"unknown option of type {type_name(inside[0])}; type {' and '.join(siblings)} has it", at
    if meant:
        return f"unknown option; did you mean '{dotted(meant)}'?", meant
    return f"unknown option; {dotted(parent) or 'a run'} has {', '.join(names) or 'none below it'}", at


class Group(NamedTuple):
    """The options of one section, for the help."""

    at: OptionPath
    doc: str
    section: type[Section]


def all_groups(section: type[Section] = Config, at: OptionPath = (), doc: str = "the run") -> Iterator[Group]:
    """Every section, and every variant of every union, from the top; the entries of a list are at `N`."""
    yield Group(at, doc, section)
    for name, field in section.model_fields.items():
        below = (*at, name, "N") if is_list(field.annotation) else (*at, name)
        for variant in sections(field.annotation):
            yield from all_groups(variant, below, field.description or "")


def flatten_options(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested dicts and lists, with its path: `model.blocks.0.repeat`."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten_options(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple) and tree:
        for i, value in enumerate(tree):
            yield from flatten_options(value, f"{prefix}.{i}")
    else:
        yield prefix, None if tree in ((), [], {}) else tree


def default_text(value: Any) -> str:
    """A default, as the help shows it."""
    if isinstance(value, Section):
        return type_name(type(value)) or "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(default_text, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value)


def help_text(width: int) -> str:
    """Every option, grouped by section, with its default, unit and line."""
    lines: list[str] = []
    first_at: dict[type[Section], str] = {}
    heading = None
    for group in all_groups():
        name = dotted(group.at)
        original = first_at.setdefault(group.section, name)
        default = ""
        if name != heading:
            heading, default = name, " (default)"
            about = group.doc if original == name else f"{group.doc}; with the options of {original}"
            lines += ["", *textwrap.wrap(f"{name}: {about}".removeprefix(": "), width)]
        if original != name:
            continue
        if kind := type_name(group.section):
            about = f"  type: {kind}{default}. {group.section.__doc__}"
            lines += textwrap.wrap(about, width, subsequent_indent="    ")
        lines += _rows(group, width)
    return "\n".join(lines)


def _rows(group: Group, width: int) -> Iterator[str]:
    """An option each: flag, default, what it does [unit, or the values there are]."""
    table = []
    for name, field in group.section.model_fields.items():
        if name != "type" and (not sections(field.annotation) or is_list(field.annotation)):
            default = "required" if field.is_required() else default_text(field.default)
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            note = " | ".join(choices) or (field.json_schema_extra or {}).get("unit")
            table.append(
                (f"--{dotted((*group.at, name))}", default, f"{field.description} [{note}]".removesuffix(" [None]"))
            )
    flags, defaults = (max((len(row[n]) for row in table), default=0) for n in (0, 1))
    for flag, default, doc in table:
        start = f"    {flag:{flags}}  {default:{defaults}}  "
        yield from textwrap.wrap(doc, width, initial_indent=start, subsequent_indent=" " * len(start))


def json_schema() -> str:
    """JSON schema of a config, for editors: pydantic's, with the unit in the description.

    A variant other than a union's first has to name its `type`, so that exactly one variant fits.
    """
    tree = Config.model_json_schema()
    for section in (tree, *tree["$defs"].values()):
        for option in section["properties"].values():
            option.pop("title", None)
            if unit := option.pop("unit", None):
                option["description"] += f" [{unit}]"
            for variant in option.get("oneOf", option.get("items", {}).get("oneOf", []))[1:]:
                named = tree["$defs"][variant["$ref"].rpartition("/")[2]]
                named["required"] = sorted({"type", *named.get("required", [])})
    return json.dumps(tree, indent=2) + "\n"
