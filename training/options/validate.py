"""A merged tree as a Config, or everything that is wrong with it.

Pydantic stops at a wrong option before it looks at the rules between options, and an unknown `type` hides what is below
it. So what is wrong is noted, something right put in its place, and the tree validated again, until nothing is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from training.config import Config, Section
from training.options.schema import (
    ErrorLocation,
    closest,
    describe_expected,
    is_list,
    locate,
    minimal_value,
    sections,
    type_name,
    unknown,
)
from training.options.yaml import MAX_PROBLEMS, ConfigTree, OptionPath, Problem, SourceLocation, printable


def validate(document: ConfigTree) -> Config:
    """The config; it counts only where `document.problems` is empty afterwards. The tree is mended in place."""
    wrong = [problem.at for problem in document.problems]
    config = _mended(document, wrong)
    if len(document.problems) >= MAX_PROBLEMS:
        document.problems.append(Problem(document.given[()], (), "and so on"))
    for section, below, message in _broken_rules(config, ()):
        at = (*section, *below.split("."))
        if not any(_rests_on(bad, section, at, message) for bad in wrong):
            document.problems.append(Problem(_given(document, at), at, message))
    return config


def _mended(document: ConfigTree, wrong: list[OptionPath]) -> Config:
    """The config with something right in the place of whatever is wrong, which is noted and added to `wrong`."""
    for _ in range(100):  # one pass shows what is wrong at one level, and the next what that hid: three are common
        try:
            return Config.model_validate(document.tree, context="rules are run afterwards")
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                wrong += _mend(document, detail)
    raise AssertionError(f"cannot be mended: {document.tree}")


def _mend(document: ConfigTree, detail: Any) -> list[OptionPath]:
    """Note what a pydantic error is about and put a right value there; the options that are in doubt from now on."""
    place, kind, value = locate(detail["loc"]), detail["type"], detail["input"]
    given = _given(document, place.at)
    if kind == "too_short" and len(value) >= detail["ctx"]["min_length"]:
        return []  # enough entries are there, but some of them are wrong, and are noted as such
    if kind == "missing" and sections(place.annotation) and not is_list(place.annotation):
        _put(document.tree, place.at, {})  # so that the options missing in it are named
        return []
    if kind == "string_type" and given.text is not None and given.line is None:
        _put(
            document.tree, place.at, given.text
        )  # a flag's value has no quotes to say that it is text: the type says it
        return []
    doubted = []
    if len(document.problems) < MAX_PROBLEMS:
        at, message, doubted = _explain(place, kind, value, given)
        if not any(problem.at == at for problem in document.problems):
            document.problems.append(Problem(_given(document, at), at, given.flaw or message))
    if kind == "extra_forbidden" or (place.field and not place.field.is_required()):
        _put(document.tree, place.at)
    else:
        _put(document.tree, place.at, minimal_value(place.annotation))
    return [place.at, *doubted]


def _explain(
    place: ErrorLocation, kind: str, value: Any, given: SourceLocation
) -> tuple[OptionPath, str, list[OptionPath]]:
    """(the option to name, what is wrong with it, the options that were meant instead)."""
    if kind == "extra_forbidden":
        message, meant = unknown(place.at, (place.section,))
        return place.at, message, [meant]
    if kind == "missing":
        return place.at, f"missing, and it has no default: {place.field.description}", []
    if kind.startswith("union_tag") and isinstance(value, dict):
        types = [type_name(section) for section in sections(place.annotation)]
        shown, hint = _shown(value["type"], None), _did_you_mean(value["type"], types)
        return (*place.at, "type"), f"{shown} is not one of {', '.join(types)}{hint}", []
    wanted = describe_expected(place.annotation, place.field.metadata if place.field else ())
    hint = ""
    if kind == "literal_error":
        hint = _did_you_mean(value, wanted.removeprefix("one of ").split(", "))
    elif kind == "finite_number":
        wanted = f"finite: {wanted}"
    elif kind == "string_type" and isinstance(value, int | float):
        hint = f"; quote it: '{given.text}'"
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value):.15g}" if abs(value) < 1e15 else ""
    return place.at, f"{_shown(value, given.text)} is not {wanted}{hint}", []


def _did_you_mean(value: Any, words: list[str]) -> str:
    match = closest(value, words) if isinstance(value, str) else None
    return f"; did you mean '{match}'?" if match else ""


def _shown(value: Any, text: str | None) -> str:
    """A value in an error line, short, and as it was written where that is known."""
    if isinstance(value, str):
        return f"'{printable(value, 60)}'"
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") if value else str(value)
    return "null" if value is None else printable(text or json.dumps(value), 60)


def _given(document: ConfigTree, at: OptionPath) -> SourceLocation:
    """Where the value at a path was given, or the innermost section around it that was."""
    return next(document.given[at[:n]] for n in range(len(at), -1, -1) if at[:n] in document.given)


def _put(tree: Any, at: OptionPath, *value: Any) -> None:
    """Set the value at a path, or with none, remove what is there."""
    for key in at[:-1]:
        tree = tree[key]
    if value:
        tree[at[-1]] = value[0]
    else:
        tree.pop(at[-1], None)


def _broken_rules(section: Section, at: OptionPath) -> Iterator[tuple[OptionPath, str, str]]:
    """(a section, an option below it, what is wrong with that) of every section's rules."""
    for below, message in section.rules():
        yield at, below, message
    for name, value in section:
        if isinstance(value, Section):
            yield from _broken_rules(value, (*at, name))
        for n, entry in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(entry, Section):
                yield from _broken_rules(entry, (*at, name, n))


def _rests_on(bad: OptionPath, section: OptionPath, at: OptionPath, message: str) -> bool:
    """Whether a section's verdict on `at` rests on an option that was wrong, and replaced for the time being."""
    if not bad or bad[: len(section)] != section:
        return False
    name = next(key for key in reversed(bad) if isinstance(key, str))
    return at[: len(bad)] == bad or bad[: len(at)] == at or re.search(rf"\b{re.escape(name)}\b", message) is not None
