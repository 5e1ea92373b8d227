"""Look up the options of `config.py` by path, and render the help and the JSON schema from them."""

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from training.config import Config, Section
from training.options.yaml import OptionPath, to_dotted


def sections(annotation: Any) -> tuple[type[Section], ...]:
    """Return the section classes in an annotation: none for a plain value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    return tuple(section for part in get_args(annotation) for section in sections(part))


def literals(annotation: Any) -> list[str]:
    """Return the words of the `Literal`s in an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in literals(part)]


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def type_name(section: type[Section]) -> str | None:
    """Return the `type:` that selects a section in its union."""
    return section.model_fields["type"].default if "type" in section.model_fields else None


def find_option(path: OptionPath) -> FieldInfo | None:
    """Return the option at a path, in any variant of a union; for an entry of a list, the list's. None if unknown."""
    inside, field, in_list = (Config,), None, False
    for key in path:
        if in_list and str(key).isdecimal():
            in_list = False
            continue
        field = next((section.model_fields[key] for section in inside if key in section.model_fields), None)
        if field is None:
            return None
        inside, in_list = sections(field.annotation), is_list(field.annotation)
    return field


def sections_at(path: OptionPath) -> tuple[type[Section], ...]:
    """Return the section classes that a path may hold."""
    field = find_option(path)
    return sections(field.annotation) if field else (Config,)


def closest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)


def explain_unknown(path: OptionPath, inside: tuple[type[Section], ...], rest: OptionPath = ()) -> str:
    """Explain that the sections `inside` have no option `path`; `rest` is the remainder of a flag's path."""
    *parent, key = path
    if "." in str(key) and find_option(nested := (*parent, *str(key).split("."))):
        return f"unknown option; nest it: `{nested[-1]}:` indented below `{to_dotted(nested[:-1])}:`"
    siblings = [type_name(one) for one in sections_at(tuple(parent)) if key in one.model_fields and one not in inside]
    if siblings:
        return f"unknown option of type {type_name(inside[0])}; type {' and '.join(siblings)} has it"
    names = list(dict.fromkeys(name for section in inside for name in section.model_fields))
    if match := closest(str(key), names):
        meant = (*parent, match, *rest) if find_option((*parent, match, *rest)) else (*parent, match)
    else:
        everywhere = ((*group.path, name) for group in all_groups() for name in group.section.model_fields)
        meant = next((other for other in everywhere if other[-1] == (*path, *rest)[-1]), None)
    if meant:
        return f"unknown option; did you mean '{to_dotted(meant)}'?"
    return f"unknown option; {to_dotted(parent) or 'a run'} has {', '.join(names) or 'none below it'}"


class Group(NamedTuple):
    """The options of one section."""

    path: OptionPath
    doc: str
    section: type[Section]


def all_groups(section: type[Section] = Config, path: OptionPath = (), doc: str = "the run") -> Iterator[Group]:
    """Yield every section and every variant of every union, from the root. `N` stands for a list index."""
    yield Group(path, doc, section)
    for name, field in section.model_fields.items():
        below = (*path, name, "N") if is_list(field.annotation) else (*path, name)
        for variant in sections(field.annotation):
            yield from all_groups(variant, below, field.description or "")


def flatten_options(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each value in nested dicts and lists: `model.blocks.0.repeat`. An empty one is None."""
    if isinstance(tree, dict | list | tuple) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten_options(value, f"{prefix}.{key}".removeprefix("."))
    else:
        yield prefix, None if tree in ((), [], {}) else tree


def default_text(value: Any) -> str:
    """Return a default value as text for the help."""
    if isinstance(value, Section):
        return type_name(type(value)) or "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(default_text, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value)


def help_text(width: int) -> str:
    """Return the help: every option by section, with its default, unit and description."""
    lines: list[str] = []
    first_path: dict[type[Section], str] = {}
    heading = None
    for group in all_groups():
        name = to_dotted(group.path)
        original = first_path.setdefault(group.section, name)
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
    """Yield the lines of a section's options: flag, default, description [unit, or allowed words]."""
    table = []
    for name, field in group.section.model_fields.items():
        if name != "type" and (not sections(field.annotation) or is_list(field.annotation)):
            default = "required" if field.is_required() else default_text(field.default)
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            note = " | ".join(choices) or (field.json_schema_extra or {}).get("unit")
            about = f"{field.description} [{note}]".removesuffix(" [None]")
            table.append((f"--{to_dotted((*group.path, name))}", default, about))
    flags, defaults = (max((len(row[n]) for row in table), default=0) for n in (0, 1))
    for flag, default, about in table:
        start = f"    {flag:{flags}}  {default:{defaults}}  "
        yield from textwrap.wrap(about, width, initial_indent=start, subsequent_indent=" " * len(start))


def json_schema() -> str:
    """Return the JSON schema of a config, for editors: pydantic's, with the unit in the description.

    Every variant of a union but the first requires its `type`, so that exactly one variant fits.
    """
    tree = Config.model_json_schema()
    for section in (tree, *tree["$defs"].values()):
        for option in section["properties"].values():
            option.pop("title", None)
            if unit := option.pop("unit", None):
                option["description"] += f" [{unit}]"
            for variant in option.get("oneOf", option.get("items", {}).get("oneOf", []))[1:]:
                schema = tree["$defs"][variant["$ref"].rpartition("/")[2]]
                schema["required"] = sorted({"type", *schema.get("required", [])})
    return json.dumps(tree, indent=2) + "\n"
